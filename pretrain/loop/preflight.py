"""Every check of a training run that needs neither a GPU nor a process group: a mistake ends here, with exit code 2."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import torch

from data.durable import take_lock
from data.errors import InputError
from data.shard_set import ShardSet
from data.tokenizer import load_tokenizer
from parallel.checkpoint import latest, read_trainer
from parallel.checkpoint_reader import check_files, check_tensors, read_metadata
from parallel.legality import check_layout
from parallel.mesh import world_from_environment
from parallel.shape import ModelShape, parameter_table
from pretrain.check_values import check_values
from pretrain.config import Config
from pretrain.load_config import to_dict
from pretrain.loop.stream_position import StreamPosition, go_on
from pretrain.lr_schedule import check_schedule
from pretrain.model import model_shape, parallel_layout
from pretrain.objective import row_length
from pretrain.training_data import TrainingData, check_enough, open_set, open_training_data

HOLD_SECONDS = 60.0  # longest wait, in a start behind the first, for what a dead node held
VERIFIED_BYTES_A_SECOND = 100e6  # of one process that hashes, on a slow disk


@dataclass
class Plan:
    """A run that may start: its folder, its data, and the checkpoint that it goes on from (None = a new run)."""

    folder: Path
    shape: ModelShape
    data: TrainingData
    val_set: Optional[ShardSet]
    resume_from: Optional[Path]
    trainer: dict[str, Any]
    position: StreamPosition
    dp: int


def preflight(config: Config) -> Plan:
    """Checks everything; raises InputError (or CheckpointError) with one line. Writes nothing."""
    _, local_rank, world = _world()
    shape = model_shape(config.model)
    check_values(config)
    problem = check_layout(
        shape,
        world,
        parallel_layout(config.parallel),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=row_length(config),
        bf16=config.train.precision == "bf16",
        compile=config.train.compile,
    )
    if problem:
        raise InputError(f"layout: {problem.reason}; nearest that works: {problem.alternative}")
    if config.parallel.sequence_parallel and config.data.sequence_length % config.parallel.tensor:
        raise InputError(
            f"layout: data.sequence_length {config.data.sequence_length} is no multiple of parallel.tensor "
            f"{config.parallel.tensor}: with sequence parallelism each rank has an equal share of a text"
        )
    _check_deepspeed(config)
    check_schedule(config)
    # One process per host reads every byte; the others look at sizes and headers.
    verify = config.data.verify if local_rank == 0 else "size"
    if verify == "full" and world > 1:
        _check_verify(config, open_training_data(config, "size"))
    data = open_training_data(config, verify)
    val_set = open_set("data.val_shards", config.data.val_shards, verify, config) if config.data.val_shards else None
    if config.train.sample_every and config.data.max_bad_shards and val_set is None:
        raise InputError(
            "train.sample_every would take samples from data.shards, which data.max_bad_shards lets be bad: name data.val_shards"
        )
    if config.train.validate_every and val_set is None:
        raise InputError(
            "data.val_shards is empty but train.validate_every is set: name a folder or set train.validate_every=0"
        )
    if val_set and val_set.manifest.tokenizer_sha256 != data.first.manifest.tokenizer_sha256:
        raise InputError(
            f"data.val_shards ({val_set.location}) was made with another tokenizer than data.shards "
            f"({data.first.location}): prepare both together"
        )
    if local_rank == 0:  # a mask id that is an ordinary word, a file that is no tokenizer
        load_tokenizer(data.first.tokenizer_path, special=data.first.special)
    _check_apex(config)
    folder = Path(config.run.dir) / config.run.name
    resume_from = latest(folder / "checkpoints")
    trainer = read_trainer(resume_from) if resume_from else {}
    position = StreamPosition()
    if resume_from:
        position = go_on(config, data.fingerprint(), trainer, str(folder))
        if local_rank == 0:  # a thousand ranks need not ask for the sizes of a thousand files
            _check_readable(resume_from, shape)
    elif config.train.init_from:
        _check_init(config, Path(config.train.init_from), data.first.manifest.tokenizer_sha256)
    check_enough(config, data, position.consumed(config.train.steps, config.train.global_batch_size))
    return Plan(
        folder,
        shape,
        data,
        val_set,
        resume_from,
        trainer,
        position,
        world // config.parallel.tensor // config.parallel.pipeline,
    )


def _world() -> tuple[int, int, int]:
    """(rank, local rank, world size); InputError if the launcher's variables make no sense or lack where to meet."""
    try:
        rank, local_rank, world = world_from_environment()
    except ValueError as error:
        raise InputError(f"launcher: RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers ({error})") from None
    if not 0 <= rank < world:
        raise InputError(f"launcher: rank {rank} of {world} makes no sense; start the ranks with torchrun or srun")
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and (here > gpus or (gpus > 1 and local_rank >= gpus)):
        raise InputError(
            f"launcher: {max(here, local_rank + 1)} ranks on a host that shows {gpus} GPUs: start one rank a GPU, or set "
            "CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
        )
    if world > 1 and lacking:
        raise InputError(
            f"launcher: {world} ranks but no {' and no '.join(lacking)}: torchrun sets them; with srun export the first "
            "node's address and a free port"
        )
    return rank, local_rank, world


