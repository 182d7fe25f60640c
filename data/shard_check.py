"""Prove that the files of a shard set are the ones its manifest describes."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, NoReturn

import numpy as np

from data.chunk_index import (
    DOCUMENT_ENDS,
    NPY_HEADER_BYTES,
    OFFSET,
    PIECES,
    ROWS,
    SPAN_FIELDS,
    SPANS,
    TAR_BLOCK,
    TOKEN_START,
    read_npy_header,
)
from data.errors import InputError
from data.manifest import INDEX_FILE, ITEM_BYTES, REMEDY, Manifest, ShardEntry
from data.shard_writer import token_member_bytes
from data.tar_member import read_member

Depth = Literal["size", "headers", "full"]
BEFORE_PAYLOAD = TAR_BLOCK + NPY_HEADER_BYTES
ROWS_AT_ONCE = 1 << 18  # index rows checked together: a few MB of temporary arrays, however large the set
MOST_BYTES = 1 << 50  # of one shard; keeps every sum of the index far from the end of int64
# A network file system answers one question in about a millisecond, but many at the same time: then threads help. Where a file
# is at hand in microseconds they would only be in each other's way.
CHECKS_AT_ONCE, SLOW_SECONDS, FEW_SHARDS = 16, 5e-4, 32
WORTH_A_THREAD = 64 << 20  # bytes to hash; hashing lets other threads run


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """Raise InputError unless the set's tokenizer file is the one that made its tokens."""
    path = folder / manifest.tokenizer_file
    try:
        found = file_sha256(path)
    except OSError as error:
        raise InputError(f"{path}: the tokenizer of this set cannot be read ({error.strerror}); {REMEDY}") from error
    if found != manifest.tokenizer_sha256:
        raise InputError(f"{path}: differs from the tokenizer that made these tokens (sha256 {found:.12}); {REMEDY}")


def check_counts(path: Path, manifest: Manifest) -> None:
    """Raise InputError, naming the manifest at `path`, for a shard whose counts cannot be true together."""
    item = ITEM_BYTES[manifest.dtype]
    for shard in manifest.shards:
        if not (
            shard.bytes <= MOST_BYTES
            and 1 <= shard.chunks <= shard.tokens
            and shard.tokens * item <= shard.bytes
            and max(shard.documents, shard.spans, shard.padding_tokens) <= shard.tokens
        ):
            raise InputError(f"{path}: the counts of shard {shard.file} cannot be true together; {REMEDY}")


def map_index(path: Path, chunks: int) -> np.ndarray:
    """An index file of `chunks` chunks, int64 [6, chunks] (data.chunk_index), mapped into memory read-only.

    Raises ValueError, saying why, when the file is anything else; OSError when it cannot be read.
    """
    with open(path, "rb") as file:
        dtype, shape = read_npy_header(file.read(NPY_HEADER_BYTES))
        size = os.fstat(file.fileno()).st_size
        wanted = (len(ROWS), chunks)
        if dtype != "<i8" or shape != wanted:
            raise ValueError(f"the index is {dtype} {list(shape)}, the manifest wants <i8 {list(wanted)}")
        if size != NPY_HEADER_BYTES + 8 * len(ROWS) * chunks:
            raise ValueError(f"not a readable index, {size} bytes are too few or too many for its shape")
        # A plain array: the memmap class makes every slice of it slow, and a reader takes one at each read.
        return np.asarray(np.memmap(file, dtype="<i8", mode="r", offset=NPY_HEADER_BYTES, shape=wanted))


def read_set_index(folder: Path, manifest: Manifest, full: bool) -> np.ndarray:
    """The index of a whole set, int64 [6, chunks] (data.chunk_index), mapped into memory: processes of a host share it.

    Raises InputError when it is missing, ill-shaped, points outside its tars or does not add up to the manifest; with `full`
    also when a byte was changed.
    """
    path = folder / INDEX_FILE

    def refuse(what: str) -> NoReturn:
        raise InputError(f"{path}: {what}; {REMEDY}")

    try:
        if full and path.is_file() and file_sha256(path) != manifest.index_sha256:
            refuse("the index was changed after the manifest was written")
        index = map_index(path, manifest.chunks)
    except OSError as error:
        raise InputError(f"{path}: the index of this set cannot be read ({error.strerror}); {REMEDY}") from error
    except InputError:
        raise
    except ValueError as error:
        refuse(f"{error}" if "index" in str(error) else f"not a readable index ({error})")
    for fault in index_faults(index, manifest):
        refuse(fault)
    return index


