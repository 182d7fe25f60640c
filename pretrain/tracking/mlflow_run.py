"""The run in MLflow that a run folder belongs to: found again, or created, once. Every call has a short time-out and no retry."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from pretrain.addresses import plain_address
from pretrain.tracking.system_spool import spool_name

REQUEST_SECONDS = "10"  # longest silence of a server in a call
CREATE_PATIENCE = 60.0  # seconds after a creation without an answer in which none is tried again
KEY = "palimpsest.key"


class NotNow(Exception):
    """Nothing is wrong with the tracker; the round must be repeated later."""


def connect(uri: str) -> Any:
    """An MlflowClient. What it does by default (7 retries, 120 s each) is for scripts that can wait."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", REQUEST_SECONDS)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it prints the address with its password
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):  # behind the import, which sets them
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def attach(client: Any, state: dict[str, Any], run_id: Optional[str]) -> tuple[dict[str, Any], Any]:
    """(state of the shipping, the run as MLflow has it), of the run that `state` or else the checkpoint (`run_id`) names.

    A run that the store does not know (it was wiped, or is another one) gives a state that begins anew and no run.
    Steps that the store has are added to the state: an answer that was lost, or a state that was lost, ships nothing
    twice. Raises whatever MLflow raises.
    """
    wanted = list(dict.fromkeys(known for known in (state.get("run_id"), run_id) if known))
    for known in wanted:
        try:
            run = client.get_run(known)
        except Exception as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            continue
        if run.info.lifecycle_stage == "deleted":
            raise RuntimeError(
                f"run {known} was deleted in MLflow: restore it there, or remove mlflow.json for a new one"
            )
        if state.get("run_id") != known:
            state = {"run_id": known}
        _add_what_it_has(state, run)
        return state, run
    if wanted and state.get("replaces") != wanted[0]:
        state = {"replaces": wanted[0]}
    return state, None


def _add_what_it_has(state: dict[str, Any], run: Any) -> None:
    """The highest step of each metric; of a host's system metrics the newest time, whose line may be there in part only."""
    shipped, system = state.setdefault("shipped", {}), state.setdefault("system", {})
    for metric in run.data.to_proto().metrics:
        if metric.key.startswith("system/") and metric.key.count("/") == 2:
            position = system.setdefault(spool_name(metric.key.split("/")[1]), {})
            position["time"] = max(position.get("time", 0.0), metric.timestamp / 1000 - 0.001)
        else:
            shipped[metric.key] = max(metric.step, shipped.get(metric.key, -1))


def find_or_create(
    client: Any,
    uri: str,
    experiment: str,
    run_name: str,
    run_folder: Path,
    state: dict[str, Any],
    keep: Callable[[], None],
) -> str:
    """The id of a new run, or of the one that was created before when the answer was lost.

    A run carries a key that `keep` has stored (it stores `state`) before the server is first asked to create one. NotNow
    while an earlier creation may still be under way.
    """
    state.setdefault("key", uuid.uuid4().hex)
    identity = _experiment(client, uri, experiment, run_folder)
    earlier = client.search_runs(
        [identity], f"tags.`{KEY}` = '{state['key']}'", max_results=1, order_by=["attributes.start_time ASC"]
    )
    if earlier:
        return earlier[0].info.run_id
    waited = time.time() - state.get("asked", 0.0)
    if 0 <= waited < CREATE_PATIENCE:
        raise NotNow(
            f"MLflow was asked to create the run {waited:.0f} s ago and has not answered; it is looked for first"
        )
    state["asked"] = time.time()
    keep()
    return client.create_run(identity, run_name=run_name, tags=_tags_of_birth(state)).info.run_id


def _experiment(client: Any, uri: str, name: str, run_folder: Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # A server decides for itself where artifacts lie. A database has nobody to do it: they lie beside the runs.
    beside = (run_folder.parent / "mlartifacts").absolute().as_uri() if "sql" in uri.split(":")[0] else None
    return client.create_experiment(name, artifact_location=beside)


def _tags_of_birth(state: dict[str, Any]) -> dict[str, str]:
    """What a run is created with: MLflow's own words for who and what, and ours."""
    tags = {KEY: state["key"], "mlflow.source.name": "python -m pretrain train", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(Exception):  # a user without a name
        tags["mlflow.user"] = getpass.getuser()
    if state.get("replaces"):
        tags["palimpsest.replaces"] = state["replaces"]
    return tags


def plain_error(error: BaseException) -> str:
    """One line for a person: the kind of error and what it says, without user, password or query of any address."""
    lines = str(error).strip().splitlines()
    said = plain_address(lines[0]) if lines else ""
    if found := re.search(r"API request to (\S+) failed with .*\(Caused by (.*)\)", said):
        said = f"{found[1]}: {found[2]}"  # of a sentence that says the address three times
    return f"{type(error).__name__}: {said}"[:400]
