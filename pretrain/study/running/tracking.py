"""A study in MLflow: one parent run, a child for each cell. Cells only write files; this process alone ships them.

What was shipped is kept in STUDY/mlflow.json and in each cell's own mlflow.json, so a dead server stops nothing, and another
round ships nothing twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from pretrain.load_config import to_dict
from pretrain.study.design.cells import Cell
from pretrain.study.design.plan import BASE, FAMILY, PLAN, STUDY, Planned, begun
from pretrain.study.running.results import RESULTS, Result, Results, read_ends
from pretrain.tracking.code_version import code_version
from pretrain.tracking.metric_log import SPOOL
from pretrain.tracking.mlflow_run import NotNow, attach, connect, find_or_create, plain_error
from pretrain.tracking.run_events import read_events, record_state, record_version
from pretrain.tracking.shipping import read_state, ship, shipping_lock, write_state

EVERY_SECONDS, CLOSE_SECONDS = 20.0, 90.0
LONGEST_PAUSE_SECONDS = 300.0  # between tries of a server that fails
_FILES = (STUDY, BASE, FAMILY, PLAN, RESULTS, "fit.json")


def ship_study(planned: Planned, results: Results, wait: float = 0.0, at_work: bool = False) -> int:
    """Ships what MLflow lacks of the study and of its cells; how many points. Raises NotNow, or whatever MLflow raises.

    at_work: a cell that has begun and is not over is running, not cut.
    """
    uri = planned.tracking_uri
    if uri is None:
        return 0
    with shipping_lock(planned.folder, wait):
        client, state = connect(uri), read_state(planned.folder)

        def keep() -> None:
            write_state(planned.folder, state)

        state, run = attach(client, state, None)
        if run is None:
            name = planned.study.name
            state["run_id"] = find_or_create(client, uri, planned.experiment, name, planned.folder, state, keep)
            state["children"], state["files"] = {}, {}
            about = {"design": planned.study.design, "count": planned.count, "flops": planned.flops}
            for key, value in about.items():
                client.set_tag(state["run_id"], f"study.{key}", value)
        keep()
        parent, sent, found = state["run_id"], 0, {cell.id: results.of(cell, at_work) for cell in planned.cells}
        for cell in planned.runnable():
            if begun(planned.folder, cell.id):
                sent += _child(planned, cell, found[cell.id], client, parent, state.setdefault("children", {}))
                keep()
        _files(planned.folder, client, parent, state.setdefault("files", {}), keep)
        over = all(found[cell.id].final for cell in planned.runnable())
        if state.get("over") != over:
            client.set_terminated(parent, "FINISHED") if over else client.update_run(parent, status="RUNNING")
            state["over"] = over
            keep()
        return sent


def _child(planned: Planned, cell: Cell, result: Result, client: Any, parent: str, children: dict[str, Any]) -> int:
    """Points and standing of one cell, if there is anything new."""
    run = planned.run_folder(cell)
    if result.final:
        standing = "finished" if result.status == "done" else "failed"
        said = [event["state"] for event in read_events(run) if event["what"] == "state"]
        if not said or said[-1] != standing:
            record_state(run, standing, result.step)
    mark = [(run / SPOOL).stat().st_size, result.status, result.reason]
    known = children.get(cell.id, {})
    if known.get("mark") == mark:
        return 0
    config = planned.config(cell)
    assert config is not None, "a cell that runs has a config"
    if not known:
        record_version(run, "code", code_version(), 0)
    sent = ship(run, str(planned.tracking_uri), planned.experiment, cell.id, to_dict(config), wait=1.0)
    identity = read_state(run)["run_id"]
    tags: dict[str, Any] = {"study.status": result.status, "study.reason": result.reason}
    if known.get("run_id") != identity:
        tags |= {"mlflow.parentRunId": parent, "study": planned.study.name}
        tags |= {
            f"study.{name}": getattr(cell, name) for name in ("objective", "size", "N", "D", "C", "budget", "repeat")
        }
    for name, value in tags.items():
        client.set_tag(identity, name, "" if value is None else str(value))
    children[cell.id] = {"run_id": identity, "mark": mark}
    return sent


def _files(folder: Path, client: Any, parent: str, sent: dict[str, Any], keep: Callable[[], None]) -> None:
    """study.yaml, results.csv, fit.json, the report: each when it changes."""
    for path in [*(folder / name for name in _FILES), *sorted((folder / "report").glob("*"))]:
        if not path.is_file():
            continue
        mark = [path.stat().st_size, path.stat().st_mtime_ns]
        name = path.relative_to(folder).as_posix()
        if sent.get(name) != mark:
            client.log_artifact(parent, str(path), name.rpartition("/")[0] or None)
            sent[name] = mark
            keep()


class StudyShipper:
    """A daemon thread that ships while cells train. What fails is tried again after growing pauses, and stops nothing."""

    def __init__(self, planned: Planned, say: Callable[[str], None] = print):
        self._planned, self._say = planned, say
        self._stop = threading.Event()
        self.error: Optional[str] = None
        self._thread: Optional[threading.Thread] = None
        if planned.tracking_uri is not None:
            self._thread = threading.Thread(target=self._repeat, name="study-shipper", daemon=True)
            self._thread.start()

    def _repeat(self) -> None:
        failures = 0
        results = Results(self._planned)  # a reader of its own: the queue's is not to be used from two threads
        while True:
            pause = min(EVERY_SECONDS * 2.0**failures, LONGEST_PAUSE_SECONDS)
            last = self._stop.wait(pause)
            try:
                results.ends = read_ends(self._planned.folder)
                ship_study(self._planned, results, wait=5.0 if last else 0.0, at_work=not last)
                failures, self.error = 0, None
            except NotNow as error:
                self.error = plain_error(error) if last else self.error
            except Exception as error:  # whatever the tracker does, the study goes on
                failures, self.error = min(failures + 1, 16), plain_error(error)
                if failures == 1:
                    self._say(f"MLflow does not take the study ({self.error}); it goes on, and all is shipped later")
            if last:
                return

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Ships what is left; waits `seconds` at most."""
        if self._thread is None:
            return
        self._stop.set()
        began = time.monotonic()
        self._thread.join(seconds)
        if self._thread.is_alive() or self.error:
            why = self.error or f"still busy after {time.monotonic() - began:.0f} s"
            self._say(
                f"MLflow lacks a part of the study ({why}): `study run {self._planned.folder} --collect` ships the rest"
            )
