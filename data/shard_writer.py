"""Write token documents as tar shards that vanilla webdataset reads, each with a sidecar index for random access.

A sample is a chunk of whole documents, laid end to end; docs/format.md has the members. The bytes depend on the documents
alone: names are fixed, times and owners are zero.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from data.chunk_index import NPY_HEADER_BYTES, PADDING, SPAN_FIELDS, TAR_BLOCK, checksum, npy_bytes
from data.durable import fsync_folder, write_durably
from data.manifest import ITEM_BYTES, ShardEntry
from data.row_packing import RowPacking, pack_rows

TAR_RECORD = 20 * TAR_BLOCK  # tar archives end on a full record of zeros
NO_SPANS = np.zeros((0, SPAN_FIELDS), np.int32)


class Piece(NamedTuple):
    """A document, or a part of one: its ids, its spans ([k, 3]: start in the piece, length, kind), what is known about it."""

    tokens: np.ndarray
    spans: np.ndarray
    meta: Optional[Mapping[str, Any]]


class ShardWriter:
    """Cuts a stream of documents into chunks and shards.

    A chunk closes at the first piece end at or after `chunk_tokens`; a document longer than `piece_tokens` is cut into
    pieces of that length, of which only the last ends in EOS. A shard closes at the first document end at which its chunks
    hold `shard_tokens`, and a chunk begun closes with it: a document lies in one shard and a writer can go on after any
    finished shard.

    With `row_tokens` the pieces of a chunk are laid out in rows of that length, none across a row's end, and what is left of
    a row is a piece of `pad_id` marked as padding.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        chunk_tokens: int,
        shard_tokens: int,
        piece_tokens: Optional[int] = None,
        row_tokens: int = 0,
        row_packing: RowPacking = "fill",
        pad_id: int = 0,
        finished: Sequence[ShardEntry] = (),
        on_shard: Callable[[ShardEntry], None] = lambda entry: None,
    ) -> None:
        """Go on after the `finished` shards in `folder`; `on_shard` is called once a further one is safely on disk.

        piece_tokens: `chunk_tokens` unless given, and at most `row_tokens` if there are rows.
        """
        self.folder, self.dtype = folder, np.dtype(dtype).newbyteorder("<")
        self.chunk_tokens, self.shard_tokens = chunk_tokens, shard_tokens
        self.piece_tokens = min(piece_tokens or chunk_tokens, chunk_tokens, row_tokens or chunk_tokens)
        self.row_tokens, self.row_packing, self.pad_id = row_tokens, row_packing, pad_id
        self.entries = list(finished)
        self._on_shard = on_shard
        self._shard: _OpenShard | None = None
        self._pieces: list[Piece] = []
        self._pending_tokens = 0
        self._pending_ends = 0

    def add_document(
        self,
        tokens: np.ndarray,
        utf8_bytes: int,
        spans: np.ndarray = NO_SPANS,
        meta: Optional[Mapping[str, Any]] = None,
        truncated: bool = False,
    ) -> None:
        """Append one document: its ids (1-D), the closing EOS included (but if `truncated`), and its text's size in bytes.

        spans: int32 [k, 3] (start, length, kind), in order and apart. meta: anything JSON can say, kept beside the tokens.
        """
        if self._shard is None:
            self._shard = _OpenShard(self.folder, len(self.entries))
        shard = self._shard
        starts = range(0, len(tokens), self.piece_tokens)
        for start in starts:
            piece = tokens[start : start + self.piece_tokens].astype(self.dtype, copy=False)
            inside = clip_spans(spans, start, len(piece)) if len(spans) else NO_SPANS
            self._pieces.append(Piece(piece, inside, meta))
            self._pending_tokens += len(piece)
            self._pending_ends += start == starts[-1]
            if self._pending_tokens >= self.chunk_tokens:
                self._close_chunk(shard)
        shard.counts["documents"] += 1
        shard.counts["split_documents"] += len(starts) > 1
        shard.counts["truncated_documents"] += truncated
        shard.counts["utf8_bytes"] += utf8_bytes
        if shard.counts["tokens"] >= self.shard_tokens:
            if self._pieces:
                self._close_chunk(shard)
            self._close_shard(shard)

    def close(self) -> list[ShardEntry]:
        """Write what is pending, short as it may be, and give the entries of all shards in order."""
        if self._shard is not None:
            if self._pieces:
                self._close_chunk(self._shard)
            self._close_shard(self._shard)
        return self.entries

    def _close_chunk(self, shard: _OpenShard) -> None:
        shard.write_chunk(self._in_rows() if self.row_tokens else self._pieces, self._pending_ends)
        self._pieces, self._pending_tokens, self._pending_ends = [], 0, 0

    def _in_rows(self) -> list[Piece]:
        """The pending pieces row after row, with padding behind each row that they do not fill."""
        laid_out: list[Piece] = []
        for row in pack_rows([len(piece.tokens) for piece in self._pieces], self.row_tokens, self.row_packing):
            laid_out += [self._pieces[at] for at in row]
            left = self.row_tokens - sum(len(self._pieces[at].tokens) for at in row)
            if left:
                spans = np.array([[0, left, PADDING]], np.int32)
                laid_out.append(Piece(np.full(left, self.pad_id, self.dtype), spans, None))
        return laid_out

    def _close_shard(self, shard: _OpenShard) -> None:
        entry = shard.finish()
        self._shard = None
        self.entries.append(entry)
        self._on_shard(entry)


