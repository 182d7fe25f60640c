"""A folder on this host that keeps shards of remote sets: shared by all processes and runs, never above its bound.

    FOLDER/.lock                          held while room is made
    FOLDER/SET/manifest.json ...          what was read when the set was opened
    FOLDER/SET/shard-000000.tar           complete and checked: it got this name after its hash was right
    FOLDER/SET/shard-000000.tar.part-XXX  coming in; as long as the whole file from its start on, so that its room is taken
    FOLDER/SET/.locks/shard-000000.tar    held by who brings this file in or throws it out

The locks are the kernel's (flock): they end with the process that holds them, however it ends. Who holds a file's lock may take
FOLDER/.lock, never the other way round but without waiting, so nobody waits in a circle.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from data.durable import take_lock
from data.errors import InputError
from data.remote_fetch import time_bound
from data.remote_options import CacheOptions
from data.remote_stream import FetchError

LOCK_FILE, LOCKS_FOLDER, PART = ".lock", ".locks", ".part-"
LOCK_SECONDS = 60.0  # making room takes far less


class ShardCache:
    """The cached files of one set. Safe to pickle; every process and thread may use its own."""

    def __init__(self, options: CacheOptions, set_id: str) -> None:
        """Raises InputError when the folder cannot be made or written."""
        self.options, self.root = options, Path(options.folder).expanduser()
        self.folder = self.root / set_id
        try:
            (self.folder / LOCKS_FOLDER).mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
        except OSError as error:
            raise InputError(
                f"cache folder: {self.root} cannot be written ({error.strerror}); choose another one"
            ) from error

    def open(self, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        """A file of `size` bytes, unbuffered; `fetch` writes it to the file it is given when the cache does not have it.

        Raises what `fetch` raises, FetchError when other processes hold the file or the room too long, OSError.
        """
        found = self._opened(name, size)
        if found is not None:
            return found
        bound = time_bound(size, self.options)
        with self._locked(self.folder / LOCKS_FOLDER / name, bound, f"another process held {name}"):
            # Opened while the lock is held: nobody can throw the file out in between.
            found = self._opened(name, size)
            if found is not None:
                return found
            part = self._reserve(name, size, bound)
            try:
                with open(part, "r+b", buffering=0) as file:
                    fetch(file)  # type: ignore[arg-type]
                    os.fsync(file.fileno())
                os.replace(part, self.folder / name)
                return open(self.folder / name, "rb", buffering=0)  # type: ignore[return-value]
            finally:
                part.unlink(missing_ok=True)

    def keep(self, name: str, content: bytes) -> None:
        """Put a small file there unless it is there already: other processes may have it open."""
        path = self.folder / name
        with self._locked(self.folder / LOCKS_FOLDER / name, LOCK_SECONDS, f"another process held {name}"):
            if not (path.is_file() and path.read_bytes() == content):
                part = self._reserve(name, len(content), LOCK_SECONDS)
                try:
                    part.write_bytes(content)
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)

    def _opened(self, name: str, size: int) -> BinaryIO | None:
        path = self.folder / name
        try:
            file = open(path, "rb", buffering=0)
        except FileNotFoundError:
            return None
        status = os.fstat(file.fileno())
        if status.st_size != size:  # somebody else's doing; under the lock it is written anew
            file.close()
            return None
        with contextlib.suppress(OSError):  # when it was used last, for who makes room
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return file  # type: ignore[return-value]

    def _reserve(self, name: str, size: int, bound: float) -> Path:
        """An empty file as long as what will come, once there is room for it; the longest unused shards go."""
        deadline = time.monotonic() + bound
        while True:
            with self._locked(self.root / LOCK_FILE, LOCK_SECONDS, "another process held the cache"):
                for path in (self.folder / name, *self.folder.glob(f"{name}{PART}*")):  # of who held the lock before us
                    path.unlink(missing_ok=True)
                if self._make_room(size):
                    descriptor, part = tempfile.mkstemp(prefix=name + PART, dir=self.folder)
                    try:
                        os.truncate(descriptor, size)
                    finally:
                        os.close(descriptor)
                    return Path(part)
            if time.monotonic() > deadline:
                raise FetchError(
                    f"the cache {self.root} has no room for {size} bytes beside what is coming in; raise max_bytes",
                    lasting=True,
                )
            time.sleep(0.2)

    def _make_room(self, size: int) -> bool:
        """Throws out shards, those used longest ago first, until `size` bytes fit below the bound; whether they do."""
        self._remove_leftovers()
        files = [(entry, entry.stat(follow_symlinks=False)) for entry in _files(self.root)]
        over = sum(status.st_size for _, status in files) + size - self.options.max_bytes
        shards = [
            (status.st_atime_ns, status.st_size, Path(entry)) for entry, status in files if entry.name.endswith(".tar")
        ]
        for _, taken, path in sorted(shards):
            if over <= 0:
                break
            with contextlib.suppress(OSError):  # somebody holds it, took it away, or it is another user's
                lock = take_lock(path.parent / LOCKS_FOLDER / path.name)
                try:
                    path.unlink()
                    over -= taken
                finally:
                    _release(lock)
        return over <= 0

    def _remove_leftovers(self) -> None:
        """Removes what killed downloads left: parts whose lock nobody holds."""
        for part in self.root.glob(f"*/*{PART}*"):
            with contextlib.suppress(OSError):
                lock = take_lock(part.parent / LOCKS_FOLDER / part.name.partition(PART)[0])
                try:
                    part.unlink(missing_ok=True)
                finally:
                    _release(lock)

    @contextlib.contextmanager
    def _locked(self, path: Path, bound: float, who: str) -> Iterator[None]:
        """Holds the lock of a file. Raises FetchError, beginning with `who`, after `bound` seconds."""
        begun, pause = time.monotonic(), 0.01
        while True:
            try:
                lock = take_lock(path)
                break
            except BlockingIOError:
                if time.monotonic() - begun > bound:
                    reason = f"{who} for {bound:.0f} s (lock {path})"
                    raise FetchError(reason, lasting=True, passing=True) from None
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        try:
            yield
        finally:
            _release(lock)


def _release(lock: int) -> None:
    """Closing alone would leave the lock with a child that was forked meanwhile and holds a copy of the descriptor."""
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def _files(folder: Path) -> Iterator[os.DirEntry]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry))
            else:
                yield entry


def disk_full(error: OSError) -> bool:
    """Whether writing failed for want of room, which waiting does not bring."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