def index_faults(index: np.ndarray, manifest: Manifest) -> Iterator[str]:
    """What in the index of a set contradicts its manifest or points outside the tars; nothing if it may be used as it is."""
    shards = manifest.shards
    ends = np.cumsum([shard.chunks for shard in shards])
    firsts = ends - [shard.chunks for shard in shards]
    sizes = np.array([shard.bytes for shard in shards])
    item = ITEM_BYTES[manifest.dtype]
    for begin in range(0, manifest.chunks, ROWS_AT_ONCE):
        end = min(begin + ROWS_AT_ONCE, manifest.chunks)
        starts, offset, pieces, document_ends, spans, crc32 = (index[row, begin:end] for row in range(len(ROWS)))
        following = index[TOKEN_START, begin + 1 : end + 1]
        after = np.append(following, manifest.tokens) if end == manifest.chunks else following
        if (starts < 0).any() or (after > manifest.tokens).any() or (after <= starts).any():
            yield "a chunk has no tokens, or tokens that the set does not have"
            return
        tokens = after - starts
        if (
            (pieces < 1).any()
            or (pieces > tokens).any()
            or (document_ends < 0).any()
            or (document_ends > pieces).any()
            or (spans < 0).any()
            or (spans > tokens).any()
            or (crc32 < 0).any()
            or (crc32 >> 32).any()
        ):
            yield "a chunk has a count of documents or spans, or a checksum, that cannot be"
            return
        shard = np.searchsorted(ends, np.arange(begin, end), side="right")
        room = sizes[shard]  # the byte before which the members of a chunk must end
        room[:-1] = np.where(shard[1:] == shard[:-1], offset[1:] - BEFORE_PAYLOAD, room[:-1])
        if end < manifest.chunks and end != ends[shard[-1]]:
            room[-1] = index[OFFSET, end] - BEFORE_PAYLOAD
        if (
            (offset < BEFORE_PAYLOAD).any()
            or (offset > sizes[shard]).any()
            or (last_byte(index, begin, end, tokens * item) > room).any()
        ):
            yield "an offset lies outside its shard or inside another chunk"
            return
    shard_starts = np.cumsum([0, *(shard.tokens for shard in shards[:-1])])
    if (index[TOKEN_START][firsts] != shard_starts).any():
        yield "shards do not hold the tokens that the manifest says"
    for row, total in ((DOCUMENT_ENDS, "documents"), (SPANS, "spans")):
        found = np.add.reduceat(index[row], firsts)
        for number in np.flatnonzero(found != [getattr(shard, total) for shard in shards])[:1]:
            wanted = getattr(shards[number], total)
            yield f"{found[number]} {total} in {shards[number].file}, the manifest says {wanted}"


def last_byte(index: np.ndarray, begin: int, end: int, token_bytes: np.ndarray) -> np.ndarray:
    """int64 [end - begin]: the first byte behind the numbers of tokens, lengths and spans of chunks [begin, end).

    data.chunk_index.payloads for many chunks; token_bytes: int64 [end - begin].
    """

    def behind(payload: np.ndarray, size: np.ndarray) -> np.ndarray:
        return payload + size + -(NPY_HEADER_BYTES + size) % TAR_BLOCK + BEFORE_PAYLOAD

    pieces, spans = index[PIECES, begin:end], index[SPANS, begin:end]
    lengths = behind(index[OFFSET, begin:end], token_bytes)
    return np.where(spans > 0, behind(lengths, pieces * 4) + spans * SPAN_FIELDS * 4, lengths + pieces * 4)


