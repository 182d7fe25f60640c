"""The manifest of a shard set:

what is in it, what made it, and the checks that a file from disk must pass to be believed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import InputError

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
INDEX_FILE = "index.npy"
REMEDY = "run `python -m pretrain prepare` again or copy the folder again"
ITEM_BYTES = {"uint16": 2, "uint32": 4}
# What every shard counts and the manifest adds up.
TOTALS = (
    "tokens",
    "documents",
    "split_documents",
    "truncated_documents",
    "utf8_bytes",
    "chunks",
    "spans",
    "padding_tokens",
)
# One plain name: no folder part, nothing hidden, so a manifest can never make us open a file outside its folder.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def token_dtype(vocab_size: int) -> str:
    """The narrowest stored type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class SpecialIds:
    """Token ids with a meaning of their own; `pad` is `eos` unless a set says otherwise."""

    mask: int
    eos: int
    pad: int
    bos: int | None = None


@dataclass(frozen=True)
class ShardEntry:
    """One tar: its size in bytes, its hashes, and what it holds. Documents never cross from one shard to the next.

    `tokens` counts one EOS per document, and `padding_tokens`. `spans` counts prompts, conditions and padding.
    """

    file: str
    bytes: int
    sha256: str
    index_sha256: str
    tokens: int
    documents: int
    split_documents: int
    truncated_documents: int
    utf8_bytes: int
    chunks: int
    spans: int
    padding_tokens: int

    @property
    def index_file(self) -> str:
        return self.file.removesuffix(".tar") + ".index.npy"


