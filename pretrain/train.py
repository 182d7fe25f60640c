"""Training, from a config to a trained checkpoint. Read it top to bottom: it is the recipe."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from data.batch import DiffusionBatch
from data.errors import InputError
from data.tokenizer import load_tokenizer
from parallel import checkpoint
from parallel.engine import AdamWOptions, Engine, StepResult
from parallel.engines import build_engine
from parallel.initialise import initialise_boxes
from parallel.mesh import Mesh, build_mesh, world_from_environment
from pretrain.config import Config
from pretrain.console import TrainingDisplay
from pretrain.feed import Feed
from pretrain.first_failure import failing_together
from pretrain.flops import flops_per_token, peak_flops
from pretrain.load_config import save_config, to_dict
from pretrain.lr_schedule import learning_rate
from pretrain.metrics import broken_samples, sum_over_ranks, token_sums, train_metrics
from pretrain.model import build_chunks, parallel_layout
from pretrain.objective import not_a_bound, row_length, row_loss_of
from pretrain.predictor import objective_of
from pretrain.preflight import Plan, hold, init_note, preflight
from pretrain.sample_log import log_samples
from pretrain.saving import Saving
from pretrain.tracking import MetricLog, Shipper, read_state, tracking_uri, truncate_metrics
from pretrain.validation import Validation


def train(config: Config) -> int:
    """Trains (or goes on training) the run that `config` names. Returns 0 when it reached train.steps or train.stop_at.

    Raises InputError, before any process group or GPU is taken, for every mistake that can be seen beforehand.
    """
    plan = preflight(config)
    parallel, alone = config.parallel, world_from_environment()[2] == 1
    with contextlib.ExitStack() as held:
        if alone:
            held.enter_context(hold(plan.folder))
        mesh = build_mesh(parallel.tensor, parallel.pipeline, parallel.shard_group, parallel.timeout_seconds)
        with failing_together(mesh):
            if mesh.rank == 0 and not alone:  # behind the meeting, so that the others hear of a folder that is in use
                held.enter_context(hold(plan.folder))
            _agree(config, plan, mesh)
            run = _Run(config, plan, mesh)
            try:
                run.loop()
                run.saving.close()
            finally:
                run.close()
    return 0


def _agree(config: Config, plan: Plan, mesh: Mesh) -> None:
    """InputError on every rank if the ranks do not see the same config, data and newest checkpoint."""
    mine = (str(plan.resume_from and plan.resume_from.name), plan.data.fingerprint(), str(to_dict(config)))
    everyone: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(everyone, mine)
    names = ("newest checkpoint", "data.shards", "config")
    for rank, other in enumerate(everyone):
        for name, here, there in zip(names, everyone[0], other):
            if here != there:
                raise InputError(
                    f"ranks 0 and {rank} see another {name}: run.dir ({config.run.dir}) and the data must be the same "
                    "folders on every node"
                )


def engine_for(config: Config, plan: Plan, mesh: Mesh) -> Engine:
    """The model, its weights not set yet, inside the engine that the config names."""
    layout = parallel_layout(config.parallel)
    chunks = build_chunks(config.model, mesh, layout, row_loss=row_loss_of(config.objective))
    if config.train.compile:
        for chunk in chunks:
            chunk.compile_blocks()
    options = config.optimizer
    return build_engine(
        chunks,
        plan.shape,
        mesh,
        layout,
        optimizer=AdamWOptions(options.impl, options.betas, options.eps, options.weight_decay),
        micro_batch_size=config.train.micro_batch_size,
        accumulation=config.train.global_batch_size // mesh.dp // config.train.micro_batch_size,
        sequence_length=row_length(config),
        grad_clip=config.train.grad_clip,
        bf16=config.train.precision == "bf16",
    )


class _Run:
    """One process of a run: what lives as long as the loop does."""

    def __init__(self, config: Config, plan: Plan, mesh: Mesh):
        self.config, self.plan, self.mesh = config, plan, mesh
        self.folder: Path = plan.folder
        self.special = plan.data.first.special
        self.stop = min(config.train.stop_at or config.train.steps, config.train.steps)
        self.engine = engine_for(config, plan, mesh)
        self.step, self.applied = self._restore()  # steps taken (= samples consumed / global batch), updates applied
        batch_tokens = config.train.global_batch_size * config.data.sequence_length
        self.tokens = plan.trainer.get("tokens", self.step * batch_tokens)  # of all steps, whatever their batches
        self.skipped_in_a_row = 0
        self.log: Optional[MetricLog] = None
        self.shipper: Optional[Shipper] = None
        if mesh.rank == 0:
            self._open_folder()
        self.tokenizer = load_tokenizer(plan.data.first.tokenizer_path, special=self.special)
        self.validation: Optional[Validation] = None
        if plan.val_set is not None:
            self.validation = Validation(
                plan.val_set,
                config.data.sequence_length,
                config.train.micro_batch_size,
                config.train.val_samples,
                isolate=config.data.packing == "isolate",
                eos_in_loss=config.data.pad_policy == "eos_in_loss",
                config=config,
            )
        # Reads all of the validation blocks: once, for who reports it.
        self.unigram_entropy = self.validation.unigram_entropy() if self.validation and mesh.rank == 0 else 0.0
        self.display = TrainingDisplay(mesh.rank == 0, self.step, self.stop, config.train.log_every)
        self.saving = Saving(
            self.folder / "checkpoints",
            every=config.train.checkpoint_every,
            keep=config.train.keep_checkpoints,
            asynchronous=config.train.async_checkpoint,
            timeout_seconds=config.parallel.timeout_seconds,
            say=self.display.say,
            saved_at=self.step if plan.resume_from else -1,
        )
        self.feed = Feed(config, plan, mesh, self.step, self.display.say)
        name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else ""
        self.peak = peak_flops(name)

    def loop(self) -> None:
        config, engine, mesh = self.config, self.engine, self.mesh
        if self.plan.resume_from:
            self.display.say(f"resumed {self.folder} at step {self.step} from {self.plan.resume_from.name}")
        if self.step >= self.stop:
            self.display.say(
                f"nothing to do: the run is at step {self.step} and ends at {self.stop}; raise train.steps or train.stop_at"
            )
        if self.step == 0 and (said := init_note(config)):
            self.display.say(said)
        if reason := not_a_bound(config.objective):
            self.display.say(f"note: train/loss is NOT a bound of the negative log-likelihood: {reason}")
        began = time.perf_counter()
        for batches, eligible, masked, normalizer, pairs, of_data in self.feed.steps(self.stop):
            lr = learning_rate(self.step, config.train.steps, config.optimizer)
            metrics = {"train/lr": lr} | of_data
            if masked:
                result = engine.train_step([b.tensors() for b in batches], normalizer, lr)
                sums = torch.stack([token_sums(b, *o[1:]) for b, o in zip(batches, result.outputs)]).sum(0)
                metrics |= train_metrics(sum_over_ranks(sums, mesh), normalizer)
                metrics["train/grad_norm"] = result.grad_norm
                self._count_step(result, batches)
            else:  # nothing to learn from: no parameter moves, not even by weight decay or momentum
                metrics |= {"train/loss": 0.0, "train/grad_norm": 0.0, "train/num_masked_tokens": 0.0}
            self.step += 1
            self._record(metrics, eligible, masked, pairs, time.perf_counter() - began)
            if self._due(config.train.validate_every):
                self._validate()
            if self._due(config.train.sample_every):
                log_samples(
                    engine,
                    self.plan.val_set or self.plan.data.first,
                    self.tokenizer,
                    config.data.sequence_length,
                    self.step,
                    self.folder / "samples",
                    objective=objective_of(config, self.step),
                )
            if self.saving.due(self.step):
                self._save()
            began = time.perf_counter()
        self._save(last=True)

    def _restore(self) -> tuple[int, int]:
        """Where the run goes on: from its newest checkpoint, from the weights of another run, or from nothing."""
        state = self.engine.state()
        if self.plan.resume_from:
            checkpoint.load(self.plan.resume_from, state)
            self.engine.state_written(self.plan.trainer["applied_steps"])
            return self.plan.trainer["step"], self.plan.trainer["applied_steps"]
        initialise_boxes(state, self.plan.shape, self.config.run.seed)
        if self.config.train.init_from:
            weights = {name: boxes for name, boxes in state.items() if name.startswith("weight/")}
            checkpoint.load(Path(self.config.train.init_from), weights)
        self.engine.state_written(0)
        return 0, 0

    def _open_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.folder / "config.yaml")
        shutil.copyfile(self.plan.data.first.tokenizer_path, self.folder / "tokenizer.json")
        truncate_metrics(self.folder, self.step)
        self.log = MetricLog(self.folder)
        if uri := tracking_uri(self.config):
            self.shipper = Shipper(
                self.folder,
                uri,
                self.config.tracking.experiment,
                self.config.run.name,
                to_dict(self.config),
                self.plan.trainer.get("mlflow_run_id"),
            )

    def _count_step(self, result: StepResult, batches: list[DiffusionBatch]) -> None:
        if result.applied:
            self.applied += 1
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        mine = [broken_samples(batch, output.value) for batch, output in zip(batches, result.outputs)]
        everyone: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(everyone, [sample for samples in mine for sample in samples])
        ranks = [rank for rank, samples in enumerate(everyone) if samples]
        where = "a gradient is not finite although every loss is"
        if ranks:
            named = sorted({sample for samples in everyone for sample in samples})
            some = ", ".join(map(str, named[:8])) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
            where = f"the loss of sample{'s' if len(named) > 1 else ''} {some} (ranks {ranks}) is not finite"
        self.display.say(f"step {self.step + 1}: {where}; the update was skipped")
        if self.skipped_in_a_row >= self.config.train.max_skipped:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row had non-finite gradients (train.max_skipped): lower optimizer.lr, or "
                f"resume from an earlier checkpoint in {self.folder / 'checkpoints'}"
            )

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.stop)

    def _record(self, metrics: dict[str, float], eligible: int, masked: int, pairs: int, seconds: float) -> None:
        config = self.config
        tokens = config.train.global_batch_size * config.data.sequence_length
        self.tokens += tokens
        metrics |= {
            "train/applied_steps": self.applied,
            "train/skipped_in_a_row": self.skipped_in_a_row,
            "train/tokens": self.tokens,
            "perf/step_time": seconds,
            "perf/tokens_per_second": tokens / seconds,
        }
        if self.peak:
            columns = config.train.global_batch_size * row_length(config)
            flops = columns * flops_per_token(
                self.plan.shape, pairs / columns, masked / max(eligible, 1) * tokens / columns
            )
            metrics["perf/mfu"] = flops / seconds / self.mesh.world_size / self.peak
        if self.log:
            self.log.write(self.step, metrics)
        self.display.step(self.step, metrics)

    def _validate(self) -> None:
        assert self.validation is not None, "preflight asks for data.val_shards"
        metrics = self.validation.run(self.engine, self.step) | {"val/unigram_entropy": self.unigram_entropy}
        if self.log:
            self.log.write(self.step, metrics)
        said = self.validation.sentence(metrics)
        self.display.say(f"step {self.step}: {said}; unigram entropy {self.unigram_entropy:.4f}")

    def _trainer(self) -> dict[str, Any]:
        """What the loop needs to go on, beside the engine's state."""
        return {
            "applied_steps": self.applied,
            "tokens": self.tokens,
            **self.feed.saved(self.step),
            "config": to_dict(self.config),
            "special": asdict(self.special),
            "mlflow_run_id": read_state(self.folder).get("run_id"),
        }

    def _save(self, last: bool = False) -> None:
        if self.log:
            self.log.sync()
        save = self.saving.finish if last else self.saving.save
        save(self.step, self.engine.state, self._trainer())

    def close(self) -> None:
        """Also after a failure: nothing here waits for another rank. A save in flight is then given up; older ones stand."""
        self.display.close()
        if self.log:
            self.log.close()
        if self.shipper and (error := self.shipper.close()):
            self.display.say(
                f"MLflow did not take every point ({error}); nothing is lost: "
                f"`python -m pretrain track sync --run {self.folder}` ships the rest"
            )