class Stamp(NamedTuple):
    """What tells a file from another that takes its place: size in bytes, time of the last change, inode."""

    size: int
    changed: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def check_shards(
    folder: Path, manifest: Manifest, index: np.ndarray, depth: Depth
) -> tuple[list[Stamp], dict[int, str]]:
    """The stamp of every tar, and {shard number: what is wrong} of the bad ones (whose stamp says nothing)."""
    ends = np.cumsum([shard.chunks for shard in manifest.shards])
    lasts = ends - 1
    firsts = ends - [shard.chunks for shard in manifest.shards]
    # One column for each shard: offset and tokens of its first and of its last chunk.
    rows = [
        row
        for at in (firsts, lasts)
        for row in (index[OFFSET][at], _after(index, at, manifest.tokens) - index[TOKEN_START][at])
    ]
    ends_of = list(zip(*(row.tolist() for row in rows)))
    where = os.fspath(folder) + os.sep

    def check(number: int) -> tuple[Stamp, str]:
        shard = manifest.shards[number]
        first_offset, first_tokens, offset, tokens = ends_of[number]
        chunks = ((0, first_offset, first_tokens), (shard.chunks - 1, offset, tokens))[: shard.chunks]
        return check_shard(where + shard.file, shard, chunks, manifest.dtype, depth)

    numbers = range(len(manifest.shards))
    begun = time.monotonic()
    few = FEW_SHARDS if depth != "full" else 0
    results = list(map(check, numbers[:few]))
    if depth == "full":
        threads = len(os.sched_getaffinity(0)) if sum(s.bytes for s in manifest.shards) > WORTH_A_THREAD else 1
    else:
        threads = CHECKS_AT_ONCE if time.monotonic() - begun > FEW_SHARDS * SLOW_SECONDS else 1
    if threads > 1 and len(numbers) > few + 1:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            results += pool.map(check, numbers[few:])
    else:
        results += map(check, numbers[few:])
    return [stamp for stamp, _ in results], {n: fault for n, (_, fault) in zip(numbers, results) if fault}


def _after(index: np.ndarray, chunks: np.ndarray, tokens: int) -> np.ndarray:
    """The token behind each of `chunks`."""
    last = chunks == index.shape[1] - 1
    return np.where(last, tokens, index[TOKEN_START][np.where(last, 0, chunks + 1)])


def check_shard(
    path: str, shard: ShardEntry, chunks: tuple[tuple[int, int, int], ...], dtype: str, depth: Depth
) -> tuple[Stamp, str]:
    """The stamp of a tar and what is wrong with it: its size and, for more `depth`, the first headers or every byte.

    chunks: (number in the shard, payload offset in bytes, tokens) of the chunks whose headers are read.
    """
    try:
        stamp = Stamp.of(os.stat(path))
        if stamp.size != shard.bytes:
            state = "cut short" if stamp.size < shard.bytes else "too long"
            return stamp, f"{state}, {stamp.size} bytes where the manifest says {shard.bytes}"
        if depth == "full" and file_sha256(path) != shard.sha256:
            return stamp, "its content was changed or damaged (sha256 differs from the manifest)"
        if depth == "headers":
            with open(path, "rb", buffering=0) as file:
                for number, offset, tokens in chunks:
                    fault = _token_header_fault(file.fileno(), number, offset, tokens, dtype)
                    if fault:
                        return stamp, fault
        return stamp, ""
    except OSError as error:
        return Stamp(0, 0, 0), f"the shard cannot be read ({error.strerror})"


def file_sha256(file: str | Path | BinaryIO) -> str:
    """Hex sha256 of a file, or of what is left to read of an open one, read in pieces."""
    if isinstance(file, (str, Path)):
        with open(file, "rb", buffering=0) as opened:
            return file_sha256(opened)  # type: ignore[arg-type]
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _token_header_fault(file: int, chunk: int, offset: int, tokens: int, dtype: str) -> str:
    """The tar and npy headers before a payload must announce exactly the tokens that the index counts."""
    headers = os.pread(file, BEFORE_PAYLOAD, offset - BEFORE_PAYLOAD)
    try:
        member = read_member(headers[:TAR_BLOCK])
        stored, shape = read_npy_header(headers[TAR_BLOCK:])
    except ValueError as error:
        return f"no tar member where chunk {chunk} should start ({error})"
    good_member = member.name.endswith(".tok.npy") and member.size == token_member_bytes(tokens, dtype)
    if member.fault or not good_member or shape != (tokens,) or stored != np.dtype(dtype).newbyteorder("<").str:
        return f"chunk {chunk} is {member.name!r:.60} with shape {list(shape)}, the index says {tokens} {dtype} tokens"
    return ""
