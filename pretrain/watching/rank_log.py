"""What each rank says, in a file of its own: RUN/logs/rank-00003.log, appended over restarts.

The console is rank 0's. What the other ranks and the libraries under them print goes to their files, so that sixteen nodes do not
talk at once; rank 0 says which rank failed first and why.
Lines that training itself writes begin with a time, so that `logs` can interleave the ranks.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Optional, TextIO

from data.errors import InputError
from parallel.errors import CheckpointError

STAMP = "%Y-%m-%dT%H:%M:%S"


def log_path(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"rank-{rank:05d}.log"


class RankLog:
    """This rank's file. A log that cannot be written (a full disk) is no reason to stop training: the line is lost."""

    def __init__(self, folder: Path, rank: int, world: int, launch: str):
        """launch: the start that this is, the same words on every rank of it."""
        self.path = log_path(folder, rank)
        self._rank, self._world = rank, world
        self._console: dict[int, int] = {}  # descriptor -> another one of what it was, while the file stands there
        self._sound: Optional[tuple[TextIO, TextIO]] = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError:
            self._descriptor = os.open(os.devnull, os.O_WRONLY)
        self.line(f"=== start {launch}: rank {rank} of {world} on {socket.gethostname()}, process {os.getpid()}")

    def line(self, text: str) -> None:
        """One line with its time (of this host, UTC)."""
        now = time.time()
        stamp = f"{time.strftime(STAMP, time.gmtime(now))}.{int(now * 1000) % 1000:03d}"
        with contextlib.suppress(OSError):
            os.write(self._descriptor, f"{stamp} {text}\n".encode())

    def take_output(self) -> None:
        """From now on what this process prints, libraries included, goes to the file; on rank 0 to the console as well."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._sound = sys.stdout, sys.stderr
        self._console = {2: os.dup(2)} if self._rank == 0 else {1: os.dup(1), 2: os.dup(2)}
        for number in self._console:  # what native code has to say as well
            os.dup2(self._descriptor, number)
        if self._rank == 0:  # the file gets what is worth keeping by `line`; of the console only errors
            console = sys.stderr
            if console is sys.__stderr__:
                console = open(self._console[2], "w", buffering=1, closefd=False)
            sys.stderr = _Both(console, self._descriptor)
            return
        sys.stdout, sys.stderr = _Lossy(self._descriptor), _Lossy(self._descriptor)

    def give_back(self) -> None:
        """The console is this process's again."""
        if self._sound is None:
            return
        for number, console in self._console.items():
            os.dup2(console, number)
            os.close(console)
        (sys.stdout, sys.stderr), self._sound = self._sound, None

    def __enter__(self) -> RankLog:
        self.take_output()
        return self

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        """What a failure of one rank among others has to say still goes to its file; the process ends with it."""
        if error is not None and self._world > 1:
            return
        if isinstance(error, (InputError, CheckpointError)):  # one line says it
            self.line(f"error: {error}")
        elif error is not None:
            self.line("".join(traceback.format_exception(error)).rstrip())
        self.give_back()  # the file stays open: libraries may have kept a stream that stood for it


class _Lossy(io.TextIOBase):
    """A text stream that never raises: a full disk must not turn a print into a crash."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            os.write(self._descriptor, text.encode(errors="replace"))
        return len(text)

    def fileno(self) -> int:
        return self._descriptor


class _Both(_Lossy):
    """A console that is also kept in a file."""

    def __init__(self, console: TextIO, descriptor: int):
        super().__init__(descriptor)
        self._to = console

    def write(self, text: str) -> int:
        super().write(text)
        return self._to.write(text)

    def flush(self) -> None:
        self._to.flush()

    def fileno(self) -> int:
        return self._to.fileno()

    def isatty(self) -> bool:
        return self._to.isatty()
