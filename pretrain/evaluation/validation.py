"""Validation: an estimate of the negative ELBO on held-out blocks with fixed draws, and its standard error.

The stratum of a block's noise level follows from the block's number, the place in it is random. So the estimate is unbiased
over exchangeable blocks (no number is special), not for given blocks in a given order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import DiffusionBatch, Kind, expand
from data.compact import CompactBatch
from data.loader import Slice, StageOptions, validation_batches
from data.masking import MaskingOptions
from data.noise import Schedule
from data.samples import Blocks, sample_of
from data.shard_set import ShardSet
from data.stream import Block, SequentialBlocks
from parallel.block import DiffusionHead
from parallel.engine import LossOutput, Microbatch
from parallel.mesh import Mesh
from parallel.row_loss import RowLoss
from parallel.row_loss_cross_entropy import CROSS_ENTROPY
from parallel.row_loss_uniform import UniformBound
from pretrain.config import Config, ObjectiveConfig
from pretrain.evaluation.ratio import ratio
from pretrain.metrics import sum_over_ranks
from pretrain.objective import MASKED_KINDS, batch_form, lookahead, schedule

MEASURED_EPS = 1e-3  # how far from both ends the noise levels of `uniform` stay


class Forward(Protocol):
    """What validation needs of an engine (parallel.engine.Engine)."""

    @property
    def mesh(self) -> Mesh: ...
    @property
    def chunks(self) -> Sequence[nn.Module]: ...
    def forward(self, microbatch: Microbatch) -> Any: ...


class Validation:
    """Every block of the validation set once (or the first `most`), draws a function of the block's number alone.

    Masks (objectives masked, bert, block) are `fixed_count`: exactly l tokens, l uniform in 1..eligible, weight eligible / l, which
    is the bound itself (no eps, no mask_ratio), with l stratified over the blocks. `uniform` is measured at all noise levels but
    the outermost MEASURED_EPS, and so is `flow`: its network is a uniform-state denoiser, of which that bound holds whatever
    trained it. The same blocks and draws at every layout, microbatch size and seed of the run.

    Args:
        config: of the run, for its objective; None: masked.
        draws: masks of each block, stratified.
        seed: of the draws.
    """

    def __init__(
        self,
        shards: ShardSet,
        sequence_length: int,
        micro_batch: int,
        most: int = 0,
        isolate: bool = False,
        eos_in_loss: bool = False,
        config: Optional[Config] = None,
        draws: int = 1,
        seed: int = 0,
    ):
        self.config = config = config or Config()
        self.blocks = SequentialBlocks(shards, sequence_length, borders=isolate)
        self.total = min(len(self.blocks), most) if most else len(self.blocks)
        self.draws = 1 if config.objective.kind == "autoregressive" else draws
        self.micro_batch = micro_batch
        self.special = shards.special
        kind = measured_as(config.objective)
        self.form = replace(batch_form(config.objective, self.special.eos), kind=kind, weighting=True, per_answer=False)
        posterior = config.objective.kind == "flow"  # taught by labels, with its own token in sight
        self.row_loss = UniformBound(posterior) if kind == "uniform" else CROSS_ENTROPY
        # Sample number i is draw i % draws of block i // draws: neighbouring numbers lie in strata far apart.
        self._repeated: Blocks = _Repeated(self.blocks, self.draws)
        self.samples = self.total * self.draws
        drawn = MaskingOptions(
            seed,
            self.samples,
            masking="fixed_count",
            unit="block" if self.form.kind == "block" else "sequence",
            block_size=self.form.block_size,
        )
        if self.form.kind not in MASKED_KINDS:
            drawn = replace(drawn, masking="bernoulli", eps=MEASURED_EPS, schedule=measured_schedule(config.objective))
        self.options = StageOptions(
            replace(drawn, stream="validation"),
            isolate=isolate,
            eos_in_loss=eos_in_loss,
            kind=self.form.kind,
            shift=self.form.shift,
            vocab_size=config.model.vocab_size,
        )

    def batches(self, dp_rank: int, dp_size: int, step: Optional[int] = None) -> Iterator[DiffusionBatch]:
        """This rank's microbatches; every rank gets the same number of them, some may be without any masked token.

        step: optimizer steps taken, for attention that still grows (pretrain.objective.lookahead); None: it is full.
        """
        ahead = None if step is None else lookahead(self.config, step)
        part = Slice(self.samples, self.micro_batch, dp_rank, dp_size)
        rounds = -(-self.samples // (self.micro_batch * dp_size))
        last = None
        for compact in validation_batches(self._repeated, self.samples, self.options, part, self.special.pad):
            last = expand(compact, self.special.mask, self.form, ahead)
            rounds -= 1
            yield last
        for _ in range(rounds):  # forwards are collective: a rank without a block runs one that counts nothing
            yield _nothing_masked(last) if last is not None else self._empty(ahead)

    def _empty(self, ahead: Optional[int]) -> DiffusionBatch:
        part = Slice(self.samples, self.micro_batch)
        first = validation_batches(self._repeated, 1, self.options, part, self.special.pad)
        compact: CompactBatch = next(iter(first))
        return _nothing_masked(expand(compact, self.special.mask, self.form, ahead))

    def sample(self, g: int) -> tuple[dict[str, Any], np.ndarray]:
        """Block g as the stages get it (data.samples), and which of its tokens count in the loss, [L] bool."""
        options = self.options
        sample = sample_of(g, self.blocks.block(g), self.blocks.sequence_length, options.isolate, options.eos_in_loss)
        counted = np.arange(self.blocks.sequence_length) < sample["length"]
        if "prompt" in sample:
            counted &= ~sample["prompt"]
        if self.form.shift:  # nothing predicts the first token of a text
            counted[0] = False
            counted &= ~sample["borders"] if options.isolate else True
        return sample, counted

    def unigram_entropy(self) -> float:
        """Entropy of the blocks' token frequencies, nats per token: what a model without any context can reach at best."""
        counts = np.zeros(0, np.int64)
        for g in range(self.total):
            sample, counted = self.sample(g)
            found = np.bincount(sample["tokens"][counted])
            size = max(len(found), len(counts))
            counts = np.pad(counts, (0, size - len(counts))) + np.pad(found, (0, size - len(found)))
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())

    def per_sample(
        self,
        engine: Forward,
        width: int,
        measure: Callable[[DiffusionBatch, LossOutput], Tensor],
        step: Optional[int] = None,
    ) -> Tensor:
        """What `measure` makes of every microbatch ([B, width] float64 on the CPU), by sample number: [samples, width]. Collective.

        The same on every rank; a sample in which nothing counts has zeros. Each sample is computed on one rank, so what is
        summed over these rows does not depend on the layout.
        """
        table = torch.zeros(self.samples, width, dtype=torch.float64)
        with _row_loss(engine, self.row_loss):
            for batch in self.batches(engine.mesh.dp_rank, engine.mesh.dp, step):
                values = measure(batch, engine.forward(batch.tensors()))
                counts = batch.masked.any(1)
                table[batch.sample_ids[counts]] = values[counts]
        return sum_over_ranks(table, engine.mesh)

    def run(
        self, engine: Forward, step: Optional[int] = None, progress: Callable[[], object] = lambda: None
    ) -> dict[str, float]:
        """val/nelbo (nats per token), its standard error (ratio.py, over blocks), and the perplexity bound. Collective.

        Of `autoregressive` these are the likelihood itself and its perplexity. Where blocks have a loss that is not finite, so is
        val/nelbo, and val/broken_blocks is how many they are, val/first_broken_block the number of the first.
        progress: called after every microbatch.
        """

        def measure(batch: DiffusionBatch, output: LossOutput) -> Tensor:
            progress()
            return loss_and_tokens(batch, output)

        table = self.per_sample(engine, 2, measure, step).view(self.total, self.draws, 2).mean(1)
        found = ratio(*table.T)  # nan: prompts alone
        bound = found.exp().value
        metrics = {"val/nelbo": found.value, "val/nelbo_se": found.se, "val/ppl_bound": bound}
        if broken := broken_blocks(table[:, 0]):
            metrics |= {"val/broken_blocks": len(broken), "val/first_broken_block": broken[0]}
        return metrics

    def sentence(self, metrics: dict[str, float]) -> str:
        """What a person reads of `run`'s result."""
        name, sign = ("NLL", "=") if self.form.kind == "autoregressive" else ("NELBO", "<=")
        return (
            f"validation {name} {metrics['val/nelbo']:.4f} +- {metrics['val/nelbo_se']:.4f} nats per token (perplexity {sign} "
            f"{metrics['val/ppl_bound']:.2f})"
        ) + self._broken(metrics)

    def _broken(self, metrics: dict[str, float]) -> str:
        if not metrics.get("val/broken_blocks"):
            return ""
        count, first = int(metrics["val/broken_blocks"]), int(metrics["val/first_broken_block"])
        return f"; the loss is not finite in {count} of {self.total} blocks, block {first} first"


