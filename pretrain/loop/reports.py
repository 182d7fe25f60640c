"""What is looked at while a model trains, beside its loss: validation and samples."""

from __future__ import annotations

from typing import Optional

from data.tokenizer import load_tokenizer
from parallel.engine import Engine
from pretrain.config import Config
from pretrain.evaluation.validation import Validation
from pretrain.loop.preflight import Plan
from pretrain.loop.run_record import RunRecord
from pretrain.loop.sample_log import log_samples
from pretrain.predictor import objective_of
from pretrain.watching.heartbeat import Heartbeat


class Reports:
    """Every call is collective."""

    def __init__(self, config: Config, plan: Plan, engine: Engine, record: RunRecord, heart: Heartbeat, stop: int):
        """stop: the last step, after which everything that is ever due is."""
        self._config, self._plan, self._engine, self._stop = config, plan, engine, stop
        self._record, self._heart = record, heart
        self._tokenizer = load_tokenizer(plan.data.first.tokenizer_path, special=plan.data.first.special)
        self._validation: Optional[Validation] = None
        self._unigram_entropy = 0.0
        if plan.val_set is None:
            return
        self._validation = Validation(
            plan.val_set,
            config.data.sequence_length,
            config.train.micro_batch_size,
            config.train.val_samples,
            isolate=config.data.packing == "isolate",
            eos_in_loss=config.data.pad_policy == "eos_in_loss",
            config=config,
        )
        if engine.mesh.rank == 0:  # reads all of the validation blocks: once, for who reports it
            self._unigram_entropy = self._validation.unigram_entropy()

    def after(self, step: int) -> None:
        """What is due after `step` steps."""
        if self._due(step, self._config.train.validate_every):
            self._heart.beat("validate", step)
            self._validate(step)
        if self._due(step, self._config.train.sample_every):
            self._heart.beat("sample", step)
            log_samples(
                self._engine,
                self._plan.val_set or self._plan.data.first,
                self._tokenizer,
                self._config.data.sequence_length,
                step,
                self._plan.folder / "samples",
                objective=objective_of(self._config, step),
            )

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self._stop)

    def _validate(self, step: int) -> None:
        assert self._validation is not None, "preflight asks for data.val_shards"
        found = self._validation.run(self._engine, step, lambda: self._heart.beat("validate", step))
        metrics = found | {"val/unigram_entropy": self._unigram_entropy}
        self._record.metrics(step, metrics)
        said = self._validation.sentence(metrics)
        self._record.say(f"step {step}: {said}; unigram entropy {self._unigram_entropy:.4f}")
