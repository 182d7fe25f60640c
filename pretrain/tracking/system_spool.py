"""system-HOST.jsonl: what a host said of itself, a line a sample. Each host has a file of its own, of bounded size.

Where two hosts of a run have one name, the second goes by HOST-rN, N being its first rank. When a file is full it becomes
system-HOST.old.jsonl, in place of the one before it. The steps of a run go back when it resumes; the times in one file only
grow, so they say what is new.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

from data.durable import take_lock
from pretrain.tracking.spool import Changed, Spool, lines_backwards, lines_behind, say_on_stderr

NAME_LENGTH = 64  # of a host, in letters
FULL_BYTES = 64 << 20  # two such files a host: 9 to 19 days of 8 GPUs with a sample every 30 s


def spool_name(host: str) -> str:
    return f"system-{plain_host(host)}.jsonl"


def plain_host(host: str, behind: str = "") -> str:
    """A host's name as it can stand in a file's name and in a metric's; `behind` is its end."""
    return (re.sub(r"[^\w.-]", "_", host)[: NAME_LENGTH - len(behind)].strip(".") or "host") + behind


def claim_name(run_folder: Path, host: str, rank: int) -> tuple[str, Optional[int]]:
    """(the name that a host writes under, a descriptor that keeps it from others while it is open, None if nothing does).

    The name is the host's own if no other process writes under it in this run, else it ends in the host's first rank.
    """
    for name in (plain_host(host), plain_host(host, f"-r{rank}")):
        try:
            return name, take_lock(run_folder / f".system-{name}.lock")
        except BlockingIOError:
            continue
        except OSError:  # a folder that cannot be written: the spool says so
            return name, None
    return name, None  # the lock of this very rank outlives it: no other rank has its number


class SystemSpool:
    """Appends the samples of one host."""

    def __init__(self, run_folder: Path, host: str, say: Callable[[str], None] = say_on_stderr):
        self.path = run_folder / spool_name(host)
        self._say = say
        self._last = 0.0
        if self.path.exists():
            whole = (line for raw, _ in lines_backwards(self.path) if (line := _parse(raw)))
            self._last = next(whole, {"time": 0.0})["time"]
            if not next((raw for raw, _ in lines_backwards(self.path)), b"\n").endswith(b"\n"):
                # The last start died while it wrote: what it left must not swallow the next line.
                with open(self.path, "ab") as file:
                    file.write(b"\n")
        self._spool = Spool(self.path, say)

    def append(self, step: int, metrics: dict[str, float]) -> None:
        self._last = max(round(time.time(), 3), round(self._last + 0.001, 3))
        self._spool.append(json.dumps({"step": step, "time": self._last, **metrics}).encode() + b"\n")
        self._spool.sync()  # other hosts see it then, on a network file system too
        if self.path.exists() and self.path.stat().st_size >= FULL_BYTES:
            self._spool.close()
            os.replace(self.path, _older(self.path))
            self._spool = Spool(self.path, self._say)
            self._spool.flush()  # an empty file: a reader finds the older one by it

    def close(self) -> None:
        self._spool.close()


def spools(run_folder: Path) -> list[Path]:
    """The file of every host that has one."""
    return sorted(
        path for path in run_folder.glob("system-*.jsonl") if not path.name.endswith(".old.jsonl") and path.is_file()
    )


def new_samples(path: Path, position: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(sample, position behind it) of every sample of a host that lies behind `position`; {} is the start."""
    time_ = position.get("time", 0.0)
    try:
        live = open(path, "rb")  # before the older one: what is renamed meanwhile is read from either
    except FileNotFoundError:  # it is being renamed: next time
        return
    with live:
        last = position.get("last", "").encode("latin-1")
        places = [(live, position.get("offset", 0), last)] if last else []
        try:
            for file, offset, before in places:
                for line, at in _lines(file.fileno(), offset, before, time_):
                    time_ = line["time"]
                    yield line, at
            if places:
                return
        except Changed:  # the file is another one by now
            pass
        older = _older(path)
        if older.exists():
            with open(older, "rb") as file:
                for line, _ in _lines(file.fileno(), 0, b"", time_):
                    time_ = line["time"]
                    yield line, {"time": time_}
        yield from _lines(live.fileno(), 0, b"", time_)


def _lines(
    descriptor: int, offset: int, before: bytes, after: float
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for raw, behind in lines_behind(descriptor, offset, before):
        line = _parse(raw)
        if line and line["time"] > after:
            yield line, {"time": line["time"], "offset": behind, "last": raw.decode("latin-1")}


def _parse(raw: bytes) -> dict[str, Any] | None:
    """None for what is left of a line whose writer died."""
    try:
        line = json.loads(raw)
        return line if isinstance(line["step"], int) and isinstance(line["time"], float) else None
    except (ValueError, KeyError, TypeError):
        return None


def _older(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".jsonl") + ".old.jsonl")
