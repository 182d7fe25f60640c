"""Files that go to MLflow beside the metrics: each version of the config and of the code, and logged samples, each once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml

from pretrain.tracking.mlflow_run import connect
from pretrain.tracking.run_events import read_events
from pretrain.tracking.shipping import read_state, shipping_lock, write_state

STATE = "mlflow-artifacts.json"
LOCK = ".mlflow-artifacts.lock"
SETTLED_SECONDS = 2.0  # a sample that was written just now may not be whole


def ship_artifacts(run_folder: Path, uri: str, *, wait: float = 0.0, last: bool = False) -> int:
    """Sends what the run in MLflow lacks; returns how many files. Nothing while the run does not exist there yet.

    `last`: also samples of this moment. A file that fails ends the round; what was sent before it is not sent again. Raises
    NotNow, or whatever MLflow and the store behind it raise.
    """
    with shipping_lock(run_folder, wait, LOCK):
        run_id = read_state(run_folder).get("run_id")
        if run_id is None:
            return 0
        state = read_state(run_folder, STATE)
        if state.get("run_id") != run_id:
            state = {"run_id": run_id, "sent": {}}
        sent: dict[str, Any] = state["sent"]
        client, count = None, 0
        for name, mark, source in _wanted(run_folder, last):
            if sent.get(name) == mark:
                continue
            client = client or connect(uri)
            if isinstance(source, Path):
                client.log_artifact(run_id, str(source), name.rpartition("/")[0])
            else:
                client.log_text(run_id, source, name)
            sent[name] = mark
            count += 1
            write_state(run_folder, state, STATE)
        return count


def _wanted(run_folder: Path, last: bool) -> list[tuple[str, Any, Path | str]]:
    """(name in the store, what changes when its content does, the file or the text)."""
    wanted: list[tuple[str, Any, Path | str]] = []
    for event in read_events(run_folder):
        name = f"{event['what']}/{event['what']}.v{event.get('version')}"
        if event["what"] == "config":
            wanted.append((f"{name}.yaml", event["time"], yaml.safe_dump(event["values"], sort_keys=False)))
        elif event["what"] == "code":
            wanted.append((f"{name}.json", event["time"], json.dumps(event["values"], indent=2) + "\n"))
    for path in sorted((run_folder / "samples").glob("*.txt")):
        stat = path.stat()
        if last or time.time() - stat.st_mtime > SETTLED_SECONDS:
            wanted.append((f"samples/{path.name}", [stat.st_size, stat.st_mtime_ns], path))
    return wanted