class _OpenShard:
    """A tar being written under a temporary name, hashed on the way."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"shard-{number:06d}.tar"
        self.number = number
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        self.file = open(self.temporary, "wb")
        self.hash = hashlib.sha256()
        self.position = 0
        self.index: list[tuple[int, ...]] = []  # a column of the index for each chunk
        self.counts = dict.fromkeys(
            (
                "tokens",
                "documents",
                "split_documents",
                "truncated_documents",
                "utf8_bytes",
                "spans",
                "padding_tokens",
            ),
            0,
        )

    def write_chunk(self, pieces: Sequence[Piece], document_ends: int) -> None:
        key = f"{self.number:06d}-{len(self.index):06d}"
        tokens = np.concatenate([piece.tokens for piece in pieces])
        lengths = np.array([len(piece.tokens) for piece in pieces], dtype="<i4")
        shifts = np.cumsum(lengths) - lengths
        spans = np.concatenate(
            [NO_SPANS, *(p.spans + [[shift, 0, 0]] for p, shift in zip(pieces, shifts) if len(p.spans))]
        ).astype("<i4")
        crc = checksum(tokens.data.cast("B"), lengths.tobytes(), spans.tobytes())
        offset = self.position + TAR_BLOCK + NPY_HEADER_BYTES
        self.index.append((self.counts["tokens"], offset, len(pieces), document_ends, len(spans), crc))
        self.counts["tokens"] += len(tokens)
        self.counts["spans"] += len(spans)
        self.counts["padding_tokens"] += int(spans[spans[:, 2] == PADDING, 1].sum())
        self._write_member(f"{key}.tok.npy", npy_bytes(tokens))
        self._write_member(f"{key}.lens.npy", npy_bytes(lengths))
        if len(spans):
            self._write_member(f"{key}.spans.npy", npy_bytes(spans))
        if any(piece.meta for piece in pieces):
            meta = json.dumps([piece.meta for piece in pieces], ensure_ascii=False, sort_keys=True)
            self._write_member(f"{key}.meta.json", meta.encode())

    def finish(self) -> ShardEntry:
        """End the archive, put index and tar in place in that order, and describe them."""
        end = self.position + 2 * TAR_BLOCK
        self._write(bytes(end + -end % TAR_RECORD - self.position))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        index = npy_bytes(np.ascontiguousarray(np.array(self.index, dtype="<i8").T))
        entry = ShardEntry(
            file=self.path.name,
            bytes=self.position,
            sha256=self.hash.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            chunks=len(self.index),
            **self.counts,
        )
        write_durably(self.path.with_name(entry.index_file), index)
        os.replace(self.temporary, self.path)
        fsync_folder(self.path.parent)
        return entry

    def _write_member(self, name: str, payload: bytes) -> None:
        self._write(member_header(name, len(payload)))
        self._write(payload)
        self._write(bytes(-len(payload) % TAR_BLOCK))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.position += len(data)


def member_header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a regular file with no time and no owner."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(format=tarfile.USTAR_FORMAT)


def token_member_bytes(tokens: int, dtype: str) -> int:
    """Size in bytes of the .tok.npy member that holds `tokens` tokens."""
    return NPY_HEADER_BYTES + tokens * ITEM_BYTES[dtype]


def clip_spans(spans: np.ndarray, start: int, count: int) -> np.ndarray:
    """What lies of spans [k, 3] in [start, start + count), with starts that count from `start`."""
    first = np.clip(spans[:, 0] - start, 0, count)
    last = np.clip(spans[:, 0] + spans[:, 1] - start, 0, count)
    kept = np.stack([first, last - first, spans[:, 2]], axis=1).astype(np.int32)
    return kept[kept[:, 1] > 0]
