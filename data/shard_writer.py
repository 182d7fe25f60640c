"""Write token documents as tar shards that vanilla webdataset reads, each with a sidecar index for random access.

A sample is a chunk of whole documents, laid end to end: `KEY.tok.npy` (uint16 or uint32, 1-D) and `KEY.lens.npy` (int32
lengths that sum to the tokens). The bytes depend on the documents alone: names are fixed, times and owners are zero.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data.durable import fsync_folder, write_durably
from data.manifest import ITEM_BYTES, ShardEntry

TAR_BLOCK = 512
TAR_RECORD = 20 * TAR_BLOCK  # tar archives end on a full record of zeros
NPY_HEADER_BYTES = 128  # numpy pads the header of any 1-D array of these types to this


class ShardWriter:
    """Cuts a stream of documents into chunks and shards.

    A chunk closes at the first document end at or after `chunk_tokens`; a document longer than that is cut into
    pieces of `chunk_tokens`, of which only the last ends in EOS. A shard closes at the first chunk end at or after
    `shard_tokens` that is also a document end, so a document lies in one shard and a writer can go on after any
    finished shard.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        chunk_tokens: int,
        shard_tokens: int,
        finished: Sequence[ShardEntry] = (),
        on_shard: Callable[[ShardEntry], None] = lambda entry: None,
    ) -> None:
        """Go on after the `finished` shards in `folder`; `on_shard` is called once a further one is safely on disk."""
        self.folder, self.dtype = folder, np.dtype(dtype).newbyteorder("<")
        self.chunk_tokens, self.shard_tokens = chunk_tokens, shard_tokens
        self.entries = list(finished)
        self._on_shard = on_shard
        self._shard: _OpenShard | None = None
        self._pieces: list[np.ndarray] = []
        self._pending_tokens = 0
        self._pending_ends = 0

    def add_document(self, tokens: np.ndarray, utf8_bytes: int) -> None:
        """Append one document: its ids (1-D), the closing EOS included, and the size of its text in bytes."""
        if self._shard is None:
            self._shard = _OpenShard(self.folder, len(self.entries))
        shard = self._shard
        pieces = range(0, len(tokens), self.chunk_tokens)
        for start in pieces:
            piece = tokens[start : start + self.chunk_tokens].astype(self.dtype, copy=False)
            self._pieces.append(piece)
            self._pending_tokens += len(piece)
            self._pending_ends += start == pieces[-1]
            if self._pending_tokens >= self.chunk_tokens:
                self._close_chunk(shard)
        shard.documents += 1
        shard.split_documents += len(pieces) > 1
        shard.utf8_bytes += utf8_bytes
        if not self._pieces and shard.tokens >= self.shard_tokens:
            self._close_shard(shard)

    def close(self) -> list[ShardEntry]:
        """Write what is pending, short as it may be, and give the entries of all shards in order."""
        if self._shard is not None:
            if self._pieces:
                self._close_chunk(self._shard)
            self._close_shard(self._shard)
        return self.entries

    def _close_chunk(self, shard: _OpenShard) -> None:
        lengths = np.array([len(piece) for piece in self._pieces], dtype="<i4")
        shard.write_chunk(np.concatenate(self._pieces), lengths, self._pending_ends)
        self._pieces, self._pending_tokens, self._pending_ends = [], 0, 0

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
        self.index: list[tuple[int, int, int]] = []
        self.tokens = self.documents = self.split_documents = self.utf8_bytes = 0

    def write_chunk(self, tokens: np.ndarray, lengths: np.ndarray, document_ends: int) -> None:
        key = f"{self.number:06d}-{len(self.index):06d}"
        self.index.append((self.position + TAR_BLOCK + NPY_HEADER_BYTES, len(tokens), document_ends))
        self.tokens += len(tokens)
        self._write_member(f"{key}.tok.npy", _npy_bytes(tokens))
        self._write_member(f"{key}.lens.npy", _npy_bytes(lengths))

    def finish(self) -> ShardEntry:
        """End the archive, put index and tar in place in that order, and describe them."""
        end = self.position + 2 * TAR_BLOCK
        self._write(bytes(end + -end % TAR_RECORD - self.position))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        index = _npy_bytes(np.array(self.index, dtype="<i8"))
        entry = ShardEntry(
            file=self.path.name,
            bytes=self.position,
            sha256=self.hash.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            tokens=self.tokens,
            documents=self.documents,
            split_documents=self.split_documents,
            utf8_bytes=self.utf8_bytes,
            chunks=len(self.index),
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


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    content = buffer.getvalue()
    if len(content) - array.nbytes != NPY_HEADER_BYTES:
        raise RuntimeError(
            f"numpy wrote a header of {len(content) - array.nbytes} bytes where the index counts on {NPY_HEADER_BYTES}"
        )
    return content
