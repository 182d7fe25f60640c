"""Seconds of calls on a CPU or a GPU: warm-up apart, median with least and most, bounded by a deadline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

LEAST_REPEATS = 3


class Timing(NamedTuple):
    """Seconds of `repeats` calls."""

    median: float
    least: float
    most: float
    repeats: int

    def cell(self) -> dict[str, float]:
        """As a table cell."""
        return {"median_s": self.median, "least_s": self.least, "most_s": self.most, "repeats": self.repeats}


def summary(seconds: Sequence[float]) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_phases(
    phases: Sequence[Callable[[], object]],
    device: str,
    repeats: int,
    deadline: float = float("inf"),
    before: Callable[[], object] = lambda: None,
    warmup: int = 2,
) -> list[Timing]:
    """One Timing per phase, and last the Timing of all phases of a repeat together.

    A repeat runs `before` (not timed), then the phases in order. On a GPU the marks are CUDA events, so a phase lasts
    from the end of the previous one's work to the end of its own. After `deadline` (time.monotonic) no repeat begins,
    beyond the least of 3.
    """
    laps: list[list[float]] = []
    for repeat in range(warmup + repeats):
        if len(laps) >= LEAST_REPEATS and time.monotonic() > deadline:
            break
        before()
        synchronize(device)
        marks = [_mark(device)]
        for phase in phases:
            phase()
            marks.append(_mark(device))
        synchronize(device)
        if repeat >= warmup:
            laps.append([_between(a, b) for a, b in zip(marks, marks[1:], strict=False)])
    columns = [summary(column) for column in zip(*laps, strict=True)]
    return [*columns, summary([sum(lap) for lap in laps])]


def _mark(device: str) -> torch.cuda.Event | float:
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(a: torch.cuda.Event | float, b: torch.cuda.Event | float) -> float:
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3


class PeakMemory:
    """Device memory between `start` and `bytes`; none on a CPU, where the allocator keeps no count."""

    def __init__(self, device: str):
        self.device = device

    def start(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        """Most bytes allocated since `start`."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def extra(self) -> int | None:
        """The same above what was allocated at `start`."""
        return None if self.device != "cuda" else torch.cuda.max_memory_allocated() - self.before
