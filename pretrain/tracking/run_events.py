"""events.jsonl: what a tracker must hear of a run beside its points: configs, code versions, roll-backs, how it stands.

Like metrics.jsonl it is written first and shipped later, so a tracker that was dead for a week still hears of each.
A line is {"what": "config" | "code" | "rolled_back" | "state", "step", "time", ...}.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Optional

from pretrain.addresses import without_credentials
from pretrain.tracking.spool import say_on_stderr

EVENTS = "events.jsonl"
STATES = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "preempted": "SCHEDULED"}


def record_version(run_folder: Path, what: str, values: dict[str, Any], step: int) -> Optional[int]:
    """Appends `values` (sections and keys) as the next version of `what` ("config", "code") if they differ from the last one.

    Returns the number of the version that holds now. Nothing that looks like a credential is written.
    """
    values = without_credentials(values)
    versions = [event for event in read_events(run_folder) if event["what"] == what]
    if versions and versions[-1]["values"] == values:
        return len(versions)
    _append(run_folder, {"what": what, "version": len(versions) + 1, "step": step, "values": values})
    return len(versions) + 1


def record_roll_back(run_folder: Path, step: int, last: int) -> None:
    """Steps step + 1 .. last are taken again."""
    _append(run_folder, {"what": "rolled_back", "step": step, "last": last})


def record_state(run_folder: Path, state: str, step: int) -> None:
    """How the run stands: one of STATES, whose values are MLflow's words for it."""
    if state not in STATES:
        raise ValueError(f"a run is {', '.join(STATES)}, not {state}")
    _append(run_folder, {"what": "state", "step": step, "state": state})


def read_events(run_folder: Path) -> list[dict[str, Any]]:
    """Every whole line; what a crash left of one is passed over."""
    path = run_folder / EVENTS
    events = []
    for raw in path.read_bytes().splitlines() if path.exists() else []:
        try:
            event = json.loads(raw)
        except ValueError:
            continue
        if isinstance(event, dict) and "what" in event:
            events.append(event)
    return events


def _append(run_folder: Path, event: dict[str, Any]) -> None:
    """Never raises what the file system raises: a run goes on without an event."""
    path = run_folder / EVENTS
    line = json.dumps({"time": round(time.time(), 3), **event}).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # the last start died while it wrote
            if os.write(descriptor, b"\n" * torn + line) < len(line):
                raise OSError(0, "only a part was written")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        say_on_stderr(f"WARNING: {path} cannot be written ({error.strerror}): MLflow will not hear of {event['what']}")
