"""Cells trained on this machine, a few at a time, the longest first. No cell's failure stops another one."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Optional

from pretrain.loop.preemption import ASKS_FOR_REQUEUE
from pretrain.quantities import duration
from pretrain.study.design.cells import Cell
from pretrain.study.design.plan import Planned
from pretrain.study.running.processes import LEAVE_SECONDS, CellProcess, environment
from pretrain.study.running.results import Results

MISTAKE, GIVEN_UP = 2, 77  # exit codes after which another start would end alike
TRIES = 2  # of a cell in one `study run`, where its end may pass
AGAIN_SECONDS = 2.0  # a second Ctrl-C after so long means now
POLL_SECONDS, SAY_SECONDS, WRITE_SECONDS = 0.2, 60.0, 15.0


@dataclass
class Asked:
    """What asked the queue to leave: a signal's number, 0 for the time limit; None: nothing. now: without waiting."""

    by: Optional[int] = None
    now: bool = False
    at: float = 0.0

    def ask(self, by: int) -> None:
        if self.by is None:
            self.by, self.at = by, time.monotonic()
        elif time.monotonic() - self.at > AGAIN_SECONDS:
            self.now = True

    @property
    def code(self) -> int:
        """The exit code of a command that was asked to leave."""
        return 130 if self.by == signal.SIGINT else ASKS_FOR_REQUEUE


@contextmanager
def listening() -> Iterator[Asked]:
    """Notes Ctrl-C, TERM and HUP instead of ending at them. In the main thread."""
    asked = Asked()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda got, frame: asked.ask(got)) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LocalQueue:
    """One `study run` on this machine.

    jobs: cells at a time. gpus: of this machine. timeout: seconds after which cells are asked to leave (0: none). seconds_of: how
    long a cell is thought to take, None if nobody knows. after: called when a cell has ended.
    """

    def __init__(
        self,
        planned: Planned,
        results: Results,
        asked: Asked,
        *,
        jobs: int,
        gpus: int = 0,
        timeout: float = 0.0,
        seconds_of: Callable[[Cell], Optional[float]] = lambda cell: None,
        after: Callable[[Cell], None] = lambda cell: None,
        say: Callable[[str], None] = print,
    ):
        self._planned, self._results, self._asked = planned, results, asked
        self._jobs, self._gpus, self._timeout = jobs, gpus, timeout
        self._seconds_of, self._after, self._say = seconds_of, after, say
        self._running: dict[int, tuple[Cell, CellProcess]] = {}  # by place
        self._tries: dict[str, int] = {}
        self._begun = time.monotonic()
        self._said = self._written = self._begun
        self._steps_done = self._steps_all = 0.0

    def run(self, cells: Sequence[Cell]) -> int:
        """Trains them; 0, or what asked it to leave says (75, 130). Nothing runs any more when it returns."""
        # Of equal compute, what takes more steps takes longer: small models are the slowest for their FLOPs.
        waiting = sorted(cells, key=lambda cell: (round(math.log2(cell.C)), cell.steps), reverse=True)
        self._all = len(waiting)
        self._work_all = sum(cell.C for cell in waiting)
        self._work_done = 0.0
        ended = 0
        try:
            while waiting or self._running:
                if self._timeout and time.monotonic() - self._begun > self._timeout and self._asked.by is None:
                    self._say(f"--timeout {self._timeout:g} s is over")
                    self._asked.ask(0)
                if self._asked.by is not None:
                    self._leave()
                    return self._asked.code
                for place in range(self._jobs):
                    if waiting and place not in self._running:
                        self._start(place, waiting.pop(0))
                for place, (cell, process) in list(self._running.items()):
                    if process.code() is not None:
                        del self._running[place]
                        if self._again(cell, process):
                            waiting.insert(0, cell)
                            continue
                        ended += 1
                        self._over(cell, ended)
                self._keep_up()
                time.sleep(POLL_SECONDS)
            return 0
        finally:
            for _, process in self._running.values():
                process.kill()
            self._results.write()

    def _start(self, place: int, cell: Cell) -> None:
        self._tries[cell.id] = self._tries.get(cell.id, 0) + 1
        config = self._planned.config_file(cell)
        log = self._planned.folder / "logs" / f"{cell.id}.log"
        environ = environment(place, self._jobs, cell.ranks, self._gpus)
        self._running[place] = (cell, CellProcess(cell.id, config, log, cell.ranks, environ))
        expected = self._seconds_of(cell)
        about = f", about {duration(expected)}" if expected else ""
        again = f", try {self._tries[cell.id]}" if self._tries[cell.id] > 1 else ""
        self._say(f"start  {cell.id}: {cell.steps} steps{about}{again}")

    def _again(self, cell: Cell, process: CellProcess) -> bool:
        """Notes how a cell ended; whether it gets another try."""
        end = process.end(self._tries[cell.id])
        process.kill()  # what it may have left behind in its group
        self._results.ended(cell, end)
        if end.code == 0 or self._results.of(cell).final or end.code in (MISTAKE, GIVEN_UP) or end.diverged:
            return False
        if self._tries[cell.id] >= TRIES:
            return False
        self._say(f"again  {cell.id}: ended with code {end.code}: {end.said}")
        return True

    def _over(self, cell: Cell, ended: int) -> None:
        found = self._results.write(self._names())[cell.id]
        self._work_done += cell.C
        spent = time.monotonic() - self._begun
        left = spent * (self._work_all / self._work_done - 1)
        if found.status == "done":
            error = f" +- {found.loss_se:.4f}" if found.loss_se is not None else ""
            what = f"done   {cell.id}: loss {found.loss:.4f}{error}"
        else:
            what = f"OUT    {cell.id}: {found.reason}"
        self._say(f"{what}; {ended} of {self._all}, about {duration(left)} left")
        self._after(cell)

    def _keep_up(self) -> None:
        now = time.monotonic()
        if now - self._written > WRITE_SECONDS:
            self._written = now
            self._results.write(self._names())
        if now - self._said > SAY_SECONDS and self._running:
            self._said = now
            at = [
                f"{cell.id} at {self._results.of(cell, True).step}/{cell.steps}" for cell, _ in self._running.values()
            ]
            self._say(f"       {'; '.join(at)}")

    def _names(self) -> frozenset[str]:
        return frozenset(cell.id for cell, _ in self._running.values())

    def _leave(self) -> None:
        """Asks what runs to save and leave, and waits for that; not for ever."""
        why = signal.Signals(self._asked.by).name if self._asked.by else "the time limit"
        self._say(f"{why}: {len(self._running)} cells are asked to save and leave; `study run` goes on from there")
        deadline = time.monotonic() + LEAVE_SECONDS
        for _, process in self._running.values():
            process.leave()
        while any(process.code() is None for _, process in self._running.values()):
            if time.monotonic() > deadline or self._asked.now:
                self._say("what has not left by now is ended; its newest checkpoint stands")
                break
            time.sleep(POLL_SECONDS)
        for cell, process in self._running.values():
            process.kill()
            end = process.end(self._tries[cell.id])
            self._results.ended(cell, replace(end, code=ASKS_FOR_REQUEUE))
        self._running.clear()
