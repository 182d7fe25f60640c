"""Training, from a config to a trained checkpoint. Read it top to bottom: it is the recipe."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from data.errors import InputError
from parallel.corruption import CorruptionCheck, require_none
from parallel.engine import AdamWOptions, Engine
from parallel.engines import build_engine
from parallel.mesh import Mesh, build_mesh, world_from_environment
from pretrain.config import Config
from pretrain.launch import launch_name
from pretrain.load_config import to_dict
from pretrain.loop.broken_step import find_broken
from pretrain.loop.feed import Feed, Step
from pretrain.loop.preemption import ASKS_FOR_REQUEUE, Preemption
from pretrain.loop.preflight import Plan, hold, preflight
from pretrain.loop.profiling import OFF, ProfileOptions, Profiling, profiler_for
from pretrain.loop.reports import Reports
from pretrain.loop.roll_back import restore, roll_back
from pretrain.loop.run_record import RunRecord, greeting
from pretrain.loop.saving import Saving
from pretrain.loop.spikes import Verdict
from pretrain.loop.throughput import Throughput
from pretrain.loop.trouble import Action, Trouble
from pretrain.lr_schedule import learning_rate
from pretrain.metrics import largest_over_ranks, sum_over_ranks, token_sums, train_metrics
from pretrain.model import build_chunks, parallel_layout
from pretrain.objective import row_length, row_loss_of
from pretrain.watching.first_failure import failing_together
from pretrain.watching.heartbeat import Heartbeat, collective_counts
from pretrain.watching.rank_log import RankLog
from pretrain.watching.restarts import record_attempt
from pretrain.watching.stacks import register_stack_dump


def train(config: Config, preemption: Optional[Preemption] = None, profile: Optional[ProfileOptions] = None) -> int:
    """Trains (or goes on training) the run that `config` names.

    Returns 0 when it reached train.steps or train.stop_at, ASKS_FOR_REQUEUE when any rank was asked to leave before.
    preemption: what listens to signals; without it they do what they always do. profile: steps to record; None: none.
    Raises InputError, before any process group or GPU is taken, for every mistake that can be seen beforehand.
    """
    register_stack_dump()
    plan = preflight(config)
    parallel, alone = config.parallel, world_from_environment()[2] == 1
    with contextlib.ExitStack() as held:
        if alone:
            held.enter_context(hold(plan.folder))
        mesh = build_mesh(parallel.tensor, parallel.pipeline, parallel.shard_group, parallel.timeout_seconds)
        with failing_together(mesh, plan.folder):
            if mesh.rank == 0 and not alone:  # behind the meeting, so that the others hear of a folder that is in use
                held.enter_context(hold(plan.folder))
            _agree(config, plan, mesh)
            if preemption and config.data.workers:
                preemption.shield_loaders()
            heart = Heartbeat(
                plan.folder,
                mesh.rank,
                mesh.world_size,
                publish_seconds=config.health.beat_seconds,
                collectives=collective_counts(mesh),
            )
            with (
                contextlib.closing(heart),
                RankLog(plan.folder, mesh.rank, mesh.world_size, launch_name(os.environ)) as log,
                RunRecord(config, plan, mesh, log) as record,
            ):
                run = _Run(config, plan, mesh, record, heart, preemption, profile)
                run.loop()
                record.state = "preempted" if run.leaving else "finished"
                heart.beat("end", run.step)
                return ASKS_FOR_REQUEUE if run.leaving else 0


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

    def __init__(
        self,
        config: Config,
        plan: Plan,
        mesh: Mesh,
        record: RunRecord,
        heart: Heartbeat,
        preemption: Optional[Preemption],
        profile: Optional[ProfileOptions],
    ):
        self.config, self.plan, self.mesh = config, plan, mesh
        self.record, self.heart, self.preemption = record, heart, preemption
        self.folder: Path = plan.folder
        self.stop = min(config.train.stop_at or config.train.steps, config.train.steps)
        self.leaving = False  # this run was asked to leave before its end
        self.engine = engine_for(config, plan, mesh)
        self.throughput = Throughput(config, plan.shape, mesh)
        self.trouble = Trouble(config.health, config.train.max_skipped)
        self.trouble.restore(plan.trainer)
        self._begin(plan)
        self.copies = CorruptionCheck(self.engine, plan.shape) if config.health.check_every else None
        self.reports = Reports(config, plan, self.engine, record, heart, self.stop)
        self.saving = Saving(
            self.folder / "checkpoints",
            every=config.train.checkpoint_every,
            keep=config.train.keep_checkpoints,
            asynchronous=config.train.async_checkpoint,
            timeout_seconds=config.parallel.timeout_seconds,
            say=record.say,
            saved=self.trouble.saved,
            saved_at=self.step if plan.resume_from else -1,
        )
        self.profile: Profiling = profiler_for(
            profile, self.folder, mesh.rank, self.step, record.say if mesh.rank == 0 else record.say_here
        )

    def _begin(self, plan: Plan) -> None:
        """Goes on where `plan` says: at a start, and after every roll-back."""
        self.plan = plan
        self.step, self.applied = restore(self.config, plan, self.engine)  # steps taken, updates applied
        # Of all steps, whatever their batches.
        self.tokens = plan.trainer.get("tokens", self.step * self.throughput.tokens)
        self.first = self.step
        self.feed = Feed(self.config, plan, self.mesh, self.step, self.record.say)

    def loop(self) -> None:
        if self.mesh.rank == 0:
            with contextlib.suppress(OSError):  # a full disk: `restart` makes do without it
                record_attempt(self.folder, world=self.mesh.world_size, step=self.step)
        for line in greeting(self.config, self.plan, self.step, self.stop):
            self.record.say(line)
        if self.plan.trainer.get("unreported"):  # the run left between this step and what was due after it
            self.reports.after(self.step)
        while action := self._steps():
            self._roll_back(action)
        if self.leaving:
            self._leave()
        else:
            self._save(self.saving.finish)
        self.saving.close()
        self.profile.close()

    def _steps(self) -> Optional[Action]:
        """Steps up to the last one, or until any rank is asked to leave; or the roll-back that must come first."""
        with contextlib.closing(self.feed.steps(self.stop, self._doing)) as steps:
            began = time.perf_counter()
            for step in steps:
                metrics, action = self._train(step)
                self.step += 1
                self._record(step, metrics, time.perf_counter() - began)
                if action.said:
                    self.record.say(action.said)
                if action.first_bad:
                    return action
                if self.leaving:
                    return None
                self._done("after the step")
                self.reports.after(self.step)
                if self.copies and self.step % self.config.health.check_every == 0:
                    self._compare_copies()
                if self.saving.due(self.step):
                    if self.trouble.may_save(self.step):
                        self._save(self.saving.save)
                    else:
                        self.saving.postpone(self.step)
                if self.profile is not OFF:
                    self.heart.beat("save", self.step, "profile")  # writing it may take a while
                    self.profile.step()
                began = time.perf_counter()
        return None

    def _train(self, step: Step) -> tuple[dict[str, float], Action]:
        """One optimizer step: its metrics, and what is to be done about them."""
        lr = learning_rate(self.step, self.config.train.steps, self.config.optimizer)
        metrics = {"train/lr": lr} | step.metrics
        if not step.masked:  # nothing to learn from: no parameter moves, not even by weight decay or momentum
            self._agree_on(Verdict.FINE)
            nothing = {"train/loss": 0.0, "train/grad_norm": 0.0, "train/num_masked_tokens": 0.0}
            return metrics | nothing, Action()
        self._doing("forward, backward, update")
        unchanged = self.copies.require_own if self.copies and self.copies.remembers else None
        result = self.engine.train_step([b.tensors() for b in step.batches], step.normalizer, lr, unchanged)
        self._doing("metrics")
        sums = torch.stack([token_sums(b, *o[1:]) for b, o in zip(step.batches, result.outputs)]).sum(0)
        metrics |= train_metrics(sum_over_ranks(sums, self.mesh), step.normalizer)
        metrics["train/grad_norm"] = result.grad_norm
        self.applied += result.applied
        verdict = self._agree_on(self.trouble.judge(metrics["train/loss"], result.grad_norm, result.applied))
        samples: list[int] = []
        reason = ""
        if verdict == Verdict.NON_FINITE:
            samples, reason = find_broken(step.batches, [output.value for output in result.outputs], self.mesh)
            reason += "; the update was skipped" if not result.applied else ""
        return metrics, self.trouble.after_step(self.step + 1, verdict, samples, reason)

    def _agree_on(self, verdict: Verdict) -> Verdict:
        """The worst that any rank makes of this step, and whether any was asked to leave. Behind the last step nothing is left."""
        self._doing("agreeing")
        asked = self.preemption.asked if self.preemption and self.step + 1 < self.stop else None
        if asked:
            self.record.say_here(f"{asked} came: asking all ranks to leave behind step {self.step + 1}")
        worst, leaving = largest_over_ranks((int(verdict), int(bool(asked))), self.mesh)
        self.leaving = bool(leaving)
        return Verdict(worst)

    def _compare_copies(self) -> None:
        """CorruptionError if anything that must be equal over ranks is not."""
        if self.copies and not self.copies.remembers:  # else this step's have been compared
            # Behind validation and samples, like the save that it precedes.
            self.heart.beat("save", self.step, "comparing copies")
            self.profile.mark("comparing copies")
            findings = self.copies.compare_copies()
            require_none(findings)
            if findings:
                self.record.say(
                    f"step {self.step}: WARNING: {len(findings)} copies differ by rounding, perhaps: {findings[0]}"
                )
            self.copies.remember()

    def _roll_back(self, action: Action) -> None:
        self.heart.beat("save", self.step, "rolling back")  # reads a checkpoint: it may take as long as writing one
        self.saving.settle()
        plan = roll_back(
            self.config,
            self.plan,
            self.mesh,
            reached=self.step,
            first_bad=action.first_bad,
            reason=action.reason,
        )
        if self.copies:
            self.copies.forget()
        self._begin(plan)
        self.trouble.rolled_back(plan.trainer)
        self.saving.rolled_back(self.step if plan.resume_from else -1)
        self.record.roll_back(self.step)
        self.leaving = False

    def _doing(self, what: str) -> None:
        """In the step that is being taken. The first of a start compiles and connects: it may take as long as the start itself."""
        self.heart.beat("start" if self.step == self.first else "step", self.step + 1, what)
        self.profile.mark(what)

    def _done(self, what: str) -> None:
        """Behind the step that was taken."""
        self.heart.beat("step", self.step, what)
        self.profile.mark(what)

    def _record(self, step: Step, metrics: dict[str, float], seconds: float) -> None:
        self.tokens += self.throughput.tokens
        metrics |= {
            "train/applied_steps": self.applied,
            "train/skipped_in_a_row": self.trouble.in_a_row,
            "train/tokens": self.tokens,
            **self.throughput.metrics(step, seconds),
        }
        self.record.step(self.step, metrics)

    def _trainer(self) -> dict[str, Any]:
        """What the loop needs to go on, beside the engine's state."""
        return {
            "applied_steps": self.applied,
            "tokens": self.tokens,
            **self.feed.saved(self.step),
            **self.trouble.state(),
            **self.record.saved(),
        }

    def _save(self, save: Callable[..., None], **more: Any) -> None:
        """Nothing that is known to be corrupted is ever saved."""
        self._compare_copies()
        self.heart.beat("save", self.step)
        self.record.sync()
        save(self.step, self.engine.state, self._trainer() | more)

    def _leave(self) -> None:
        """With a checkpoint of this step if there is time for one; else the newest complete one stands."""
        self.record.say(f"step {self.step}: asked to leave; saving, then exit code {ASKS_FOR_REQUEUE}")
        if not self.trouble.may_save(self.step) and self.config.train.keep_checkpoints < 2:
            self.record.say("no save while trouble is under way: it would take the place of the only good checkpoint")
            return
        self._save(self.saving.leave, unreported=True)
