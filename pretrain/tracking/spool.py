"""A file of lines that grows while a run lasts: a full disk costs memory, never the run; a reader sees whole lines only."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional

KEPT_BYTES = 64 << 20  # lines held in memory while the disk takes none
RETRY_SECONDS = 1.0  # between tries while it takes none
_CHUNK = 4 << 20  # read at once
_BLOCK = 1 << 20  # read at once from the end


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Spool:
    """Appends lines to one file. No method raises what the file system raises: lines wait in memory and are tried again.

    When more than KEPT_BYTES wait, the oldest are given up and counted. One thread uses it.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = say_on_stderr):
        self.path, self._say = path, say
        self._descriptor: Optional[int] = None
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._written = 0  # bytes of the first waiting line that are in the file already
        self._failing = False
        self._retry_at = 0.0
        self.dropped = 0  # lines given up

    def append(self, line: bytes) -> None:
        """`line` ends in its only newline."""
        self._waiting.append(line)
        self._bytes += len(line)
        if not self._failing or time.monotonic() >= self._retry_at:
            self.flush()
        first = 1 if self._written else 0  # the rest of a line that was begun must follow it
        while self._bytes > KEPT_BYTES and len(self._waiting) > first:
            self._bytes -= len(self._waiting[first])
            del self._waiting[first]
            if not self.dropped:
                self._say(f"WARNING: {self.path}: {KEPT_BYTES >> 20} MiB wait in memory; the oldest lines are now lost")
            self.dropped += 1

    def flush(self) -> bool:
        """Hands waiting lines to the file; whether none is left."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            while self._waiting:
                line = self._waiting[0]
                self._written += os.write(self._descriptor, memoryview(line)[self._written :])
                if self._written == len(line):
                    self._waiting.popleft()
                    self._bytes -= len(line)
                    self._written = 0
        except OSError as error:
            self._failed(error)
            return False
        if self._failing:
            lost = f", {self.dropped} lines are lost" if self.dropped else ", nothing is lost"
            self._say(f"{self.path} can be written again{lost}")
        self._failing = False
        return True

    def _failed(self, error: OSError) -> None:
        if not self._failing:
            self._say(
                f"WARNING: {self.path} cannot be written ({error.strerror}): training goes on, its lines wait in memory "
                f"(up to {KEPT_BYTES >> 20} MiB) and are tried again; make room on the disk"
            )
        self._failing, self._retry_at = True, time.monotonic() + RETRY_SECONDS

    def sync(self) -> None:
        """Everything that the disk takes is on it when this returns."""
        if self.flush() and self._descriptor is not None:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self._failed(error)

    def cut(self, size: int, keep: Callable[[bytes], bool]) -> None:
        """Drops what lies behind the first `size` bytes of the file, and the waiting lines that are not to be kept.

        OSError if the file cannot be cut (a full disk is no reason: nothing is written).
        """
        if self.path.exists():
            os.truncate(self.path, size)
        self._waiting = deque(line for line in self._waiting if keep(line))
        self._bytes = sum(map(len, self._waiting))
        self._written = 0

    def waiting(self) -> list[bytes]:
        """The lines that are not in the file yet."""
        return list(self._waiting)

    def close(self) -> None:
        self.sync()
        if self._waiting:
            self._say(f"WARNING: {self.path}: the last {len(self._waiting)} lines could not be written and are lost")
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Changed(Exception):
    """The bytes before a position are not those that were read there: the file was cut or replaced meanwhile."""


def lines_behind(descriptor: int, offset: int, before: bytes) -> Iterator[tuple[bytes, int]]:
    """(line, offset behind it) of every whole line from `offset` on. `before`: the line that ends there (empty: not known).

    Each line comes out of one read that also holds the line before it, so a file that is cut and grows again between
    two reads is noticed: Changed.
    """
    while True:
        data = os.pread(descriptor, len(before) + _CHUNK, offset - len(before))
        if not data.startswith(before):
            raise Changed
        at, end = len(before), data.rfind(b"\n") + 1
        if end <= at:
            if len(data) < len(before) + _CHUNK:
                return
            raise ValueError(f"a line of more than {_CHUNK} bytes at byte {offset}")
        for raw in data[at:end].splitlines(keepends=True):
            offset += len(raw)
            before = raw
            yield raw, offset


def lines_backwards(path: Path) -> Iterator[tuple[bytes, int]]:
    """(line, offset behind it) from the end of the file to its start; the first one may lack its newline."""
    with open(path, "rb") as file:
        start = file.seek(0, os.SEEK_END)
        tail = b""
        while start > 0:
            size = min(_BLOCK, start)
            start -= size
            file.seek(start)
            tail = file.read(size) + tail
            end = start + len(tail)
            first = 0 if start == 0 else tail.find(b"\n") + 1  # what lies before may be the end of a line
            if start and not first:
                continue
            for raw in reversed(tail[first:].splitlines(keepends=True)):
                yield raw, end
                end -= len(raw)
            tail = tail[:first]
