"""metrics.jsonl, the source of truth of a run's metrics: one JSON object a line {"step", "time", metric: value, ...}."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

from data.errors import InputError
from pretrain.tracking.run_events import record_roll_back
from pretrain.tracking.spool import Changed, Spool, lines_backwards, lines_behind, say_on_stderr

SPOOL = "metrics.jsonl"


class MetricLog:
    """Appends lines to metrics.jsonl. Only rank 0 writes, from one thread. A full disk never stops the run (spool.py)."""

    def __init__(self, run_folder: Path, say: Callable[[str], None] = say_on_stderr):
        self.folder = run_folder
        self._spool = Spool(run_folder / SPOOL, say)
        self._spool.flush()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        # JSON has no NaN; a value that is not finite is kept as text and as a flag that can be plotted.
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in metrics.items():
            finite = math.isfinite(value)
            line[name] = value if finite else str(value)
            if not finite:
                line[f"{name}_nonfinite"] = 1.0
        self._spool.append(json.dumps(line).encode() + b"\n")

    def sync(self) -> None:
        """What the disk takes is on it on return; a failure is said, never raised."""
        self._spool.sync()

    def roll_back(self, step: int) -> None:
        """Drops every line after `step` while the run goes on; the steps are tagged in MLflow. The shipper may be at work.

        OSError if the file cannot be cut; its lines are all there then.
        """
        self._spool.flush()
        behind = [found for line in self._spool.waiting() if (found := _step(line)) is not None and found > step]
        size, furthest = _cut_point(self.folder / SPOOL, step)
        furthest = max([*behind, *([] if furthest is None else [furthest])], default=None)
        if furthest is not None:
            record_roll_back(self.folder, step, furthest)
        self._spool.cut(size, lambda line: (_step(line) or 0) <= step)
        self._spool.sync()

    def close(self) -> None:
        self._spool.close()


def read_metrics(run_folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off by a kill is left out. InputError for a line that is not JSON."""
    path = run_folder / SPOOL
    if not path.exists():
        return
    with (
        open(path, "rb") as file,
        contextlib.suppress(Changed),
    ):  # a run that rolls back meanwhile: what was there before
        for raw, behind in lines_behind(file.fileno(), 0, b""):
            yield parse(raw, path, behind - len(raw))


def parse(raw: bytes, path: Path, offset: int) -> dict[str, Any]:
    """A line of the spool; InputError that names the byte if it is not JSON."""
    try:
        line = json.loads(raw)
    except ValueError:
        line = None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise InputError(
            f"{path}: the line at byte {offset} is not JSON with a step; restore the file or cut it off there"
        )
    return line


def last_step(run_folder: Path) -> int:
    """The step of the last whole line; 0 without one."""
    path = run_folder / SPOOL
    if path.exists():
        for raw, _ in lines_backwards(path):
            if raw.endswith(b"\n") and (step := _step(raw)) is not None:
                return step
    return 0


def truncate_metrics(run_folder: Path, last: int) -> None:
    """Drops every line after step `last`, and what a crash left behind it: those steps will be taken again."""
    path = run_folder / SPOOL
    if not path.exists():
        return
    size, furthest = _cut_point(path, last)
    if furthest is not None:
        record_roll_back(
            run_folder, last, furthest
        )  # first: a kill in between leaves it to be done again, not forgotten
    if size < path.stat().st_size:
        with open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


def _cut_point(path: Path, last: int) -> tuple[int, Optional[int]]:
    """(bytes up to the last whole line of a step <= `last`, the highest step behind them). Lines are in order of their steps."""
    furthest: Optional[int] = None
    for raw, behind in lines_backwards(path) if path.exists() else ():
        step = _step(raw)
        if step is not None and step <= last and raw.endswith(b"\n"):
            return behind, furthest
        if step is not None and step > last:
            furthest = step if furthest is None else max(furthest, step)
    return 0, furthest


def _step(raw: bytes) -> Optional[int]:
    try:
        step = json.loads(raw)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
