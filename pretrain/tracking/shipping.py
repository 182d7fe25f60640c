"""Ships to MLflow what it lacks of a run: events first, then points, then how the run stands.

What was shipped is kept in mlflow.json: the run, how far each spool was read, and the highest step of each metric. A step
of a metric goes out once: MLflow cannot delete points, so steps that are taken again keep their first values and are named
by a tag. A point is sent again only when nobody knows whether the store took it, with the same step, time and value, which
MLflow's stores keep once; before that the store is asked what it has.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

from data.durable import take_lock
from pretrain.tracking.metric_log import SPOOL, parse
from pretrain.tracking.mlflow_run import NotNow, attach, connect, find_or_create
from pretrain.tracking.run_events import STATES, read_events, record_version
from pretrain.tracking.run_tags import code_tags, config_tags, params_of
from pretrain.tracking.spool import Changed, lines_behind
from pretrain.tracking.system_spool import new_samples, spools

STATE = "mlflow.json"
LOCK = ".mlflow.lock"
BATCH = 900  # metrics a call; MLflow takes 1000, and 1 MB
_TAGS = 90  # params or tags a call; MLflow takes 100 of each


def read_state(run_folder: Path, name: str = STATE) -> dict[str, Any]:
    """What mlflow.json says; {} when it is not there or a crash spoilt it (the checkpoint knows the run as well)."""
    try:
        state = json.loads((run_folder / name).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(run_folder: Path, state: dict[str, Any], name: str = STATE) -> None:
    temporary = run_folder / f".{name}.tmp"
    with open(temporary, "w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, run_folder / name)


@contextlib.contextmanager
def shipping_lock(run_folder: Path, seconds: float, name: str = LOCK) -> Iterator[None]:
    """One process or thread ships a run at a time; NotNow if another one still does after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        try:
            lock = take_lock(run_folder / name)
            break
        except BlockingIOError:
            if time.monotonic() >= until:
                raise NotNow("another process is shipping this run") from None
            time.sleep(0.1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process that is being started holds the descriptor too, up to its exec
        os.close(lock)


def ship(
    run_folder: Path,
    uri: str,
    experiment: str,
    run_name: str,
    config: dict[str, Any],
    run_id: Optional[str] = None,
    *,
    check: bool = True,
    wait: float = 0.0,
    progress: Optional[Callable[[int, int], None]] = None,
) -> int:
    """Ships every event and point that MLflow does not have yet; returns how many points of metrics.jsonl went out.

    run_id: the run that a checkpoint names, used when mlflow.json names none. check: ask the store first what it has; to be
    left out only right after a round that went well. wait: seconds for another process that ships this run. progress:
    called with (bytes of the spool read, its size). Raises NotNow, or whatever MLflow raises.
    """
    with shipping_lock(run_folder, wait):
        return _Round(run_folder, uri, progress).run(experiment, run_name, config, run_id, check)


class _Round:
    def __init__(self, run_folder: Path, uri: str, progress: Optional[Callable[[int, int], None]]):
        self.folder, self.uri, self.progress = run_folder, uri, progress
        self.client = connect(uri)
        self.state = read_state(run_folder)
        self.pending: list[Any] = []
        self.reached: list[Callable[[], None]] = []  # what holds once the pending points are taken
        self.ahead: dict[str, int] = {}  # highest step of each metric that is pending or taken in this round
        self.sent = 0

    def keep(self) -> None:
        write_state(self.folder, self.state)

    def run(self, experiment: str, run_name: str, config: dict[str, Any], run_id: Optional[str], check: bool) -> int:
        run = None
        if check or "run_id" not in self.state:
            self.state, run = attach(self.client, self.state, run_id)
            if run is None:
                self.state.pop("run_id", None)
                self.state["run_id"] = find_or_create(
                    self.client, self.uri, experiment, run_name, self.folder, self.state, self.keep
                )
            self.keep()
        self.run_id = self.state["run_id"]
        if not any(event["what"] == "config" for event in read_events(self.folder)):
            record_version(self.folder, "config", config, 0)
        events = read_events(self.folder)
        self._events(events, run)
        self._points()
        count = self.sent
        self._system()
        self._standing(events)
        return count

    def _events(self, events: list[dict[str, Any]], run: Any) -> None:
        """Params once, everything else as tags: MLflow refuses to change a param."""
        from mlflow.entities import Param, RunTag

        done = min(self.state.get("events", 0), len(events))
        if done == len(events):
            return
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for at, event in enumerate(events[done:], done):
            before = [e for e in events[:at] if e["what"] == event["what"]]
            if event["what"] == "config" and not before:
                recorded = (run or self.client.get_run(self.run_id)).data.params
                params, changed = params_of(event, recorded)
                tags |= changed
            elif event["what"] == "config":
                tags |= config_tags(before[-1], event)
            elif event["what"] == "code":
                tags |= code_tags(before[-1] if before else None, event)
            elif event["what"] == "rolled_back":
                tags[f"rolled_back.{event['step']}"] = f"steps {event['step'] + 1}..{event['last']} were taken again"
        for some in _parts(params):
            self.client.log_batch(self.run_id, params=[Param(k, v) for k, v in some])
        for some in _parts(tags):
            self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in some])
        self.state["events"] = len(events)
        self.keep()

    def _points(self) -> None:
        """metrics.jsonl from where it was read; from its start if it was cut or replaced: the steps say what is new."""
        path = self.folder / SPOOL
        if not path.exists():
            return
        with open(path, "rb") as file:
            before = self.state.get("last", "").encode("latin-1")
            starts = [(self.state.get("offset", 0), before)] if before else []
            for offset, last in [*starts, (0, b""), (0, b"")]:
                try:
                    for raw, behind in lines_behind(file.fileno(), offset, last):
                        self._line(parse(raw, path, behind - len(raw)), raw, behind, path)
                    break
                except Changed:
                    self.send()
        self.send()

    def _line(self, line: dict[str, Any], raw: bytes, behind: int, path: Path) -> None:
        shipped: dict[str, int] = self.state.setdefault("shipped", {})
        step = line["step"]
        values = {_name(name): value for name, value in line.items() if name not in ("step", "time") and _number(value)}
        new = {
            name: value for name, value in values.items() if step > max(shipped.get(name, -1), self.ahead.get(name, -1))
        }
        self.ahead.update(dict.fromkeys(new, step))

        def reached() -> None:
            shipped.update(dict.fromkeys(new, step))
            self.state["offset"], self.state["last"] = behind, raw.decode("latin-1")
            if self.progress:
                self.progress(behind, path.stat().st_size)

        self.add(new, int(line.get("time", 0) * 1000), step, reached)

    def _system(self) -> None:
        """Each host's own spool. Its times only grow, so they say what is new, whatever the steps do."""
        states = self.state.setdefault("system", {})
        for path in spools(self.folder):
            for line, position in new_samples(path, states.get(path.name, {})):
                values = {_name(name): value for name, value in line.items() if name not in ("step", "time")}
                keep = {name: value for name, value in values.items() if _number(value)}

                def reached(name: str = path.name, position: dict[str, Any] = position) -> None:
                    states[name] = position

                self.add(keep, int(line["time"] * 1000), line["step"], reached)
        self.send()

    def _standing(self, events: list[dict[str, Any]]) -> None:
        """How the run stands goes last: a run that says FINISHED has its points."""
        standing = [(at, event) for at, event in enumerate(events) if event["what"] == "state"]
        if not standing or self.state.get("standing") == standing[-1][0]:
            return
        at, event = standing[-1]
        status = STATES[event["state"]]
        if status in ("FINISHED", "FAILED"):
            self.client.set_terminated(self.run_id, status, end_time=int(event["time"] * 1000))
        else:
            self.client.update_run(self.run_id, status=status)
        self.client.set_tag(self.run_id, "palimpsest.state", event["state"])
        self.state["standing"] = at
        self.keep()

    def add(self, values: dict[str, float], milliseconds: int, step: int, reached: Callable[[], None]) -> None:
        """One line's points; `reached` is called when the last of them was taken."""
        from mlflow.entities import Metric

        for name, value in values.items():
            self.pending.append(Metric(name, float(value), milliseconds, step))
            if len(self.pending) == BATCH:
                self.send()
        self.reached.append(reached)

    def send(self) -> None:
        if self.pending:
            self.client.log_batch(self.run_id, metrics=self.pending)
            self.sent += len(self.pending)
        for reached in self.reached:
            reached()
        if self.reached:
            self.keep()
        self.pending, self.reached = [], []


def _parts(values: dict[str, str]) -> Iterator[list[tuple[str, str]]]:
    items = list(values.items())
    for at in range(0, len(items), _TAGS):
        yield items[at : at + _TAGS]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _name(name: str) -> str:
    """`name` as MLflow takes it: letters, digits, _ - . space : and single slashes, 250 of them at most."""
    plain = posixpath.normpath(re.sub(r"[^\w/.\- :]", "_", name)).strip("/")
    return plain[:250] if plain not in ("", ".") and not plain.startswith("..") else "_"
