"""What the loop eats: this rank's microbatches of every step, with what all ranks must know of them before the first backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from data.batch import DiffusionBatch, Form, answers, expand
from data.compact import CompactBatch
from data.loader import Slice, training_batches
from parallel.mesh import Mesh
from pretrain.config import Config
from pretrain.loop.bad_shards import BadShards
from pretrain.loop.preflight import Plan
from pretrain.metrics import global_counts
from pretrain.objective import batch_form, lookahead, normalizer
from pretrain.training_data import stage_options


class Step(NamedTuple):
    """One optimizer step's input."""

    batches: list[DiffusionBatch]  # this rank's microbatches
    eligible: int  # loss-eligible tokens of the global batch
    masked: int  # tokens of the global batch that count in the loss
    normalizer: int  # what the summed loss of the global batch is divided by
    pairs: int  # pairs of columns that attend to each other, of the global batch (causal attention counted as full)
    metrics: dict[str, float]


class Feed:
    """The stream of one run from its step `step` on."""

    def __init__(self, config: Config, plan: Plan, mesh: Mesh, step: int, say: Callable[[str], None]):
        """Collective. say: prints a line."""
        self._config, self._plan, self._mesh, self._step = config, plan, mesh, step
        self._blocks = plan.data.blocks(config)
        self._bad_shards = BadShards(config.data.max_bad_shards, plan.data, self._blocks, mesh, say)
        self._bad_shards.begin(step, plan.trainer.get("bad_shards", ()))
        for reset in plan.position.resets:
            if reset["step"] == step:
                say(f"a new stream begins at sample {reset['sample']}; changed: {', '.join(reset['changed'])}")

    def steps(self, stop: int, beat: Callable[[str], object] = lambda doing: None) -> Generator[Step, None, None]:
        """The steps up to step number `stop`. Collective. beat: told what is being done."""
        config = self._config
        part = Slice(config.train.global_batch_size, config.train.micro_batch_size, self._mesh.dp_rank, self._mesh.dp)
        special = self._plan.data.first.special
        form, by = batch_form(config.objective, special.eos), normalizer(config.objective)
        source = training_batches(
            self._blocks,
            stage_options(config, (self._plan.position.step, self._plan.position.sample)),
            part,
            special.pad,
            consumed=self.consumed(self._step),
            workers=config.data.workers,
            steps=max(stop - self._step, 0),
        )
        began = time.perf_counter()
        beat("waiting for data")
        for compact in source:
            waited = time.perf_counter() - began
            beat("counting tokens")
            compact = self._bad_shards.settle(self._step, compact)
            batches = [expand(c, special.mask, form, lookahead(config, self._step)) for c in compact]
            own = (
                sum(_pairs(c, form) for c in compact),
                sum(answers(batch) for batch in batches) if by == "answers" else 0,
                self._bad_shards.lost,
                int(sum(c.digest.sum() for c in compact)),
            )
            eligible, masked, pairs, answered, lost, digest = global_counts(batches, self._mesh, *own)
            divisor = {"tokens": eligible, "masked": masked, "answers": answered}[by]
            self._step += 1
            metrics = self._metrics(lost, digest) | {"perf/data_time": waited}
            yield Step(batches, eligible, masked, divisor, pairs, metrics)
            began = time.perf_counter()
            beat("waiting for data")

    def consumed(self, step: int) -> int:
        """Global index of the first sample of a step: the whole state of the stream."""
        return self._plan.position.consumed(step, self._config.train.global_batch_size)

    def saved(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of the stream."""
        return {
            "samples_consumed": self.consumed(step),
            "stream": self._plan.position.saved(),
            "bad_shards": self._bad_shards.saved(),
            "data_fingerprint": self._plan.data.fingerprint(),
            "tokenizer_sha256": self._plan.data.first.manifest.tokenizer_sha256,
        }

    def _metrics(self, lost: int, digest: int) -> dict[str, float]:
        """How often each source was read through, what bad shards took away from this step, and a digest of all that the step read
        and drew: two runs with equal digests trained on the same tokens, masks, noise levels and drops, whatever their layouts.
        """
        read = self._blocks.epochs(self.consumed(self._step))
        metrics: dict[str, float] = {
            f"data/epoch/{name}" if name else "data/epoch": epochs for name, epochs in read.items()
        }
        metrics["data/digest"] = digest
        if self._config.data.max_bad_shards:
            metrics |= {"data/bad_shards": len(self._bad_shards), "data/lost_samples": lost}
        return metrics


def _pairs(compact: CompactBatch, form: Form) -> int:
    """Pairs of columns of which one sees the other. With a clean copy and blocks of S tokens a document of n tokens has n (n + S):
    in both halves a token sees whole blocks up to its own.
    """
    return compact.pairs() + (compact.tokens.size * form.block_size if form.kind == "block" else 0)
