"""What a study reads: how many tokens there are, which data it is, and parts of a set with fewer unique tokens."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from data.errors import InputError
from data.manifest import MANIFEST_FILE, TOTALS, Manifest, read_manifest
from data.permutation import Permutation
from pretrain.addresses import plain_address
from pretrain.config import Config

CLOSE_ENOUGH = 0.2  # how far a part of whole shards may be from the unique tokens asked for
SMALLEST_SHARD = 1000  # tokens, that a set is advised to be prepared with


@dataclass(frozen=True)
class Corpus:
    """tokens: of the training set, None where it is not known (remote). fingerprint: identifies training and validation data,
    wherever they lie. unseen: what could not be looked at. manifest: of the training set if it is one folder.
    """

    tokens: Optional[int]
    fingerprint: str
    unseen: tuple[str, ...] = ()
    manifest: Optional[Manifest] = None


def look_at(config: Config) -> Corpus:
    """Reads the manifests; an address counts by its name alone. InputError if a folder is none."""
    given = config.data.shards
    entries = [{"path": given}] if isinstance(given, str) else given
    tokens: Optional[int] = 0
    parts: list[object] = []
    unseen = []
    manifest = None
    if not all(entry.get("path") for entry in entries):
        raise InputError("data.shards: every source needs a `path`, the folder or address of a shard set")
    sources = [("data.shards", str(entry["path"]), entry) for entry in entries]
    for key, path, entry in [*sources, ("data.val_shards", config.data.val_shards, {})]:
        about = {name: entry[name] for name in sorted(entry) if name != "path" and entry[name] is not None}
        if "://" in path:
            unseen.append(f"{key} ({plain_address(path)}) is remote: its tokens are not known before the first cell")
            parts.append([plain_address(path), about])
            tokens = None if key == "data.shards" else tokens
            continue
        try:
            found = read_manifest(Path(path))
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        parts.append([found.tokenizer_sha256, *(shard.sha256 for shard in found.shards), about])
        if key == "data.shards":
            tokens = None if tokens is None else tokens + found.tokens
            manifest = found if isinstance(given, str) else None
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Corpus(tokens, fingerprint, tuple(unseen), manifest)


def part_of(corpus: Corpus, unique: float) -> tuple[list[int], int]:
    """(numbers of shards, their tokens): whole shards with about `unique` tokens. A larger part holds every smaller one.

    InputError if the data are not one folder, or no part comes near.
    """
    if not corpus.fingerprint:  # a dry run without the data
        return [], round(unique)
    if corpus.manifest is None:
        raise InputError(
            "study.unique: data.shards must be one folder: parts of mixtures and of addresses are not made"
        )
    shards = corpus.manifest.shards
    order = Permutation(len(shards), "study/unique") if len(shards) > 1 else [0]
    chosen: list[int] = []
    best: tuple[list[int], int] = ([], 0)
    tokens = 0
    for place in range(len(shards)):
        chosen.append(order[place])
        tokens += shards[order[place]].tokens
        if not best[0] or abs(tokens - unique) < abs(best[1] - unique):
            best = (sorted(chosen), tokens)
    if abs(best[1] / unique - 1) > CLOSE_ENOUGH:
        raise InputError(
            f"study.unique {unique:g}: whole shards of data.shards make {best[1]:,} tokens at the nearest (of {corpus.tokens:,} in "
            f"{len(shards)} shards): prepare the set with smaller ones "
            f"(prepare --shard-tokens {max(int(unique / 8), SMALLEST_SHARD)})"
        )
    return best


def check_apart(corpus: Corpus, uniques: Sequence[float]) -> None:
    """InputError for two numbers of unique tokens that whole shards cannot tell apart: their cells would train the same."""
    if corpus.manifest is None or len(uniques) < 2:
        return
    shards = corpus.manifest.shards
    largest = max(shard.tokens for shard in shards)
    parts: dict[tuple[int, ...], float] = {}
    for unique in sorted(uniques):
        part, tokens = part_of(corpus, unique)
        before = parts.get(tuple(part))
        if before is None:
            parts[tuple(part)] = unique
            continue
        if len(part) == len(shards):
            advice = "leave one of them out, or prepare a larger set"
        else:
            advice = f"leave one of them out, or take values more than {largest:,} tokens (the largest shard) apart"
            if (gap := int(unique - before)) >= SMALLEST_SHARD:
                advice += f", or prepare the set with smaller shards (prepare --shard-tokens {gap})"
        raise InputError(
            f"study.unique: {_number(before)} and {_number(unique)} give the same {len(part)} whole shards ({tokens:,} tokens) "
            f"of the {len(shards)} that data.shards has ({corpus.tokens:,} tokens): {advice}"
        )


def _number(tokens: float) -> str:
    return f"{tokens:.0f}" if tokens == round(tokens) else repr(tokens)


def write_part(source: Path, shards: list[int], folder: Path) -> None:
    """A shard set of some shards of another one, at `folder`: hard links where the disk allows them. Nothing, if it is there."""
    from data.chunk_index import write_set_index

    whole = read_manifest(source)
    if (folder / MANIFEST_FILE).is_file():
        return
    entries = tuple(whole.shards[number] for number in shards)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name in [whole.tokenizer_file, *(file for entry in entries for file in (entry.file, entry.index_file))]:
            try:
                os.link(source / name, temporary / name)
            except OSError:  # another file system
                shutil.copyfile(source / name, temporary / name)
        part = replace(
            whole,
            shards=entries,
            index_sha256=write_set_index(temporary, entries),
            **{total: sum(getattr(entry, total) for entry in entries) for total in TOTALS},
        )
        (temporary / MANIFEST_FILE).write_bytes(part.to_bytes())
        temporary.rename(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): choose another study.dir") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
