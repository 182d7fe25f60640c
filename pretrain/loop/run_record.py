"""What a run writes down while it goes: the console, each rank's log, metrics.jsonl and what is shipped of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from data.durable import keep_file
from parallel.mesh import Mesh
from pretrain.config import Config
from pretrain.console import TrainingDisplay
from pretrain.load_config import save_config, to_dict
from pretrain.loop.preflight import Plan, init_note
from pretrain.objective import not_a_bound
from pretrain.tracking.metric_log import MetricLog, truncate_metrics
from pretrain.tracking.shipper import Shipper
from pretrain.tracking.shipping import read_state
from pretrain.tracking.store import tracking_uri
from pretrain.tracking.system_metrics import SystemMetrics
from pretrain.watching.rank_log import RankLog

FAILED_SECONDS = 2.0  # longest wait for the tracker at the end of a run that failed


class RunRecord:
    """One process's part of it: rank 0 keeps the metrics and the console, every rank a log of its own."""

    def __init__(self, config: Config, plan: Plan, mesh: Mesh, log: RankLog):
        """Metrics behind the step where the run goes on are dropped, since those steps are taken again."""
        step, stop = plan.trainer.get("step", 0), min(config.train.stop_at or config.train.steps, config.train.steps)
        self.state = "failed"  # or `finished`, or `preempted`: what the tracker is told at the end
        self._folder, self._rank_log = plan.folder, log
        self._display = TrainingDisplay(mesh.rank == 0, step, stop, config.train.log_every)
        self._metrics: Optional[MetricLog] = None
        self._shipper: Optional[Shipper] = None
        self._config = to_dict(config)
        self._special = asdict(plan.data.first.special)
        self._step = step
        self._system: Optional[SystemMetrics] = None
        if config.tracking.system_every and int(os.environ["LOCAL_RANK"]) == 0:
            self._system = SystemMetrics(
                plan.folder, config.tracking.system_every, lambda: self._step, say=self.say_here
            )
        if mesh.rank:
            return
        try:
            save_config(config, plan.folder / "config.yaml")
            keep_file(plan.folder / "tokenizer.json", Path(plan.data.first.tokenizer_path).read_bytes())
        except OSError as error:  # a full disk is no reason not to train; the old ones stand
            self.say(f"WARNING: config.yaml or tokenizer.json in {plan.folder} was not written: {error.strerror}")
        truncate_metrics(plan.folder, step)
        self._metrics = MetricLog(plan.folder, self.say)
        if uri := tracking_uri(config):
            run_id = plan.trainer.get("mlflow_run_id")
            experiment, name = config.tracking.experiment, config.run.name
            self._shipper = Shipper(
                plan.folder,
                uri,
                experiment,
                name,
                self._config,
                run_id,
                artifacts=config.tracking.artifacts,
                say=self.say,
            )

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: what to read it with, and where it is tracked."""
        run_id = read_state(self._folder).get("run_id")
        return {"config": self._config, "special": self._special, "mlflow_run_id": run_id}

    def say(self, text: str) -> None:
        """A line for people: on the console and in the log of rank 0 (all ranks call it alike)."""
        self._display.say(text)
        if self._display.active:
            self._rank_log.line(text)

    def say_here(self, text: str) -> None:
        """A line in the log of this rank alone."""
        self._rank_log.line(text)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """The metrics of one optimizer step."""
        self._step = step
        self.metrics(step, metrics)
        line = self._display.step(step, metrics)
        if line and self._display.active:
            self._rank_log.line(line)
        elif line:
            took, waited = metrics["perf/step_time"], metrics["perf/data_time"]
            self._rank_log.line(f"step {step}: {took:.3f} s, of which {waited:.3f} s waiting for data")

    def metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if self._metrics:
            self._metrics.write(step, metrics)

    def roll_back(self, step: int) -> None:
        """The steps behind `step` are taken again."""
        if self._metrics:
            self._metrics.roll_back(step)

    def sync(self) -> None:
        """What is written so far survives this machine."""
        if self._metrics:
            self._metrics.sync()

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, *failure: object) -> None:
        """Also after a failure, of which the other ranks hear behind this: nothing here waits for another rank, or for long."""
        self._display.close()
        if self._system:
            self._system.close()
        if self._metrics:
            self._metrics.close()
        if self._shipper and (
            error := self._shipper.close(self.state, FAILED_SECONDS if self.state == "failed" else None)
        ):
            self.say(
                f"MLflow did not take every point ({error}); nothing is lost: "
                f"`python -m pretrain track sync --run {self._folder}` ships the rest"
            )


def greeting(config: Config, plan: Plan, step: int, stop: int) -> Iterator[str]:
    """What a person should know of a run that begins, or goes on, at `step`."""
    if plan.resume_from:
        yield f"resumed {plan.folder} at step {step} from {plan.resume_from.name}"
    if step >= stop:
        yield f"nothing to do: the run is at step {step} and ends at {stop}; raise train.steps or train.stop_at"
    if step == 0 and (said := init_note(config)):
        yield said
    if reason := not_a_bound(config.objective):
        yield f"note: train/loss is NOT a bound of the negative log-likelihood: {reason}"
