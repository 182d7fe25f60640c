"""Being asked to leave: by Slurm before a time limit, by a higher job, by a person. Training stops at a step boundary only.

A signal may reach any one rank. It is only noted; at the next step boundary the ranks compare notes, and if any of them was asked,
all save a checkpoint and leave with exit code ASKS_FOR_REQUEUE. A second signal means that there is no time for that: the
process ends at once with the same code, and the newest complete checkpoint stands.

Slurm signals every process of a job step, and a parent may forward what it gets: the same request within SAME_REQUEST_SECONDS
counts once. Loader processes never see the signals.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from typing import Optional

ASKS_FOR_REQUEUE = 75  # EX_TEMPFAIL
SAME_REQUEST_SECONDS = 2.0


class Preemption:
    """Notes the signals from its creation on. One in a process, made in its main thread.

    asked: the name of the first signal that came, None before.
    """

    def __init__(self, names: Sequence[str]):
        """names: of signals without SIG, `TERM` among them or not."""
        self.asked: Optional[str] = None
        self._numbers = [signal.Signals[f"SIG{name}"] for name in dict.fromkeys(names)]
        # A handler in Python runs between two instructions of the main thread, which may be inside a collective for minutes. The
        # byte that the interpreter writes for each signal is read by a thread at once.
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        threading.Thread(target=self._listen, name="preemption", daemon=True).start()
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in self._numbers:
            signal.signal(number, _noted_elsewhere)

    def _listen(self) -> None:
        first = 0.0
        while received := os.read(self._read, 1):
            if received[0] not in self._numbers:
                continue
            if self.asked is None:
                self.asked, first = signal.Signals(received[0]).name, time.monotonic()
            elif time.monotonic() - first > SAME_REQUEST_SECONDS:
                os.write(2, b"asked twice to leave: leaving at once; the newest complete checkpoint stands\n")
                os._exit(ASKS_FOR_REQUEUE)

    def shield_loaders(self) -> None:
        """Starts, in the main thread, the process that loader processes are forked from, the signals blocked for all of them.

        One that is killed by a signal meant for its rank would end the rank in the middle of a step.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {*self._numbers, signal.SIGUSR2})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _noted_elsewhere(number: int, frame: object) -> None:
    """Keeps the signal's default, the end of the process, away."""
