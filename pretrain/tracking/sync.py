"""`track sync`: ships what MLflow lacks of a run, or of every run below a folder, from the files in the run folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data.errors import InputError
from pretrain.addresses import plain_address
from pretrain.load_config import load_config, to_dict
from pretrain.tracking.artifacts import ship_artifacts
from pretrain.tracking.mlflow_run import NotNow, plain_error
from pretrain.tracking.shipping import ship
from pretrain.tracking.store import tracking_uri

WAIT_SECONDS = 30.0  # for a live run, or another sync, that ships the same run


def sync(run: str, uri: str = "") -> str:
    """Ships the missing points and files of the run folder and says how many; InputError if the tracker does not take them.

    uri: another store than the one in the run's config, which holds no password.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"track sync: {folder} is no run folder (it has no config.yaml)")
    config = load_config(["--config", str(folder / "config.yaml")])
    # The default store lies beside the run folder, wherever that is by now and wherever this is called from.
    store = uri or (
        tracking_uri(config) if config.tracking.uri else f"sqlite:///{folder.absolute().parent / 'mlflow.db'}"
    )
    if store is None:
        raise InputError(f"track sync: {folder} was run with tracking.uri=none; there is nothing to ship to")
    shown = plain_address(store)
    files, trouble = 0, ""
    try:
        with _Bar(folder.name) as progress:
            sent = ship(
                folder,
                store,
                config.tracking.experiment,
                config.run.name,
                to_dict(config),
                wait=WAIT_SECONDS,
                progress=progress,
            )
    except NotNow as error:
        raise InputError(f"track sync: {folder}: {error}; try again later") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"track sync: {shown} did not take the metrics ({plain_error(error)}); try again later"
        ) from None
    if config.tracking.artifacts:
        try:
            files = ship_artifacts(folder, store, wait=WAIT_SECONDS, last=True)
        except Exception as error:  # the points are there, and a store of files may be out of reach from here
            trouble = f"; its files were NOT taken ({plain_error(error)}): try again later"
    return f"{sent} points shipped to {shown}" + (f", and {files} files" if files else "") + trouble


def sync_all(below: str, uri: str = "", say: Callable[[str], None] = print) -> None:
    """Syncs every run folder below a folder, says a line for each; InputError at the end that counts those that failed."""
    root = Path(below)
    if not root.is_dir():
        raise InputError(f"track sync: {root} is no folder")
    runs = sorted(path.parent for path in root.rglob("config.yaml") if (path.parent / "metrics.jsonl").is_file())
    if not runs:
        raise InputError(f"track sync: no run folder below {root} (a run folder has config.yaml and metrics.jsonl)")
    failed = 0
    for run in runs:
        try:
            say(f"{run}: {sync(str(run), uri)}")
        except InputError as error:
            say(f"{run}: {error}")
            failed += 1
    if failed:
        raise InputError(f"track sync: {failed} of {len(runs)} runs were not shipped; the lines above say why")


class _Bar:
    """How much of the spool was read: a bar on a terminal, nothing in a log."""

    def __init__(self, name: str):
        self._bar: Optional[Progress] = None
        console = Console(file=sys.stderr)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(f"{name} {{task.percentage:.0f}}%"), BarColumn(), TimeRemainingColumn(), console=console
            )

    def __enter__(self) -> Callable[[int, int], None]:
        if self._bar is None:
            return lambda done, size: None
        task = self._bar.add_task("", total=None)
        self._bar.start()
        bar = self._bar
        return lambda done, size: bar.update(task, completed=done, total=size)

    def __exit__(self, *ignored: object) -> None:
        if self._bar:
            self._bar.stop()
