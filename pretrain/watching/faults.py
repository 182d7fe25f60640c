"""The one fault that ends a start, in RUN/health/fault-LAUNCH.json: who wrote it first has named it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Optional

Kind = Literal["stalled", "stopped", "died", "crashed", "mistake", "silent host"]
FAULT = 76  # exit code of a watch that ended its rank, or found it ended, because of a fault
MISTAKE, INTERRUPTED, LEAVES = 2, 130, 75


@dataclass(frozen=True)
class Fault:
    """What went wrong, where.

    rank, host: None and "" if no rank can be named. cause: what happened, with no rank and no host in it, so that the same fault
    elsewhere reads alike. code: what the watches end with. stacks: the folder of every rank's stacks.
    """

    kind: Kind
    rank: Optional[int] = None
    host: str = ""
    phase: str = "start"
    step: Optional[int] = None
    doing: str = ""
    cause: str = ""
    code: int = FAULT
    time: float = 0.0
    launch: str = ""
    stacks: str = ""

    def sentence(self) -> str:
        """One line for people."""
        who = f"rank {self.rank} on {self.host or '?'}" if self.rank is not None else "the run"
        where = f"in phase {self.phase}" + (f", step {self.step}" if self.step is not None else "")
        doing = f" ({self.doing})" if self.doing else ""
        what = {"silent host": "fell silent", "mistake": "met a mistake"}.get(self.kind, self.kind)
        return f"{who} {what} {where}{doing}: {self.cause}"


class FaultFile:
    """The fault of one start, as one watch sees it. Others may write it at the same moment: exactly one of them does.

    Where launch names come again, what already lay there when this watch started is of an earlier start and counts for nothing.
    """

    def __init__(self, folder: Path, launch: str, *, believe_old: bool):
        """folder: of the run. believe_old: the launch name was never used before, so a file of it is of this start."""
        self.path = fault_path(folder, launch)
        self._leaving = folder / "health" / f"leaving-{launch}.json"
        self._old = None if believe_old else _content(self.path)
        self._old_leaving = None if believe_old else _content(self._leaving)
        self._stacks = str(stacks_folder(folder, launch))
        self._launch = launch

    def read(self) -> Optional[Fault]:
        """The fault of this start, None while there is none."""
        content = _content(self.path)
        if content is None or content == self._old:
            return None
        return fault_from(content)

    def name(self, fault: Fault) -> Fault:
        """Writes `fault` unless another watch was first; the one that stands. OSError if the folder cannot be written."""
        mine = Fault(**{**asdict(fault), "time": round(time.time(), 3), "launch": self._launch, "stacks": self._stacks})
        _write_once(self.path, asdict(mine), self._old)
        return self.read() or mine

    def leaving(self) -> bool:
        """Whether a rank of this start has left with a checkpoint and asks to be requeued: the others are to follow."""
        content = _content(self._leaving)
        return content is not None and content != self._old_leaving

    def say_leaving(self, rank: int) -> None:
        values = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "time": round(time.time(), 3)}
        _write_once(self._leaving, values, self._old_leaving)


def fault_path(folder: Path, launch: str) -> Path:
    return folder / "health" / f"fault-{launch}.json"


def stacks_folder(folder: Path, launch: str) -> Path:
    return folder / "logs" / f"stacks-{launch}"


def fault_from(content: bytes) -> Optional[Fault]:
    """A fault file's content; None if it is none."""
    try:
        values = json.loads(content)
        return Fault(**{field.name: values[field.name] for field in fields(Fault) if field.name in values})
    except (ValueError, TypeError):
        return None


def _content(path: Path) -> Optional[bytes]:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write_once(path: Path, values: dict[str, Any], old: Optional[bytes]) -> None:
    """Puts a complete file at `path` unless somebody did; one that still has the content `old` is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            json.dump(values, file)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        if old is not None and _content(path) == old:
            os.replace(temporary, path)
            return
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            # A file system without hard links: the name is taken first, then filled.
            with contextlib.suppress(FileExistsError), open(path, "x") as file:
                json.dump(values, file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
