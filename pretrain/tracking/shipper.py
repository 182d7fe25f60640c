"""The background threads that ship a run while it trains. The loop only writes files; it never waits for MLflow."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from pretrain.tracking.artifacts import ship_artifacts
from pretrain.tracking.code_version import code_version
from pretrain.tracking.metric_log import last_step
from pretrain.tracking.mlflow_run import NotNow, plain_error
from pretrain.tracking.run_events import record_state, record_version
from pretrain.tracking.shipping import ship

SHIP_EVERY_SECONDS = 2.0
ARTIFACTS_EVERY_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 60.0  # between tries of a tracker that fails
SAY_AFTER_SECONDS = 60.0  # of failures
CLOSE_SECONDS = {"finished": 30.0, "failed": 10.0, "preempted": 5.0}  # longest wait for the last points


class Shipper:
    """Ships points and events from one thread, files from another: a store that hangs with a file holds no point up.

    config: sections and keys, recorded in MLflow once, each change of it later as tags. run_id: of the checkpoint that the
    run resumed from. artifacts: also send config, code version and samples. say: told once when the tracker has failed for a
    minute, and when it is back.
    """

    def __init__(
        self,
        run_folder: Path,
        uri: str,
        experiment: str,
        run_name: str,
        config: dict[str, Any],
        run_id: Optional[str],
        *,
        artifacts: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ):
        self._folder = run_folder
        self._arguments = (run_folder, uri, experiment, run_name, config, run_id)
        self._uri = uri
        self._code_known = False
        self.step = last_step(run_folder)  # the run goes on behind it
        record_version(run_folder, "config", config, self.step)
        record_state(run_folder, "running", self.step)
        self._workers = [_Worker("mlflow-shipper", self._ship, SHIP_EVERY_SECONDS, say)]
        if artifacts:
            self._workers.append(_Worker("mlflow-artifacts", self._ship_artifacts, ARTIFACTS_EVERY_SECONDS, say))

    def _ship(self, unsure: bool, last: bool) -> None:
        if not self._code_known:
            record_version(self._folder, "code", code_version(), self.step)
            self._code_known = True
        ship(*self._arguments, check=unsure, wait=2.0 if last else 0.0)

    def _ship_artifacts(self, unsure: bool, last: bool) -> None:
        ship_artifacts(self._folder, self._uri, wait=2.0 if last else 0.0, last=last)

    @property
    def last_error(self) -> Optional[str]:
        """Of the last round that failed, if none has succeeded since."""
        return next((worker.error for worker in self._workers if worker.error), None)

    def close(self, status: str = "finished", seconds: Optional[float] = None) -> Optional[str]:
        """Ships what is left and that the run is `finished`, `failed` or `preempted`; the error if something is still missing.

        Waits `seconds` at most (CLOSE_SECONDS by default: a preempted run has little time and goes on later).
        """
        record_state(self._folder, status, last_step(self._folder))
        until = time.monotonic() + (CLOSE_SECONDS[status] if seconds is None else seconds)
        for at, worker in enumerate(self._workers):  # files after points: the run must exist, and points matter more
            worker.stop()
            worker.join(until - time.monotonic())
            if at == 0 and worker.busy():
                break
        return next(("still busy" if w.busy() else w.error for w in self._workers if w.busy() or w.error), None)


class _Worker:
    """A daemon thread that repeats `work(unsure, last)`. Failures are retried after growing pauses; they reach nobody else."""

    def __init__(self, name: str, work: Callable[[bool, bool], None], every: float, say: Callable[[str], None]):
        self._work, self._every, self._say = work, every, say
        self._stop = threading.Event()
        self._random = random.Random(os.getpid())  # pauses of many runs should differ
        self.error: Optional[str] = None
        self._thread = threading.Thread(target=self._repeat, name=name, daemon=True)
        self._thread.start()

    def _repeat(self) -> None:
        failures, failing_since, said = 0, 0.0, False
        unsure = True  # whether the store may have more, or less, than is known here
        while True:
            pause = self._every
            if failures:
                longest = max(LONGEST_PAUSE_SECONDS, self._every)
                pause = min(self._every * 2.0 ** min(failures, 16), longest) * (0.5 + self._random.random() / 2)
            last = self._stop.wait(pause)
            try:
                self._work(unsure, last)
                if said:
                    self._say("MLflow takes metrics again; nothing is lost")
                failures, unsure, said, self.error = 0, False, False, None
            except NotNow as error:
                self.error = plain_error(error) if last else self.error
            except Exception as error:  # whatever the tracker does, training goes on
                failures, unsure, self.error = failures + 1, True, plain_error(error)
                if failures == 1:
                    failing_since = time.monotonic()
                elif not said and time.monotonic() - failing_since > SAY_AFTER_SECONDS:
                    self._say(
                        f"MLflow does not take metrics ({self.error}); training goes on and they are shipped later"
                    )
                    said = True
            if last:
                return

    def stop(self) -> None:
        self._stop.set()

    def join(self, seconds: float) -> None:
        self._thread.join(max(seconds, 0.0))

    def busy(self) -> bool:
        return self._thread.is_alive()
