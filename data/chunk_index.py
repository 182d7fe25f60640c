"""The index of chunks: where each lies in its tar and what it holds. docs/format.md draws it.

One int64 array [6, chunks] with a row for each of ROWS: beside every tar (`shard-000000.index.npy`, token numbers count from
the shard's start) and one for the whole set (`index.npy`, token numbers count from the set's start), which readers map
into memory, so that all processes of a host share one copy.
"""

from __future__ import annotations

import hashlib
import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.durable import write_durably
from data.manifest import INDEX_FILE, ITEM_BYTES, ShardEntry

TAR_BLOCK = 512
NPY_HEADER_BYTES = 128  # numpy pads the header of any array that this format holds to this
ROWS = ("token_start", "offset", "pieces", "document_ends", "spans", "crc32")
TOKEN_START, OFFSET, PIECES, DOCUMENT_ENDS, SPANS, CRC32 = range(len(ROWS))
SPAN_FIELDS = 3  # start, length, kind
PROMPT, CONDITION, PADDING = range(3)  # kinds of spans
SPAN_KINDS = ("prompt", "condition", "padding")
# What numpy writes for the arrays of this format. A pattern, so that nothing from disk is ever evaluated.
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|>=]?[a-zA-Z]\d{0,4})', 'fortran_order': (False|True), 'shape': \(([0-9, ]{0,60})\), \} *\n"
)


class Payloads(NamedTuple):
    """Byte offsets in the tar of the numbers of one chunk's members, behind their npy headers."""

    tokens: int
    lengths: int
    spans: int
    end: int


def payloads(offset: int, tokens: int, pieces: int, spans: int, dtype: str) -> Payloads:
    """Where the members of a chunk lie whose token payload begins at `offset`: tok.npy, lens.npy, spans.npy if it has spans.

    `end` is the first byte behind the last of these members, padding to full tar blocks included.
    """
    lengths = _next_payload(offset, tokens * ITEM_BYTES[dtype])
    after = _next_payload(lengths, pieces * 4)
    last, size = (after, spans * SPAN_FIELDS * 4) if spans else (lengths, pieces * 4)
    return Payloads(offset, lengths, after, _member_end(last, size))


def checksum(tokens: bytes | memoryview, lengths: bytes, spans: bytes) -> int:
    """CRC-32 over the numbers of a chunk's tokens, lengths and spans, in this order, as they lie in the tar."""
    return zlib.crc32(spans, zlib.crc32(lengths, zlib.crc32(tokens)))


def write_set_index(folder: Path, shards: Sequence[ShardEntry]) -> str:
    """Joins the indexes of finished shards to FOLDER/index.npy; its sha256. The bytes depend on the shards alone."""
    parts, first = [], 0
    for shard in shards:
        part = np.load(folder / shard.index_file, allow_pickle=False)
        part[TOKEN_START] += first
        parts.append(part)
        first += shard.tokens
    content = npy_bytes(np.concatenate(parts, axis=1))
    write_durably(folder / INDEX_FILE, content)
    return hashlib.sha256(content).hexdigest()


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as an .npy file, whose header is NPY_HEADER_BYTES long."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    content = buffer.getvalue()
    if len(content) - array.nbytes != NPY_HEADER_BYTES:
        raise RuntimeError(
            f"numpy wrote a header of {len(content) - array.nbytes} bytes where the index counts on {NPY_HEADER_BYTES}"
        )
    return content


def read_npy_header(content: bytes) -> tuple[str, tuple[int, ...]]:
    """(dtype as numpy writes it, shape) from the first NPY_HEADER_BYTES of an .npy file; nothing is evaluated or allocated.

    Raises ValueError, saying why, for anything but a version 1.0 header of this length over plain numbers in C order.
    """
    if len(content) != NPY_HEADER_BYTES or content[:10] != b"\x93NUMPY\x01\x00" + (NPY_HEADER_BYTES - 10).to_bytes(
        2, "little"
    ):
        raise ValueError("no npy header of the usual length")
    found = _NPY_HEADER.fullmatch(content, 10)
    if not found:
        objects = b"'|O" in content or b"'O" in content
        raise ValueError("an npy header of pickled objects" if objects else "an unusual npy header")
    if found[1].lstrip(b"<|>=")[:1] == b"O":
        raise ValueError("an npy header of pickled objects")
    if found[2] == b"True":
        raise ValueError("an npy header in Fortran order")
    sizes = [size.strip() for size in found[3].split(b",") if size.strip()]
    if any(not size.isdigit() or len(size) > 18 for size in sizes):
        raise ValueError("an npy header with an impossible shape")
    return found[1].decode("ascii"), tuple(int(size) for size in sizes)


def _member_end(payload: int, size: int) -> int:
    return payload + size + -(NPY_HEADER_BYTES + size) % TAR_BLOCK


def _next_payload(payload: int, size: int) -> int:
    return _member_end(payload, size) + TAR_BLOCK + NPY_HEADER_BYTES
