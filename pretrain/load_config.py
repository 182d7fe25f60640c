"""YAML + dotted overrides -> Config, through jsonargparse; every mistake becomes one line."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Optional

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from data.durable import keep_file
from data.errors import InputError
from pretrain.addresses import without_credentials
from pretrain.config import Config


def config_parser(description: str = "") -> ArgumentParser:
    """A parser of `--config FILE` and every `--section.key value`; callers may add their own options."""
    parser = ArgumentParser(
        exit_on_error=False, description=description, prog=f"python -m pretrain {description.split(':')[0]}".strip()
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; options after it override it")
    parser.add_class_arguments(Config)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """(Config, the other options by name). Raises InputError with the key, what is allowed and what was meant."""
    try:
        values = parser.instantiate(parser.parse_args(list(arguments)))
    except ArgumentError as error:
        raise InputError(_one_line(str(error))) from None
    sections = {f.name: getattr(values, f.name) for f in fields(Config)}
    others = {k: v for k, v in vars(values).items() if k not in sections and k != "config"}
    return Config(**sections), others


def load_config(arguments: Sequence[str]) -> Config:
    """The Config of a command line such as ["--config", "configs/quickstart.yaml", "--train.steps", "10"]."""
    return parse(config_parser(), arguments)[0]


def to_dict(config: Config) -> dict[str, Any]:
    """Plain sections and keys; tuples become lists, as in YAML and JSON. Addresses come without user, password and query: what is
    made of this is stored, shown and tracked.
    """
    return without_credentials(yaml.safe_load(yaml.safe_dump(_plain(asdict(config)))))


def save_config(config: Config, path: Path) -> None:
    """The YAML that a run folder keeps; whatever happens meanwhile, `path` holds this config or what it held before."""
    keep_file(path, yaml.safe_dump(to_dict(config), sort_keys=False).encode())


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of to_dict (a run folder's config.yaml, a checkpoint's trainer.json)."""
    parser = config_parser()
    try:
        parsed = parser.instantiate(parser.parse_object(values))
    except ArgumentError as error:
        raise InputError(_one_line(str(error))) from None
    return Config(**{f.name: getattr(parsed, f.name) for f in fields(Config)})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def known_keys() -> dict[str, str]:
    """Dotted key -> its type, as shown to a person."""
    hints = typing.get_type_hints(Config)
    return {
        f"{section}.{key}": _type_name(hint)
        for section, cls in hints.items()
        if is_dataclass(cls)
        for key, hint in typing.get_type_hints(cls).items()
    }


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(v) for v in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Union:
        return " | ".join("null" if a is type(None) else _type_name(a) for a in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")


def _unknown(key: str) -> Optional[str]:
    close = difflib.get_close_matches(key, list(known_keys()), 3, 0.5)
    return f"unknown key {key}: " + (
        f"did you mean {', '.join(close)}?" if close else "`python -m pretrain train --help` lists all keys"
    )


def _one_line(message: str) -> str:
    """jsonargparse's message as one line that names the key, what is allowed and what was given."""
    text = " ".join(message.split())
    keys = known_keys()
    if found := re.search(r"unrecognized arguments: --([\w.]+)", text):
        return f"config: {_unknown(found[1])}"
    if found := re.search(r"Group '([\w.]+)' does not accept (?:nested key|option) '([\w.]+)'", text):
        return f"config: {_unknown(f'{found[1]}.{found[2]}')}"
    if found := re.search(r'Parser key "([\w.]+)":? (.*?)Got value: (.*)', text):
        if found[1] in keys:
            return f"config: {found[1]} must be {keys[found[1]]}, got {found[3].strip()[:80]}"
    if found := re.search(r"does not accept (?:nested key|option) '([\w.]+)'|[Kk]ey '([\w.]+)' is not expected", text):
        return f"config: {_unknown(found[1] or found[2])}"
    return f"config: {text[:300]}"