def _check_verify(config: Config, data: TrainingData) -> None:
    """InputError if the other ranks would not wait for the one of each host that reads everything."""
    size = sum(shard.bytes for one in data.sets for shard in one.shards)
    if size > VERIFIED_BYTES_A_SECOND * config.parallel.timeout_seconds:
        raise InputError(
            f"data.verify is full, but reading {size / 1e9:.0f} GB takes longer than the other ranks wait "
            f"(parallel.timeout_seconds {config.parallel.timeout_seconds}): run `python -m pretrain data verify` once, then set "
            "data.verify=auto"
        )


def _check_deepspeed(config: Config) -> None:
    """Pipelines and shard groups on DeepSpeed touch its private state, so only the release that is known will do."""
    from parallel.deepspeed_fixes import require_version

    parallel = config.parallel
    if parallel.engine == "deepspeed" and (parallel.pipeline > 1 or parallel.shard_group):
        try:
            require_version(version("deepspeed"))
        except ValueError as error:
            raise InputError(str(error)) from None


def _check_apex(config: Config) -> None:
    from parallel.apex_support import require_apex

    try:
        if config.model.norm_impl == "apex":
            require_apex("model.norm_impl")
        if config.optimizer.impl == "apex":
            if config.parallel.engine == "fsdp2":
                raise ValueError(
                    "optimizer.impl apex: its FusedAdam cannot step the sharded parameters of parallel.engine fsdp2; set "
                    "optimizer.impl=torch or parallel.engine=deepspeed"
                )
            require_apex("optimizer.impl")
    except ValueError as error:
        raise InputError(str(error)) from None


def _check_readable(checkpoint: Path, shape: ModelShape) -> None:
    """CheckpointError if a file is missing or cut, or the weights are not this model's. Sizes and headers only."""
    check_files(checkpoint)
    check_tensors(
        checkpoint,
        read_metadata(checkpoint),
        {f"weight/{name}": spec.shape for name, spec in parameter_table(shape).items()},
    )


def _check_init(config: Config, checkpoint: Path, tokenizer_sha256: str) -> None:
    if not (checkpoint / "trainer.json").is_file():
        raise InputError(
            f"train.init_from: {checkpoint} is no checkpoint (expected a folder like RUN/checkpoints/step-00000100)"
        )
    trainer = read_trainer(checkpoint)
    if trainer.get("tokenizer_sha256") not in (None, tokenizer_sha256):
        raise InputError(
            f"train.init_from: {checkpoint} was trained with another tokenizer than data.shards: the same ids would be other "
            "texts; prepare the data with its run's tokenizer.json (prepare --tokenizer)"
        )
    then = (trainer.get("config") or {}).get("model") or {}
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
        if then.get(key) != now[key]:
            raise InputError(
                f"train.init_from: {checkpoint} has model.{key} {then.get(key)}, this config {now[key]}: make them equal"
            )
    _check_readable(checkpoint, model_shape(config.model))


def init_note(config: Config) -> str:
    """What a person should know of the weights that a new run starts from; "" if nothing."""
    if not config.train.init_from:
        return ""
    then = (read_trainer(Path(config.train.init_from)).get("config") or {}).get("objective") or {}
    behind = then.get("kind") == "autoregressive" or bool(then.get("shift"))
    shifted = config.objective.kind == "autoregressive" or config.objective.shift
    if behind == shifted:
        return ""
    return (
        f"note: the weights of train.init_from predict the {'next' if behind else 'same'} token, this objective the "
        f"{'next' if shifted else 'same'} one: they have to unlearn that (objective.shift={str(behind).lower()} keeps it)"
    )


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Creates the run folder and keeps other processes out of it; InputError if one is in it or it cannot be written.

    In a job that Slurm started again the lock of a node that died may outlive it: it is waited for, for HOLD_SECONDS at most,
    and may be gone at the next start.
    """
    again = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take(folder / ".lock", HOLD_SECONDS if again else 0.0)
    except BlockingIOError:
        raise InputError(
            f"run folder {folder} is in use by another process: wait for it, or choose another run.name", passing=again
        ) from None
    except OSError as error:
        raise InputError(f"run folder {folder} cannot be written ({error.strerror}): choose another run.dir") from None
    try:
        yield
    finally:
        os.close(lock)


def _take(path: Path, seconds: float) -> int:
    """`take_lock`, tried again for so long."""
    until = time.monotonic() + seconds
    while True:
        try:
            return take_lock(path)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.5)
