"""When a run is saved, and what becomes of it when a save fails: a full disk does not end a week of training.

A save that fails leaves the older checkpoints as they are. Stopping then would throw away all work since the newest of them;
going on costs nothing and often somebody frees the disk. So training goes on, says so loudly and tries again soon; only at
the end, where there is nothing to go on with, the failure becomes the run's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

from parallel import checkpoint
from parallel.async_save import AsyncSaver
from parallel.boxes import Boxes
from parallel.errors import CheckpointError

State = Callable[[], Mapping[str, Boxes]]
RETRIES_PER_INTERVAL = 10  # after a failure: this many tries where there would be one save
LAST_TRIES, LAST_PAUSE_SECONDS = 20, 30.0  # of the save at the end of a run: ten minutes to free some space


class Saving:
    """Saves one run's checkpoints, in the foreground or behind training. Every call is collective.

    failed: saves in a row that failed, as known at this step. A save behind training is listened to a few steps after it began
    and from then on until it is over, so that a failure is tried again as soon as in the foreground.
    """

    def __init__(
        self,
        root: Path,
        *,
        every: int,
        keep: int,
        asynchronous: bool,
        timeout_seconds: int,
        say: Callable[[str], None],
        saved: Callable[[], None] = lambda: None,
        saved_at: int = -1,
    ):
        """every: steps between saves (0 = only at the end). saved: called once a checkpoint is complete. saved_at: the step of the
        checkpoint that the run went on from.
        """
        self.failed = 0
        self._root, self._every, self._keep, self._say, self._heard = root, every, keep, say, saved
        self._saver = AsyncSaver(timeout_seconds) if asynchronous else None
        self._saved_at, self._in_flight = saved_at, -1
        self._retry_at = self._listen_at = -1

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps. Hears of a save in flight now and then, without waiting for it."""
        if self._saver and step == self._listen_at:
            if not self._saver.landed():
                self._listen_at = step + self._soon
            elif not self._land():
                self._retry_at = step
        return (self._every > 0 and step % self._every == 0) or step == self._retry_at

    def save(self, step: int, state: State, trainer: Mapping[str, Any]) -> None:
        """Saves, or says loudly why not; RuntimeError if a rank is gone."""
        self._land()
        try:
            self._begin(step, state(), trainer)
        except CheckpointError as error:
            self._failed(step, error)
        if self.failed:
            self._retry_at = step + self._soon

    def finish(self, step: int, state: State, trainer: Mapping[str, Any]) -> None:
        """After the last step: its checkpoint is complete on return. CheckpointError if it cannot be, after some patience."""
        self._land()
        for left in reversed(range(LAST_TRIES)):
            if self._saved_at == step:
                return
            try:
                self._begin(step, state(), trainer)
                self._complete()
            except CheckpointError as error:
                if not left:
                    raise
                self._failed(step, error, f"the run is at its end: {left} more tries, every {LAST_PAUSE_SECONDS:.0f} s")
                time.sleep(LAST_PAUSE_SECONDS)

    def leave(self, step: int, state: State, trainer: Mapping[str, Any]) -> None:
        """Before a run gives its place up: tried once, there is no time for patience. A failure is said; older ones stand."""
        self._land()
        if self._saved_at == step:
            return
        try:
            self._begin(step, state(), trainer)
            self._complete()
        except CheckpointError as error:
            self._failed(step, error, "the run leaves all the same and goes on from that one")

    def postpone(self, step: int) -> None:
        """What is due is not to be saved now: it is due again after the next step."""
        self._retry_at = step + 1

    def settle(self) -> None:
        """Waits until no save is in flight."""
        self._land()

    def rolled_back(self, step: int) -> None:
        """The run is back where its checkpoint of `step` left it (-1: at its beginning)."""
        self._saved_at, self._retry_at = step, -1

    def close(self) -> None:
        """On the way out, whatever the reason: a save in flight is completed."""
        if self._saver:
            self._land()
            self._saver.close()

    def _begin(self, step: int, state: Mapping[str, Boxes], trainer: Mapping[str, Any]) -> None:
        if self._saver is None:
            self._saved(step, checkpoint.save(self._root, step, state, trainer, self._keep))
            return
        self._saver.start(self._root, step, state, trainer, self._keep)
        self._in_flight, self._listen_at = step, step + self._soon

    @property
    def _soon(self) -> int:
        """Steps after which to look at a save, or to try again."""
        return max(1, self._every // RETRIES_PER_INTERVAL)

    def _land(self) -> bool:
        """Hears of the save in flight, waiting for it; whether it did not fail."""
        try:
            self._complete()
        except CheckpointError as error:
            self._failed(self._in_flight, error)
            return False
        return True

    def _complete(self) -> None:
        path = self._saver.wait() if self._saver else None
        if path:
            self._saved(self._in_flight, path)

    def _saved(self, step: int, path: Path) -> None:
        self._saved_at, self._retry_at, self.failed = step, -1, 0
        self._heard()
        self._say(f"step {step}: checkpoint {path}")

    def _failed(self, step: int, error: CheckpointError, what_next: Optional[str] = None) -> None:
        self.failed += 1
        newest = f"step {self._saved_at}" if self._saved_at >= 0 else "none"
        goes_on = f"training goes on and tries again within {self._soon} steps"
        self._say(
            f"WARNING: the checkpoint of step {step} was NOT saved ({self.failed} failed in a row, newest complete one: "
            f"{newest}): {error}; {what_next or goes_on}"
        )