@dataclass(frozen=True)
class SourceCount:
    """What one source gave to this set.

    `skipped` counts by reason over the whole source, because a skipped document is in no set.
    """

    name: str
    licence: str
    documents: int
    utf8_bytes: int
    skipped: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """Everything a reader must know about one self-contained shard set.

    `tokens` counts one EOS per document; `split_documents` are stored in several pieces, `truncated_documents` lack their
    end; `row_tokens`: no document crosses a multiple of it (0: documents lie end to end); `prepared_with` holds the options
    and the input hash that determine every byte of the set.
    """

    dtype: str
    vocab_size: int
    tokenizer_file: str
    tokenizer_sha256: str
    index_sha256: str
    special: SpecialIds
    tokens: int
    documents: int
    split_documents: int
    truncated_documents: int
    utf8_bytes: int
    chunks: int
    spans: int
    padding_tokens: int
    chunk_tokens: int
    row_tokens: int
    shards: tuple[ShardEntry, ...]
    sources: tuple[SourceCount, ...]
    prepared_with: dict[str, Any]

    def to_bytes(self) -> bytes:
        """The JSON text of the manifest, the same bytes for the same content."""
        record = dataclasses.asdict(self)
        tokenizer = {"file": record.pop("tokenizer_file"), "sha256": record.pop("tokenizer_sha256")}
        record = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer} | record
        return (json.dumps(record, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check FOLDER/manifest.json.

    Raises InputError, naming file and field, when it is missing, not JSON, of another format version, lacks a field,
    disagrees with itself, or names a file that is not a plain name inside the folder.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; `python -m pretrain prepare --out ...` makes it, name its train/ or val/"
        )
    try:
        record = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        hint = f" (did you mean {folder / 'train'}?)" if (folder / "train" / MANIFEST_FILE).exists() else ""
        raise InputError(f"{path}: missing, so this is no finished shard set{hint}; {REMEDY}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); {REMEDY}") from error
    fields = _Fields(path, record)
    version = fields.take("format_version", int)
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format_version is {version}, this program reads {FORMAT_VERSION}; {REMEDY}")
    manifest = _parse(fields)
    _check(manifest, path)
    return manifest


class _Fields:
    """Typed access to one JSON object, with errors that name the file and the key."""

    def __init__(self, path: Path, record: Any, prefix: str = "") -> None:
        self.path, self.record, self.prefix = path, record, prefix
        if not isinstance(record, dict):
            raise InputError(f"{path}: {prefix or 'the top level'} must be a JSON object; {REMEDY}")

    def take(self, key: str, kind: type) -> Any:
        name = f"{self.prefix}.{key}" if self.prefix else key
        if key not in self.record:
            raise InputError(f"{self.path}: field {name} is missing; {REMEDY}")
        value = self.record[key]
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            wanted = "a whole number of at least 0" if kind is int else f"a {kind.__name__}"
            raise InputError(f"{self.path}: field {name} must be {wanted}, found {value!r:.60}; {REMEDY}")
        return value

    def inner(self, key: str) -> _Fields:
        return _Fields(self.path, self.take(key, dict), f"{self.prefix}.{key}" if self.prefix else key)

    def each(self, key: str) -> list[_Fields]:
        return [_Fields(self.path, item, f"{key}[{i}]") for i, item in enumerate(self.take(key, list))]


def _parse(fields: _Fields) -> Manifest:
    special, tokenizer = fields.inner("special"), fields.inner("tokenizer")
    shard_types = {
        f.name: str if f.name in ("file", "sha256", "index_sha256") else int for f in dataclasses.fields(ShardEntry)
    }
    source_types = {"name": str, "licence": str, "documents": int, "utf8_bytes": int, "skipped": dict}
    counts = ("vocab_size", *TOTALS, "chunk_tokens", "row_tokens")
    return Manifest(
        dtype=fields.take("dtype", str),
        tokenizer_file=tokenizer.take("file", str),
        tokenizer_sha256=tokenizer.take("sha256", str),
        index_sha256=fields.take("index_sha256", str),
        special=SpecialIds(
            **{key: special.take(key, int) for key in ("mask", "eos", "pad")},
            bos=None if special.record.get("bos") is None else special.take("bos", int),
        ),
        shards=tuple(
            ShardEntry(**{k: shard.take(k, t) for k, t in shard_types.items()}) for shard in fields.each("shards")
        ),
        sources=tuple(
            SourceCount(**{k: source.take(k, t) for k, t in source_types.items()}) for source in fields.each("sources")
        ),
        prepared_with=fields.take("prepared_with", dict),
        **{key: fields.take(key, int) for key in counts},
    )


def _check(manifest: Manifest, path: Path) -> None:
    """Raise InputError for the first thing in the manifest that contradicts another or could do harm."""

    def refuse(what: str) -> None:
        raise InputError(f"{path}: {what}; {REMEDY}")

    if manifest.dtype not in ITEM_BYTES:
        refuse(f"dtype is {manifest.dtype!r}, allowed are {' and '.join(ITEM_BYTES)}")
    room = 1 << (8 * ITEM_BYTES[manifest.dtype])
    if not 0 < manifest.vocab_size <= room:
        refuse(f"vocab_size {manifest.vocab_size} does not fit dtype {manifest.dtype}, which holds 1 to {room}")
    for name, value in dataclasses.asdict(manifest.special).items():
        if value is not None and value >= manifest.vocab_size:
            refuse(f"special.{name} is {value}, outside the vocabulary of {manifest.vocab_size}")
    if manifest.special.mask in (manifest.special.eos, manifest.special.pad, manifest.special.bos):
        refuse(f"special.mask is {manifest.special.mask}, the same as eos, pad or bos; the mask needs an id of its own")
    for file in [manifest.tokenizer_file, *(shard.file for shard in manifest.shards)]:
        if not _PLAIN_NAME.fullmatch(file):
            refuse(f"file name {file!r} is not a plain name inside this folder")
    for shard in manifest.shards:
        if not shard.file.endswith(".tar"):
            refuse(f"shard {shard.file!r} does not end in .tar")
    repeated = [file for file, count in Counter(shard.file for shard in manifest.shards).items() if count > 1]
    if repeated:
        refuse(f"shard {repeated[0]} is listed twice")
    for total in TOTALS:
        of_shards = sum(getattr(shard, total) for shard in manifest.shards)
        if of_shards != getattr(manifest, total):
            refuse(f"{total} is {getattr(manifest, total)} but the shards add up to {of_shards}")
    if manifest.tokens == 0:
        refuse("the set holds no tokens")
    if manifest.row_tokens and manifest.tokens % manifest.row_tokens:
        refuse(f"{manifest.tokens} tokens are no whole rows of row_tokens {manifest.row_tokens}")
