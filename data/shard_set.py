"""Open a shard set, prove that it is whole, and read any range of its tokens.

Tokens are numbered through all shards in manifest order: a flat range [start, start + count) is found by bisection in
the cumulative chunk sizes and read with `pread`, without touching the tar structure.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.errors import InputError
from data.manifest import ITEM_BYTES, REMEDY, Manifest, ShardEntry, SpecialIds, read_manifest
from data.shard_check import check_shard, check_tokenizer, read_index

FULL_CHECK_BYTES = 2 << 30
OPEN_FILES = 64


class ShardSet:
    """A folder of shards behind one flat token axis.

    Safe to pickle and to use after a fork: files are opened on first use in each process, at most OPEN_FILES of them.
    `chunk_starts` is int64 [chunks + 1], the cumulative tokens over all shards; `chunk_documents` int64 [chunks]
    counts the documents that end in each chunk.
    """

    def __init__(self, folder: Path, manifest: Manifest, indexes: list[np.ndarray]) -> None:
        self.folder, self.manifest = folder, manifest
        table = np.concatenate(indexes)
        self.chunk_offsets, self.chunk_documents = table[:, 0].copy(), table[:, 2].copy()
        self.chunk_starts = np.concatenate([[0], np.cumsum(table[:, 1])]).astype(np.int64)
        self.chunk_shards = np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index) for index in indexes])
        self._paths = [os.fspath(folder / shard.file) for shard in manifest.shards]
        self._files = _OpenFiles()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: Literal["auto", "full", "size"] = "auto") -> ShardSet:
        """Open a set after checking it.

        `size` checks the manifest, the file sizes, the indexes and the tokenizer; `full` also hashes every tar;
        `auto` is `full` below 2 GiB in total and else reads the first and last member headers of each tar. Raises
        InputError, one line that names the file, for anything missing, cut short, changed or inconsistent.
        """
        if verify not in ("auto", "full", "size"):
            raise InputError(f"verify: {verify!r} is unknown; allowed are auto, full and size")
        folder = Path(folder)
        manifest = read_manifest(folder)
        depth: Literal["size", "headers", "full"]
        if verify == "auto":
            depth = "full" if sum(shard.bytes for shard in manifest.shards) < FULL_CHECK_BYTES else "headers"
        else:
            depth = verify
        check_tokenizer(folder, manifest)
        indexes = []
        for shard in manifest.shards:
            index = read_index(folder, shard, manifest.dtype)
            check_shard(folder, shard, index, manifest.dtype, depth)
            indexes.append(index)
        return cls(folder, manifest, indexes)

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.manifest.dtype)

    @property
    def special(self) -> SpecialIds:
        return self.manifest.special

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    @property
    def documents(self) -> int:
        return self.manifest.documents

    @property
    def utf8_bytes(self) -> int:
        return self.manifest.utf8_bytes

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        return self.manifest.shards

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / self.manifest.tokenizer_file

    def read_tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the whole set, 1-D in the set's dtype.

        Raises IndexError for a range outside [0, tokens), and InputError naming shard and chunk when the file ends
        early or holds an id outside the vocabulary.
        """
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens [{start}, {start + count}) are outside [0, {self.tokens}) of {self.folder}")
        out = np.empty(count, dtype=self.dtype)
        item_bytes = ITEM_BYTES[self.manifest.dtype]
        chunk = int(np.searchsorted(self.chunk_starts, start, side="right")) - 1
        filled = 0
        while filled < count:
            inside = start + filled - int(self.chunk_starts[chunk])
            part = out[filled : filled + int(self.chunk_starts[chunk + 1]) - int(self.chunk_starts[chunk]) - inside]
            self._read_part(part, chunk, int(self.chunk_offsets[chunk]) + inside * item_bytes)
            filled += len(part)
            chunk += 1
        return out

    def close(self) -> None:
        """Close the files this process has open; reading opens them again."""
        self._files = _OpenFiles()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_files"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files = _OpenFiles()

    def _read_part(self, part: np.ndarray, chunk: int, offset: int) -> None:
        path = self._paths[self.chunk_shards[chunk]]
        if self._files.process != os.getpid():
            self._files = _OpenFiles()
        try:
            # The local reference keeps the descriptor open even if another thread's read pushes it out of the cache.
            file = self._files.get(path)
            buffer = memoryview(part.data).cast("B")
            while buffer:
                got = os.preadv(file.fileno(), [buffer], offset)
                if got == 0:
                    raise InputError(
                        f"{path}: ends inside chunk {self._chunk_in_shard(chunk)}, cut short after opening; {REMEDY}"
                    )
                buffer, offset = buffer[got:], offset + got
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read at chunk {self._chunk_in_shard(chunk)} ({error.strerror}); {REMEDY}"
            ) from error
        if part.max() >= self.vocab_size:
            raise InputError(
                f"{path}: chunk {self._chunk_in_shard(chunk)} holds the token id {int(part.max())},"
                f" outside the vocabulary of {self.vocab_size}; {REMEDY}"
            )

    def _chunk_in_shard(self, chunk: int) -> int:
        return chunk - int(np.searchsorted(self.chunk_shards, self.chunk_shards[chunk], side="left"))


class _OpenFiles:
    """The most recently used shard files of one process; a file closes when the cache and every reader let go of it."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, Any] = OrderedDict()

    def get(self, path: str) -> Any:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = open(path, "rb", buffering=0)
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return file
