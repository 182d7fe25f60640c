"""The open shard files of one process: few at a time, read with `pread`, told apart from files that took their place."""

from __future__ import annotations

import errno
import io
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Optional, Protocol, cast

from data.errors import ShardError, may_pass
from data.manifest import REMEDY, ShardEntry
from data.shard_check import Stamp, file_sha256

PAUSES = (0.05, 0.25)  # seconds before the second and the third try
# A network file system gives these for a while when a server restarts or a connection breaks.
TRANSIENT = frozenset(
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EREMOTEIO", "ECONNRESET", "ENETDOWN", "EHOSTDOWN")
    if hasattr(errno, name)
) | {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ECONNABORTED, errno.EBUSY}


class ShardSource(Protocol):
    """Where the tars of a set are: a folder (FolderShards) or a cache before a remote store (data.remote.RemoteShards)."""

    def where(self, shard: int) -> str:
        """The path or address of a shard, as errors show it."""
        ...

    def open(self, shard: int) -> BinaryIO:
        """The tar, unbuffered, with the size that the manifest says. Raises ShardError, or OSError for what may pass."""
        ...

    def open_unchecked(self, shard: int) -> BinaryIO:
        """The tar, unbuffered, as it is, for who wants to see what is wrong with it. Raises as `open`."""
        ...

    def read_file(self, name: str, most_bytes: int) -> bytes:
        """A small file beside the tars, or the first `most_bytes` + 1 of one that is longer. Raises OSError, ShardError."""
        ...


def shard_error(source: ShardSource, shard: int, reason: str, passing: bool = False) -> ShardError:
    return ShardError(f"{source.where(shard)}: {reason}; {REMEDY}", shard, reason, passing=passing)


class FolderShards:
    """The tars of a set in a folder."""

    def __init__(self, folder: Path, shards: Sequence[ShardEntry], stamps: Sequence[Stamp]) -> None:
        """`stamps` tell the files that were checked when the set was opened."""
        self._folder, self._shards, self._stamps = os.fspath(folder), shards, list(stamps)

    def where(self, shard: int) -> str:
        return f"{self._folder}{os.sep}{self._shards[shard].file}"

    def open(self, shard: int) -> BinaryIO:
        """The tar; one that was written anew since the set was opened is hashed first and must have the same bytes."""
        file = io.FileIO(self.where(shard))  # in half the time of open()
        try:
            stamp, entry = Stamp.of(os.fstat(file.fileno())), self._shards[shard]
            if stamp.size != entry.bytes:
                state = "cut short" if stamp.size < entry.bytes else "longer"
                raise shard_error(
                    self, shard, f"{state} since the set was opened ({stamp.size} bytes, not {entry.bytes})"
                )
            if stamp != self._stamps[shard]:
                if file_sha256(self.where(shard)) != entry.sha256:
                    raise shard_error(self, shard, "replaced or changed since the set was opened")
                self._stamps[shard] = stamp
            return cast(BinaryIO, file)
        except BaseException:
            file.close()
            raise

    def open_unchecked(self, shard: int) -> BinaryIO:
        return open(self.where(shard), "rb", buffering=0)  # type: ignore[return-value]

    def read_file(self, name: str, most_bytes: int) -> bytes:
        with open(os.path.join(self._folder, name), "rb") as file:
            return file.read(most_bytes + 1)


_all_open: weakref.WeakSet[OpenShards] = weakref.WeakSet()


class OpenShards:
    """The most recently used files of one process; a file closes when neither the cache nor a reader holds it."""

    def __init__(self, source: ShardSource, most: int) -> None:
        self.process = os.getpid()
        self.source, self.most = source, most
        self._lock = threading.Lock()
        self._files: OrderedDict[int, tuple[BinaryIO, Stamp]] = OrderedDict()
        _all_open.add(self)

    def read(self, shard: int, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` of a tar. Raises ShardError when the file is not whole, or not the one opened."""
        for pause in (*PAUSES, None):
            try:
                file, stamp = self._get(shard)
                if stamp is not None and Stamp.of(os.fstat(file.fileno())) != stamp:  # written to in place
                    self._drop(shard)
                    file, _ = self._get(shard)
                _fill(file.fileno(), buffer, offset)
                return
            except EOFError:
                self._drop(shard)
                raise shard_error(self.source, shard, f"ends before byte {offset + len(buffer)}, cut short") from None
            except OSError as error:
                self._drop(shard)
                if pause is None or error.errno not in TRANSIENT:
                    reason = f"cannot be read ({error.strerror})"
                    raise shard_error(self.source, shard, reason, may_pass(error)) from error
                time.sleep(pause)

    def _get(self, shard: int) -> tuple[BinaryIO, Optional[Stamp]]:
        """The file, and what it looked like when it was opened if that was earlier."""
        with self._lock:
            found = self._files.get(shard)
            if found is not None:
                self._files.move_to_end(shard)
                return found
        # Not under the lock: a download may take minutes, and other threads read other shards meanwhile.
        file = self._open(shard)
        with self._lock:
            self._files[shard] = file, Stamp.of(os.fstat(file.fileno()))
            if len(self._files) > self.most:
                self._files.popitem(last=False)
        return file, None

    def _open(self, shard: int) -> BinaryIO:
        try:
            return self.source.open(shard)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        for files in list(_all_open):  # a mixture of many sets together took all that the process may have
            files._release()
        return self.source.open(shard)

    def _release(self) -> None:
        if self.process == os.getpid() and self._lock.acquire(timeout=1):
            self._files.clear()
            self._lock.release()

    def _drop(self, shard: int) -> None:
        with self._lock:
            self._files.pop(shard, None)


def _fill(descriptor: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        got = os.preadv(descriptor, [buffer], offset)
        if got == 0:
            raise EOFError
        buffer, offset = buffer[got:], offset + got
