"""Metrics: appended to metrics.jsonl first (the source of truth), shipped to MLflow by a background thread afterwards.

The loop never waits for MLflow. What has been shipped is kept in mlflow.json beside the spool, so a dead server, a kill or
a resume loses nothing and ships nothing twice: `track sync` (or the next start) goes on where shipping stopped.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from data.errors import InputError
from pretrain.config import Config

SPOOL = "metrics.jsonl"
STATE = "mlflow.json"
SHIP_EVERY_SECONDS = 2.0
CLOSE_SECONDS = 30.0  # longest wait at the end of a run for the last points to be shipped
_BATCH = 900  # MLflow takes at most 1000 metrics a call


def tracking_uri(config: Config) -> Optional[str]:
    """The MLflow store: what the config says, by default sqlite in the runs' folder; None when switched off."""
    if config.tracking.uri == "none":
        return None
    return config.tracking.uri or f"sqlite:///{Path(config.run.dir).absolute() / 'mlflow.db'}"


class MetricLog:
    """Appends lines {"step", "time", metric: value, ...} to metrics.jsonl. Only rank 0 writes."""

    def __init__(self, run_folder: Path):
        self.path = run_folder / SPOOL
        self._file = open(self.path, "a", buffering=1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        # JSON has no NaN; a value that is not finite is kept as text and as a flag that can be plotted.
        finite: dict[str, Any] = {}
        for name, value in metrics.items():
            finite[name] = value if math.isfinite(value) else str(value)
            if not math.isfinite(value):
                finite[f"{name}_nonfinite"] = 1.0
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def read_metrics(run_folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off by a kill is left out."""
    for line, _ in _lines_from(run_folder, 0):
        yield line


def _lines_from(run_folder: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """(line, offset behind it) of the spool from a byte offset on."""
    path = run_folder / SPOOL
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
            except ValueError:
                raise InputError(
                    f"{path}: the line at byte {offset} is not JSON; restore the file or cut it off there"
                ) from None
            offset += len(raw)
            yield line, offset


def truncate_metrics(run_folder: Path, last_step: int) -> None:
    """Drops every line after `last_step`: those steps will be taken again."""
    kept = [line for line in read_metrics(run_folder) if line["step"] <= last_step]
    if state := read_state(run_folder):
        # Which lines were shipped is known by their steps; where to read on is only a short cut. It is dropped before the
        # spool changes: a kill in between leaves a start from 0 on the old spool, never an offset into another one.
        _write_state(run_folder, state | {"offset": 0, "resumed_at": last_step})
    temporary = run_folder / f".{SPOOL}.tmp"
    with open(temporary, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, run_folder / SPOOL)


def read_state(run_folder: Path) -> dict[str, Any]:
    path = run_folder / STATE
    return json.loads(path.read_text()) if path.exists() else {}


def _write_state(run_folder: Path, state: dict[str, Any]) -> None:
    temporary = run_folder / f".{STATE}.tmp"
    temporary.write_text(json.dumps(state))
    os.replace(temporary, run_folder / STATE)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: str(value)[:500]}
    return flat


def ship(
    run_folder: Path, uri: str, experiment: str, run_name: str, config: dict[str, Any], run_id: Optional[str] = None
) -> int:
    """Ships every point that MLflow does not have yet; returns how many. Raises whatever MLflow raises.

    A line goes out once: shipped lines are remembered by the highest step of each kind of metric (train, val, perf).
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import logging

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(tracking_uri=uri)
    state = read_state(run_folder)
    if "run_id" not in state:
        created = run_id or _create_run(client, experiment, run_name, run_folder)
        state = {"run_id": created, "shipped": {}, "params": run_id is not None}  # a run of before has its params
        _write_state(run_folder, state)
    if not state.get("params"):
        params = [Param(key, value) for key, value in _flatten(config).items()]
        client.log_batch(state["run_id"], params=params)
        _write_state(run_folder, state | {"params": True})
        state["params"] = True
    if state.get("resumed_at") is not None:
        _tag_roll_back(client, state)
        _write_state(run_folder, state)
    shipped: dict[str, int] = state["shipped"]
    pending: list[Any] = []
    sent, reached, position = 0, dict(shipped), state.get("offset", 0)

    def send() -> None:
        nonlocal sent
        client.log_batch(state["run_id"], metrics=pending)
        sent += len(pending)
        pending.clear()
        shipped.update(reached)
        state["offset"] = position
        _write_state(run_folder, state)

    for line, behind in _lines_from(run_folder, position):
        position = behind
        for name, value in line.items():
            kind = name.split("/")[0]
            if name in ("step", "time") or isinstance(value, str) or line["step"] <= shipped.get(kind, -1):
                continue
            pending.append(Metric(name, float(value), int(line["time"] * 1000), line["step"]))
            reached[kind] = line["step"]
        if len(pending) >= _BATCH - 50:
            send()
    if pending:
        send()
    return sent


def _tag_roll_back(client: Any, state: dict[str, Any]) -> None:
    """MLflow cannot delete points: steps that were shipped and are taken again keep their first values, and are named."""
    step, last = state.pop("resumed_at"), max(state["shipped"].values(), default=0)
    if last > step:
        client.set_tag(state["run_id"], f"rolled_back.{step}", f"steps {step + 1}..{last} were taken again")


def _create_run(client: Any, experiment: str, run_name: str, run_folder: Path) -> str:
    found = client.get_experiment_by_name(experiment)
    artifacts = (run_folder.parent / "mlartifacts").absolute().as_uri()
    identity = found.experiment_id if found else client.create_experiment(experiment, artifact_location=artifacts)
    return client.create_run(identity, run_name=run_name).info.run_id


class Shipper:
    """The background thread. Failures are counted and retried at the next round; they never reach the loop."""

    def __init__(
        self, run_folder: Path, uri: str, experiment: str, run_name: str, config: dict[str, Any], run_id: Optional[str]
    ):
        self._arguments = (run_folder, uri, experiment, run_name, config, run_id)
        self._stop = threading.Event()
        self.last_error: Optional[str] = None
        self._thread = threading.Thread(target=self._work, name="mlflow-shipper", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while True:
            stopping = self._stop.wait(SHIP_EVERY_SECONDS)
            try:
                ship(*self._arguments)
                self.last_error = None
            except Exception as error:  # whatever the tracker does, training goes on
                self.last_error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if stopping:
                return

    def close(self) -> Optional[str]:
        """Ships what is left, for CLOSE_SECONDS at most; the last error if something is still missing."""
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)
        return "still busy" if self._thread.is_alive() else self.last_error
