"""Check the numbers of one chunk: headers, checksum, lengths, spans, ids, ends of documents, rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data.chunk_index import NPY_HEADER_BYTES, PADDING, SPAN_FIELDS, checksum, read_npy_header
from data.chunk_layout import span_fault
from data.manifest import SpecialIds
from data.verify_tar import Placed, Sample

MOST_META_BYTES = 1 << 28


class Rules(NamedTuple):
    """What of the manifest the numbers must keep to."""

    dtype: str
    vocab_size: int
    special: SpecialIds
    row_tokens: int


class Row(NamedTuple):
    """A chunk's column of the index; `tokens` is the difference to the next."""

    token_start: int
    offset: int
    pieces: int
    document_ends: int
    spans: int
    crc32: int
    tokens: int


class Counts(NamedTuple):
    """What was found in a chunk, to be added up and compared with the manifest; `ended`: pieces that end in EOS."""

    tokens: int = 0
    spans: int = 0
    padding_tokens: int = 0
    ended: int = 0


def check_chunk(file: int, sample: Sample, row: Row, rules: Rules, truncated: bool) -> tuple[Counts, list[str]]:
    """What the chunk holds, and everything in it that breaks a rule or contradicts its `row`; nothing is extracted.

    file: descriptor of the tar. truncated: the shard has documents whose end was cut off, EOS included.
    """
    faults: list[str] = []
    arrays = []
    for suffix, dtype, shape in (
        ("tok.npy", np.dtype(rules.dtype).newbyteorder("<"), (row.tokens,)),
        ("lens.npy", np.dtype("<i4"), (row.pieces,)),
        ("spans.npy", np.dtype("<i4"), (row.spans, SPAN_FIELDS)),
    ):
        if suffix == "spans.npy" and not row.spans:
            if suffix in sample.members:
                faults.append(f"{sample.key}.{suffix} is there, the index counts no spans")
            arrays.append(np.zeros((0, SPAN_FIELDS), dtype))
        elif suffix not in sample.members:
            faults.append(f"{sample.key}.{suffix} is missing, the index counts {shape[0]} numbers")
        else:
            try:
                arrays.append(_array(file, sample.members[suffix], dtype, shape))
            except ValueError as error:
                faults.append(f"{sample.key}.{suffix}: {error}")
    if "meta.json" in sample.members:
        faults += _meta_faults(file, sample.members["meta.json"], row.pieces)
    if len(arrays) < 3:
        return Counts(), faults
    tokens, lengths, spans = arrays
    if checksum(tokens.tobytes(), lengths.tobytes(), spans.tobytes()) != row.crc32:
        faults.append(f"sample {sample.key}: its numbers do not have the checksum of the index")
    if tokens.max() >= rules.vocab_size:
        count = int((tokens >= rules.vocab_size).sum())
        faults.append(
            f"{sample.key}.tok.npy: {count} ids outside the vocabulary of {rules.vocab_size} (as {tokens.max()})"
        )
    problem = span_fault(spans, row.tokens) if len(spans) else ""
    if problem:
        faults.append(f"sample {sample.key} {problem}")
    if lengths.min() < 1 or lengths.sum(dtype=np.int64) != row.tokens:
        faults.append(f"{sample.key}.lens.npy: the lengths do not sum to the {row.tokens} tokens")
    elif not problem:
        ended, more = _document_faults(tokens, lengths, spans, row, rules, truncated)
        padding = int(spans[spans[:, 2] == PADDING, 1].sum())
        return Counts(row.tokens, row.spans, padding, ended), faults + [
            f"sample {sample.key}: {fault}" for fault in more
        ]
    return Counts(row.tokens, row.spans), faults


def _array(file: int, placed: Placed, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of a member. Its size is compared before a byte is allocated, so a shape that lies costs nothing."""
    size = int(np.prod(shape)) * dtype.itemsize
    stored, found = read_npy_header(os.pread(file, NPY_HEADER_BYTES, placed.payload))
    if stored != dtype.str or found != shape:
        raise ValueError(f"{stored} {list(found)}, it should be {dtype.str} {list(shape)}")
    if placed.member.size != NPY_HEADER_BYTES + size:
        raise ValueError(f"{placed.member.size} bytes, its header and numbers take {NPY_HEADER_BYTES + size}")
    content = os.pread(file, size, placed.payload + NPY_HEADER_BYTES)
    if len(content) != size:
        raise ValueError("cut short")
    return np.frombuffer(content, dtype).reshape(shape)


def _meta_faults(file: int, placed: Placed, pieces: int) -> Iterator[str]:
    name = placed.member.name
    if placed.member.size > MOST_META_BYTES:
        yield f"{name}: {placed.member.size} bytes are more than anyone knows about a chunk"
        return
    try:
        meta = json.loads(os.pread(file, placed.member.size, placed.payload))
    except (ValueError, RecursionError) as error:
        yield f"{name}: not JSON ({error!s:.60})"
        return
    if not isinstance(meta, list) or len(meta) != pieces or any(type(m) not in (dict, type(None)) for m in meta):
        yield f"{name}: not a list with an object or null for each of {pieces} pieces"


def _document_faults(
    tokens: np.ndarray, lengths: np.ndarray, spans: np.ndarray, row: Row, rules: Rules, truncated: bool
) -> tuple[int, list[str]]:
    """How many documents end in EOS, and what is wrong with ends, padding and rows."""
    faults = []
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    padding = spans[spans[:, 2] == PADDING].astype(np.int64)
    piece = np.minimum(np.searchsorted(begins, padding[:, 0]), len(begins) - 1)
    whole = (begins[piece] == padding[:, 0]) & (lengths[piece] == padding[:, 1])
    if len(padding) and not rules.row_tokens:
        faults.append("padding in a set without rows")
    elif not whole.all():
        faults.append("padding that is not a piece of its own")
    is_padding = np.zeros(len(lengths), bool)
    is_padding[piece[whole]] = True
    filler = np.repeat(is_padding, lengths)
    if (tokens[filler] != rules.special.pad).any():
        faults.append(f"padding with other ids than {rules.special.pad}")
    ended = int((~is_padding & (tokens[ends - 1] == rules.special.eos)).sum())
    if ended > row.document_ends or (ended < row.document_ends and not truncated):
        faults.append(f"{ended} documents end in EOS ({rules.special.eos}), the index counts {row.document_ends}")
    if rules.row_tokens:
        first, last = row.token_start + begins, row.token_start + ends - 1
        crossing = int((first // rules.row_tokens != last // rules.row_tokens).sum())
        if crossing:
            faults.append(f"{crossing} pieces cross the end of a row of {rules.row_tokens} tokens")
    return ended, faults
