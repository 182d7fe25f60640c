"""What can be known of a job before it waits in a queue for hours: layout, memory, data, time. No torch is imported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Optional

from data.errors import InputError
from data.manifest import Manifest, read_manifest
from pretrain.addresses import plain_address
from pretrain.config import Config
from pretrain.planning.case import case_of, check_layout, check_memory

__all__ = ["case_of", "check_data", "check_layout", "check_memory", "check_run", "check_time", "seconds_of"]

# Slurm looks at time limits and their signals this rarely (sbatch(1), --signal): the signal may come so much earlier.
SIGNAL_SLACK_SECONDS = 60


def check_run(config: Config) -> None:
    """InputError for a run folder that cannot be one."""
    if not re.fullmatch(r"\w[\w.-]*", config.run.name):
        raise InputError(f"config: run.name is {config.run.name!r}, it must be a plain folder name")
    if not config.run.dir:
        raise InputError("config: run.dir is '', it must be a folder that all nodes share")
    if re.match(r"https?://.*@|(?!sqlite|file)[\w+]+://[^@]*:[^@]*@", config.tracking.uri, re.IGNORECASE):
        raise InputError(
            "config: tracking.uri holds a user or a password, and no stored config may: leave them out of it, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (of a database: what its client reads, like PGUSER and "
            "PGPASSWORD) in the file of --environment"
        )


def check_data(config: Config) -> list[str]:
    """Opens the manifests of what lies in folders; InputError as `train` would say it. Returns what could not be looked at."""
    given = config.data.shards
    unseen: list[str] = []
    sources: list[tuple[str, Any]] = [("data.shards", given)]
    if not isinstance(given, str):
        sources = [(f"data.shards[{number}]", entry.get("path")) for number, entry in enumerate(given)]
    if not sources or not all(path and isinstance(path, str) for _, path in sources):
        raise InputError("data.shards is empty: name a folder made by `python -m pretrain prepare`")
    if config.train.validate_every and not config.data.val_shards:
        raise InputError(
            "data.val_shards is empty but train.validate_every is set: name a folder or set train.validate_every=0"
        )
    if config.data.val_shards:
        sources.append(("data.val_shards", config.data.val_shards))
    first: Optional[Manifest] = None
    for key, path in sources:
        if "://" in path:
            unseen.append(f"{key} ({plain_address(path)}) is remote: it is looked at when the job starts")
            continue
        manifest = _manifest(key, path, config)
        if first and manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise InputError(f"{key} ({path}) was made with another tokenizer than data.shards: prepare both together")
        first = first or manifest
    start = config.train.init_from
    if start and not (Path(start) / "trainer.json").is_file():
        raise InputError(
            f"train.init_from: {start} is no checkpoint (expected a folder like RUN/checkpoints/step-00000100)"
        )
    return unseen


def _manifest(key: str, path: str, config: Config) -> Manifest:
    try:
        manifest = read_manifest(Path(path))
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    if manifest.vocab_size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the {manifest.vocab_size} ids of {key} ({path}): set "
            f"model.vocab_size to {manifest.vocab_size} or more"
        )
    if manifest.row_tokens and manifest.row_tokens != config.data.sequence_length:
        raise InputError(
            f"{key} ({path}) holds rows of {manifest.row_tokens} tokens, data.sequence_length is "
            f"{config.data.sequence_length}: make them equal"
        )
    return manifest


def seconds_of(time: str) -> int:
    """A time as sbatch(1) takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. InputError else."""
    days, dash, rest = time.rpartition("-")
    numbers = rest.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise InputError(f"--time is {time!r}, it must be like 24:00:00, 3-12 (days-hours) or 90 (minutes)")
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(int(number) * unit for number, unit in zip(numbers, units))


def check_time(time: str, signal_seconds: int) -> None:
    """InputError if the signal before the limit would come before the run has begun."""
    limit = seconds_of(time)
    if signal_seconds < 1:
        raise InputError(f"--signal-seconds is {signal_seconds}, it must be at least 1: as long as a checkpoint takes")
    if limit <= signal_seconds + SIGNAL_SLACK_SECONDS:
        raise InputError(
            f"--time {time} leaves no time to train: --signal-seconds {signal_seconds} before its end (Slurm: up to "
            f"{SIGNAL_SLACK_SECONDS} more) the run is asked to save and leave"
        )
