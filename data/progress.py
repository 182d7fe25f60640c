"""Show how long work gets on: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

PLAIN_SECONDS = 5.0


class StageTime(NamedTuple):
    """Seconds that a stage took, and seconds of all cores that this process alone worked in it."""

    wall: float
    cpu: float


class ByteProgress:
    """Progress of stages that work through bytes of text; silent when not `enabled`. `times` has the finished stages."""

    def __init__(
        self, enabled: bool = True, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.enabled, self.stream, self.clock = enabled, stream or sys.stderr, clock
        self.times: dict[str, StageTime] = {}

    def say(self, line: str) -> None:
        """Print one plain line."""
        if self.enabled:
            print(line, file=self.stream, flush=True)

    @contextmanager
    def stage(self, label: str, total_bytes: int | None = None) -> Iterator[Callable[[int], None]]:
        """Run one stage; the function it gives is called with the bytes done since the last call."""
        wall, cpu = time.monotonic(), time.process_time()
        with self._shown(label, total_bytes) as advance:
            yield advance
        self.times[label] = StageTime(time.monotonic() - wall, time.process_time() - cpu)

    @contextmanager
    def _shown(self, label: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        if not self.enabled:
            yield lambda done: None
        elif self.stream.isatty():
            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            ]
            with Progress(*columns, console=Console(file=self.stream)) as bar:
                task = bar.add_task(label, total=total_bytes)
                yield lambda done: bar.advance(task, done)
        else:
            yield _PlainStage(self, label, total_bytes).advance


class _PlainStage:
    def __init__(self, progress: ByteProgress, label: str, total_bytes: int | None) -> None:
        self.progress, self.label, self.total = progress, label, total_bytes
        self.done = 0
        self.started = self.printed = progress.clock()

    def advance(self, done: int) -> None:
        self.done += done
        now = self.progress.clock()
        if now - self.printed < PLAIN_SECONDS:
            return
        self.printed = now
        rate = self.done / (now - self.started)
        line = f"{self.label}: {self.done / 1e6:,.1f} MB"
        if self.total:
            line += f" of {self.total / 1e6:,.1f} MB ({100 * self.done / self.total:.0f}%)"
        line += f", {rate / 1e6:,.1f} MB/s"
        if self.total and 100 * self.done >= self.total:  # before that it would be a guess
            line += f", about {duration((self.total - self.done) / rate)} left"
        self.progress.say(line)


def duration(seconds: float) -> str:
    """Seconds as a person says them: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
