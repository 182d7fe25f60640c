"""Prove that the files of a shard set are the ones its manifest describes."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np

from data.errors import InputError
from data.manifest import ITEM_BYTES, REMEDY, Manifest, ShardEntry
from data.shard_writer import NPY_HEADER_BYTES, TAR_BLOCK, token_member_bytes


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """Raise InputError unless the set's tokenizer file is the one that made its tokens."""
    path = folder / manifest.tokenizer_file
    try:
        found = file_sha256(path)
    except OSError as error:
        raise InputError(f"{path}: the tokenizer of this set cannot be read ({error.strerror}); {REMEDY}") from error
    if found != manifest.tokenizer_sha256:
        raise InputError(f"{path}: differs from the tokenizer that made these tokens (sha256 {found:.12}); {REMEDY}")


def read_index(folder: Path, shard: ShardEntry, dtype: str) -> np.ndarray:
    """The sidecar index of a shard, int64 [chunks, 3]: byte offset of the token payload, tokens, document ends.

    Raises InputError when it is missing, changed, ill-shaped, points outside the tar or does not add up to the
    manifest.
    """
    path = folder / shard.index_file

    def refuse(what: str) -> None:
        raise InputError(f"{path}: {what}; {REMEDY}")

    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the index of {shard.file} cannot be read ({error.strerror}); {REMEDY}") from error
    try:
        index = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a readable index ({error!s:.80}); {REMEDY}") from error
    if index.dtype != np.int64 or index.shape != (shard.chunks, 3):
        refuse(f"the index is {index.dtype} {list(index.shape)}, the manifest wants int64 [{shard.chunks}, 3]")
    offsets, tokens, documents = index.T
    if (tokens <= 0).any() or (documents < 0).any():
        refuse("a chunk has no tokens or a negative number of documents")
    if int(tokens.sum()) != shard.tokens or int(documents.sum()) != shard.documents:
        refuse(
            f"{tokens.sum()} tokens and {documents.sum()} documents,"
            f" the manifest says {shard.tokens} and {shard.documents}"
        )
    ends = offsets + tokens * ITEM_BYTES[dtype]
    first = TAR_BLOCK + NPY_HEADER_BYTES
    if (offsets[:1] < first).any() or (offsets[1:] < ends[:-1] + first).any() or (ends > shard.bytes).any():
        refuse(f"an offset lies outside {shard.file} or inside another chunk")
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        refuse("the index was changed after the manifest was written")
    return index


def check_shard(
    folder: Path, shard: ShardEntry, index: np.ndarray, dtype: str, depth: Literal["size", "headers", "full"]
) -> None:
    """Raise InputError unless the tar has the manifest's size and, for more `depth`, good headers or the very bytes."""
    path = folder / shard.file
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            state = "cut short" if size < shard.bytes else "too long"
            raise InputError(f"{path}: {state}, {size} bytes where the manifest says {shard.bytes}; {REMEDY}")
        if depth == "full" and file_sha256(path) != shard.sha256:
            raise InputError(f"{path}: its content was changed or damaged (sha256 differs from the manifest); {REMEDY}")
        if depth == "headers":
            with open(path, "rb") as file:
                for chunk in (0, shard.chunks - 1):
                    _check_token_header(path, file, chunk, index[chunk], dtype)
    except OSError as error:
        raise InputError(f"{path}: the shard cannot be read ({error.strerror}); {REMEDY}") from error


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_token_header(path: Path, file: io.BufferedIOBase, chunk: int, row: np.ndarray, dtype: str) -> None:
    """The tar and npy headers before a payload must announce exactly the tokens that the index counts."""
    offset, tokens = int(row[0]), int(row[1])
    file.seek(offset - NPY_HEADER_BYTES - TAR_BLOCK)
    try:
        member = tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), "utf-8", "strict")
        npy = io.BytesIO(file.read(NPY_HEADER_BYTES))
        version = np.lib.format.read_magic(npy)
        shape, _, stored = np.lib.format.read_array_header_1_0(npy) if version == (1, 0) else (None, None, None)
    except (tarfile.HeaderError, ValueError) as error:
        raise InputError(f"{path}: no tar member where chunk {chunk} should start ({error!s:.80}); {REMEDY}") from error
    good_member = member.name.endswith(".tok.npy") and member.size == token_member_bytes(tokens, dtype)
    if not good_member or shape != (tokens,) or stored != np.dtype(dtype).newbyteorder("<"):
        raise InputError(
            f"{path}: chunk {chunk} is {member.name!r} with shape {shape},"
            f" the index says {tokens} {dtype} tokens; {REMEDY}"
        )
