"""What rank 0 shows while it trains: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Optional

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingDisplay:
    """Silent on every rank but 0."""

    def __init__(self, active: bool, start: int, stop: int, log_every: int):
        self.active = active
        self.stop = stop
        self.log_every = log_every
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._begun = time.monotonic()
        self._start = start
        self._bar: Optional[Progress] = None
        if active and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=16),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=stop, completed=start)
            self._bar.start()

    def step(self, step: int, metrics: dict[str, float]) -> Optional[str]:
        """`step` optimizer steps are done. The line that says so, where one is due."""
        loss, rate = metrics["train/loss"], metrics["perf/tokens_per_second"]
        if self._bar:
            self._bar.update(self._task, completed=step, description=f"loss {loss:.3f} {rate:,.0f} tok/s")
        if not (step == self.stop or (self.log_every and step % self.log_every == 0)):
            return None
        left = (time.monotonic() - self._begun) / max(step - self._start, 1) * (self.stop - step)
        line = (
            f"step {step}/{self.stop}  loss {loss:.4f}  grad norm {metrics['train/grad_norm']:.3f}  "
            f"lr {metrics['train/lr']:.2e}  {rate:,.0f} tokens/s  {left:.0f} s left"
        )
        if not self._bar:
            self.say(line)
        return line

    def say(self, text: str) -> None:
        if self.active:
            self.console.print(text, markup=False)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
