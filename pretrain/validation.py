"""Validation: an unbiased estimate of the negative ELBO on held-out blocks with fixed masks, and its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from data.batch import CompactBatch, DiffusionBatch, expand
from data.loader import Slice, StageOptions, validation_batches
from data.masking import MaskingOptions
from data.samples import sample_of
from data.shard_set import ShardSet
from data.stream import SequentialBlocks
from parallel.engine import Engine
from pretrain.metrics import sum_over_ranks


class Validation:
    """Every block of the validation set once (or the first `most`), masks a function of the block's number alone.

    Masks are `fixed_count`: exactly l tokens, l uniform in 1..eligible, weight eligible / l, which is the bound itself
    (no eps), with l stratified over the blocks. The same blocks and masks at every layout, microbatch size and seed of the run.
    """

    def __init__(
        self,
        shards: ShardSet,
        sequence_length: int,
        micro_batch: int,
        most: int = 0,
        isolate: bool = False,
        eos_in_loss: bool = False,
    ):
        self.blocks = SequentialBlocks(shards, sequence_length, borders=isolate)
        self.total = min(len(self.blocks), most) if most else len(self.blocks)
        self.micro_batch = micro_batch
        self.special = shards.special
        self.options = StageOptions(
            MaskingOptions(seed=0, global_batch=self.total, masking="fixed_count", stream="validation"),
            isolate=isolate,
            eos_in_loss=eos_in_loss,
        )

    def batches(self, dp_rank: int, dp_size: int) -> Iterator[DiffusionBatch]:
        """This rank's microbatches; every rank gets the same number of them, some may be without any masked token."""
        part = Slice(self.total, self.micro_batch, dp_rank, dp_size)
        rounds = -(-self.total // (self.micro_batch * dp_size))
        last = None
        for compact in validation_batches(self.blocks, self.total, self.options, part, self.special.pad):
            last = expand(compact, self.special.mask)
            rounds -= 1
            yield last
        for _ in range(rounds):  # forwards are collective: a rank without a block runs one that counts nothing
            yield _nothing_masked(last) if last is not None else self._empty()

    def _empty(self) -> DiffusionBatch:
        part = Slice(self.total, self.micro_batch)
        compact: CompactBatch = next(iter(validation_batches(self.blocks, 1, self.options, part, self.special.pad)))
        return _nothing_masked(expand(compact, self.special.mask))

    def unigram_entropy(self) -> float:
        """Entropy of the blocks' token frequencies, nats per token: what a model without any context can reach at best."""
        counts = np.zeros(0, np.int64)
        for g in range(self.total):
            sample = sample_of(
                g, self.blocks.block(g), self.blocks.sequence_length, eos_in_loss=self.options.eos_in_loss
            )
            counted = np.arange(self.blocks.sequence_length) < sample["length"]
            if "prompt" in sample:
                counted &= ~sample["prompt"]
            found = np.bincount(sample["tokens"][counted])
            size = max(len(found), len(counts))
            counts = np.pad(counts, (0, size - len(counts))) + np.pad(found, (0, size - len(found)))
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())

    def run(self, engine: Engine) -> dict[str, float]:
        """val/nelbo (nats per token), its standard error, and the perplexity bound. Collective.

        nelbo = sum_i S_i / sum_i n_i over blocks i with weighted loss S_i and n_i tokens; the standard error is
        that of a ratio estimator over independent blocks (Cochran, Sampling Techniques, eq. 6.10).
        """
        sums = torch.zeros(6, dtype=torch.float64)
        for batch in self.batches(engine.mesh.dp_rank, engine.mesh.dp):
            ce = engine.forward(batch.tensors()).ce.double().cpu()
            loss = (batch.weight.double() * ce).sum(1)
            tokens = (batch.eligible & batch.masked.any(1, keepdim=True)).sum(1).double()
            sums += torch.stack(
                (
                    loss.sum(),
                    tokens.sum(),
                    (loss**2).sum(),
                    (loss * tokens).sum(),
                    (tokens**2).sum(),
                    (tokens > 0).sum().double(),
                )
            )
        loss, tokens, loss2, cross, tokens2, blocks = sum_over_ranks(sums, engine.mesh).tolist()
        nelbo = loss / tokens if tokens else math.nan  # nan: prompts alone
        if blocks < 2:  # one block says nothing about how blocks differ
            return {"val/nelbo": nelbo, "val/nelbo_se": math.nan, "val/ppl_bound": math.exp(min(nelbo, 700.0))}
        residual = max(loss2 - 2 * nelbo * cross + nelbo**2 * tokens2, 0.0)
        error = math.sqrt(residual * blocks / (blocks - 1)) / tokens
        return {"val/nelbo": nelbo, "val/nelbo_se": error, "val/ppl_bound": math.exp(min(nelbo, 700.0))}


def _nothing_masked(batch: DiffusionBatch) -> DiffusionBatch:
    values = batch.tensors()
    values["masked"] = torch.zeros_like(batch.masked)
    values["weight"] = torch.zeros_like(batch.weight)
    return DiffusionBatch(**values)
