"""`track sync`: ships what MLflow lacks of a run, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from data.errors import InputError
from pretrain.load_config import load_config, to_dict
from pretrain.tracking import ship, tracking_uri


def sync(run: str) -> str:
    """Ships the missing points of the run folder and says how many; InputError if the tracker cannot be reached."""
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"track sync: {folder} is no run folder (it has no config.yaml)")
    config = load_config(["--config", str(folder / "config.yaml")])
    uri = tracking_uri(config)
    if uri is None:
        raise InputError(f"track sync: {folder} was run with tracking.uri=none; there is nothing to ship to")
    try:
        sent = ship(folder, uri, config.tracking.experiment, config.run.name, to_dict(config))
    except Exception as error:
        raise InputError(
            f"track sync: {uri.split('@')[-1]} did not take the metrics ({type(error).__name__}); try again later"
        ) from None
    return f"{sent} points shipped to {uri.split('@')[-1]}"
