"""Model families: names of sizes and what they mean. configs/families/ has published ones."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Union

import yaml

from data.errors import InputError

FOLDER = Path("configs") / "families"


@dataclass(frozen=True)
class Size:
    """The part of a model's shape that a family varies; keys of the config's `model` section."""

    num_layers: int
    num_heads: int
    hidden_size: int
    ffn_hidden_size: int
    num_kv_heads: int


def load_family(given: Union[str, dict[str, dict[str, int]]]) -> dict[str, Size]:
    """Name -> Size in the order given: of a YAML file with one section `sizes`, or of such a section itself.

    num_kv_heads may be left out: as many as num_heads. InputError for a size that is none.
    """
    where = "study.family"
    sizes: Any = given
    if isinstance(given, str):
        where, path = given, Path(given)
        if not path.is_file():
            others = ", ".join(str(one) for one in sorted(FOLDER.glob("*.yaml"))) or f"none in {FOLDER}"
            raise InputError(f"study.family: no file {given}; there are: {others}")
        try:
            read = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{given}: cannot be read as YAML ({' '.join(str(error).split())[:200]})") from None
        sizes = read.get("sizes") if isinstance(read, dict) else None
    if not isinstance(sizes, dict) or not sizes:
        raise InputError(
            f"{where}: a family is `sizes:` with {{NAME: {{num_layers: ..., hidden_size: ..., ...}}, ...}}"
        )
    if bad := [name for name in sizes if not re.fullmatch(r"\w[\w.-]*", str(name))]:
        raise InputError(
            f"{where}: the size {bad[0]!r} must have a plain name (letters, digits, . _ -): it is a part of file names"
        )
    return {str(name): _size(f"{where}: {name}", values) for name, values in sizes.items()}


def _size(where: str, values: Any) -> Size:
    names = [one.name for one in fields(Size)]
    if not isinstance(values, dict):
        raise InputError(f"{where} must be {{{', '.join(names)}}}")
    if unknown := [key for key in values if key not in names]:
        raise InputError(f"{where} has the unknown key {unknown[0]}: {', '.join(names)} are allowed")
    filled = {"num_kv_heads": values.get("num_heads"), **values}
    for name in names:
        value = filled.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{where}.{name} is {value!r}, it must be a whole number of at least 1")
    size = Size(**{name: filled[name] for name in names})
    if size.hidden_size % size.num_heads or size.num_heads % size.num_kv_heads:
        raise InputError(
            f"{where}: hidden_size {size.hidden_size} must be a multiple of num_heads {size.num_heads}, and that of num_kv_heads "
            f"{size.num_kv_heads}"
        )
    return size