def measured_schedule(objective: ObjectiveConfig) -> Schedule:
    """The schedule of the noise levels that a uniform-state network is measured at: all of them, whatever it was trained on."""
    return replace(schedule(objective), low=0.0, high=1.0)


def measured_as(objective: ObjectiveConfig) -> Kind:
    """The objective whose bound of the likelihood a network has."""
    return "uniform" if objective.kind == "flow" else objective.kind


@contextmanager
def _row_loss(engine: Forward, chosen: RowLoss) -> Iterator[None]:
    """The network measured by a row loss, whatever trains it."""
    heads = [module for chunk in engine.chunks for module in chunk.children() if isinstance(module, DiffusionHead)]
    before = [head.row_loss for head in heads]
    try:
        for head in heads:
            head.row_loss = chosen
        yield
    finally:
        for head, own in zip(heads, before):
            head.row_loss = own


def broken_blocks(losses: Tensor) -> list[int]:
    """The numbers of the blocks whose loss is not finite. losses: [blocks]."""
    return (~torch.isfinite(losses)).nonzero()[:, 0].tolist()


def loss_and_tokens(batch: DiffusionBatch, output: LossOutput) -> Tensor:
    """Of each sample its weighted loss in nats and its loss-eligible tokens, [B, 2] float64."""
    loss = (batch.weight.double() * output.value.double().cpu()).sum(1)
    return torch.stack((loss, batch.eligible.sum(1).double()), 1)


class _Repeated:
    """Every block of `blocks` `draws` times in a row."""

    def __init__(self, blocks: Blocks, draws: int):
        self._blocks, self._draws = blocks, draws
        self.sequence_length = blocks.sequence_length

    def block(self, i: int) -> Block:
        return self._blocks.block(i // self._draws)

    def source(self, i: int) -> tuple[int, int]:
        return self._blocks.source(i // self._draws)


def _nothing_masked(batch: DiffusionBatch) -> DiffusionBatch:
    values = batch.tensors()
    values["masked"] = torch.zeros_like(batch.masked)
    values["weight"] = torch.zeros_like(batch.weight)
    return DiffusionBatch(**values)
