"""Every check of a training run that needs neither a GPU nor a process group: a mistake ends here, with exit code 2."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Optional

from data.errors import InputError
from data.shard_set import ShardSet
from parallel.checkpoint import latest, read_trainer
from parallel.legality import check_layout
from parallel.mesh import world_from_environment
from parallel.shape import ModelShape
from pretrain.config import Config
from pretrain.load_config import to_dict
from pretrain.lr_schedule import check_schedule
from pretrain.model import model_shape

# What the stream and the parameters follow from: changing one of these in an existing run would make it another run.
FROZEN = (
    "run.seed",
    "model",
    "data.sequence_length",
    "data.packing",
    "data.random_length_prob",
    "data.cfg_dropout",
    "data.cfg_condition",
    "objective",
    "train.global_batch_size",
)


@dataclass
class Plan:
    """A run that may start: its folder, its data, and the checkpoint that it goes on from (None = a new run)."""

    folder: Path
    shape: ModelShape
    train_set: ShardSet
    val_set: Optional[ShardSet]
    resume_from: Optional[Path]
    trainer: dict[str, Any]
    dp: int


def preflight(config: Config) -> Plan:
    """Checks everything; raises InputError (or CheckpointError) with one line. Writes nothing."""
    _, local_rank, world = world_from_environment()
    shape = model_shape(config.model)
    problem = check_layout(
        shape, world, config.parallel.tensor, config.train.global_batch_size, config.train.micro_batch_size
    )
    if problem:
        raise InputError(f"layout: {problem.reason}; nearest that works: {problem.alternative}")
    _check_values(config)
    check_schedule(config)
    # One process per host reads every byte; the others look at sizes and headers.
    verify = config.data.verify if local_rank == 0 else "size"
    train_set = _open("data.shards", config.data.shards, verify)
    val_set = _open("data.val_shards", config.data.val_shards, verify) if config.data.val_shards else None
    if config.train.validate_every and val_set is None:
        raise InputError(
            "data.val_shards is empty but train.validate_every is set: name a folder or set train.validate_every=0"
        )
    for key, shards in (("data.shards", train_set), ("data.val_shards", val_set)):
        if shards and shards.vocab_size > config.model.vocab_size:
            raise InputError(
                f"model.vocab_size {config.model.vocab_size} is smaller than the {shards.vocab_size} ids of {key} "
                f"({config.data.shards}): set model.vocab_size to {shards.vocab_size} or more"
            )
    if val_set and val_set.manifest.tokenizer_sha256 != train_set.manifest.tokenizer_sha256:
        raise InputError(
            f"data.val_shards ({config.data.val_shards}) was made with another tokenizer than data.shards "
            f"({config.data.shards}): prepare both together"
        )
    _check_apex(config)
    folder = Path(config.run.dir) / config.run.name
    resume_from = latest(folder / "checkpoints")
    trainer = read_trainer(resume_from) if resume_from else {}
    if resume_from:
        _check_same_run(config, trainer, train_set, resume_from)
    elif config.train.init_from:
        _check_init(config, Path(config.train.init_from))
    _check_writable(folder)
    return Plan(folder, shape, train_set, val_set, resume_from, trainer, world // config.parallel.tensor)


def _check_values(config: Config) -> None:
    rules = [
        ("train.steps", config.train.steps, config.train.steps >= 1, ">= 1"),
        ("train.stop_at", config.train.stop_at, config.train.stop_at >= 0, ">= 0 (0 = never)"),
        ("train.grad_clip", config.train.grad_clip, config.train.grad_clip >= 0, ">= 0 (0 = off)"),
        ("train.keep_checkpoints", config.train.keep_checkpoints, config.train.keep_checkpoints >= 1, ">= 1"),
        ("data.sequence_length", config.data.sequence_length, config.data.sequence_length >= 1, ">= 1"),
        (
            "data.random_length_prob",
            config.data.random_length_prob,
            0 <= config.data.random_length_prob <= 1,
            "in [0, 1]",
        ),
        ("data.cfg_dropout", config.data.cfg_dropout, 0 <= config.data.cfg_dropout < 1, "in [0, 1)"),
        ("data.workers", config.data.workers, config.data.workers >= 0, ">= 0"),
        (
            "objective.eps",
            config.objective.eps,
            0 < config.objective.eps < 1,
            "in (0, 1): with eps 0 the weight 1/p has infinite variance",
        ),
        ("optimizer.lr", config.optimizer.lr, config.optimizer.lr > 0, "> 0"),
    ]
    for key in ("checkpoint_every", "validate_every", "sample_every", "log_every", "val_samples"):
        value = getattr(config.train, key)
        rules.append((f"train.{key}", value, value >= 0, ">= 0 (0 = never)"))
    for key, value, fine, allowed in rules:
        if not fine:
            raise InputError(f"config: {key} is {value}, it must be {allowed}")
    if config.data.cfg_dropout > 0 and config.data.cfg_condition is None:
        raise InputError(
            "config: data.cfg_dropout is set but there is no condition to drop: set data.cfg_condition=prefix"
        )


def _open(key: str, folder: str, verify: Literal["auto", "full", "size"]) -> ShardSet:
    if not folder:
        raise InputError(f"{key} is empty: name a folder made by `python -m pretrain prepare`")
    try:
        return ShardSet.open(folder, verify)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def _check_apex(config: Config) -> None:
    from parallel.apex_support import require_apex

    try:
        if config.model.norm_impl == "apex":
            require_apex("model.norm_impl")
        if config.optimizer.impl == "apex":
            require_apex("optimizer.impl")
    except ValueError as error:
        raise InputError(str(error)) from None


def _look_up(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _check_same_run(config: Config, trainer: dict[str, Any], train_set: ShardSet, checkpoint: Path) -> None:
    now, then = to_dict(config), trainer["config"]
    changed = [key for key in FROZEN if _look_up(now, key) != _look_up(then, key)]
    if changed:
        key = changed[0]
        raise InputError(
            f"run folder {checkpoint.parent.parent} was started with another {', '.join(changed)} "
            f"(there {_look_up(then, key)}, now {_look_up(now, key)}): resume with the same values, or choose another run.name"
        )
    if trainer["data_fingerprint"] != fingerprint(train_set):
        raise InputError(
            f"run folder {checkpoint.parent.parent} was started on other shards or another tokenizer than data.shards "
            f"({config.data.shards}): point data.shards to the same set, or choose another run.name"
        )


def _check_init(config: Config, checkpoint: Path) -> None:
    if not (checkpoint / "trainer.json").is_file():
        raise InputError(
            f"train.init_from: {checkpoint} is no checkpoint (expected a folder like RUN/checkpoints/step-00000100)"
        )
    then = read_trainer(checkpoint)["config"]["model"]
    now = to_dict(config)["model"]
    sizes = (
        "num_layers",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "ffn_hidden_size",
        "vocab_size",
        "tie_embeddings",
    )
    for key in sizes:
        if then[key] != now[key]:
            raise InputError(
                f"train.init_from: {checkpoint} has model.{key} {then[key]}, this config {now[key]}: make them equal"
            )


def _check_writable(folder: Path) -> None:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(
            f"run.dir/run.name: {folder} cannot be written ({existing} is not a writable folder): choose another run.dir"
        )


def hold(folder: Path) -> IO[str]:
    """Takes the run folder for this process until it ends, however it ends; InputError if another one has it.

    Creates the folder. The lock is the kernel's (flock), so nothing stays behind after a kill.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(
            f"run folder {folder} is in use by another process: wait for it, or choose another run.name"
        ) from None
    return file


def fingerprint(shards: ShardSet) -> str:
    """Identifies a shard set by the hashes of its shards and tokenizer."""
    import hashlib

    text = "\n".join([shards.manifest.tokenizer_sha256, *(entry.sha256 for entry in shards.shards)])
    return hashlib.sha256(text.encode()).hexdigest()
