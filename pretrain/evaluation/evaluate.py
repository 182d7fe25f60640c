"""The bound of a model on held-out blocks, in every unit, each with its standard error.

    validation set -> blocks with fixed draws (validation.py) -> loss, tokens, bytes of each block -> sums and ratios

Standard errors are over blocks, which are taken for independent; with more draws a block's own noise falls, the differences
between blocks stay.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import DiffusionBatch
from data.errors import InputError
from data.shard_set import ShardSet
from parallel.engine import LossOutput
from pretrain.config import ObjectiveConfig
from pretrain.evaluation.evaluated_run import EvaluatedRun
from pretrain.evaluation.likelihood_draws import variance_of_mean
from pretrain.evaluation.ratio import Estimate, ratio
from pretrain.evaluation.token_bytes import TokenBytes
from pretrain.evaluation.validation import MEASURED_EPS, Validation, broken_blocks, loss_and_tokens, measured_as
from pretrain.metrics import T_BINS, sum_over_ranks, sums_by_level


class Meaning(NamedTuple):
    """What a number is."""

    name: str
    bound: str  # "upper bound" of the negative log-likelihood, or "exact"
    estimator: str


def meaning_of(objective: ObjectiveConfig) -> Meaning:
    """What the evaluation of blocks gives for an objective."""
    counts = "fixed-count masks (l of L tokens, l uniform, weight L / l), stratified over blocks and draws"
    if objective.kind == "autoregressive":
        return Meaning("NLL", "exact", "chain rule")
    if measured_as(objective) == "uniform":
        noise = f"{objective.schedule} schedule, noise in [{MEASURED_EPS:g}, {1 - MEASURED_EPS:g}], the rest left out"
        return Meaning("NELBO", "upper bound", f"continuous-time bound, t stratified over blocks and draws ({noise})")
    if objective.kind == "block":
        counts = f"in each block of {objective.block_size} tokens, {counts}"
    return Meaning("NELBO", "upper bound", counts)


def evaluate_blocks(
    run: EvaluatedRun, shards: ShardSet, *, most: int = 0, draws: int = 1, seed: int = 0, micro_batch: int = 8
) -> dict[str, Any]:
    """Plain values of everything that is known of the first `most` blocks (0: all) of `shards`. Collective.

    nelbo (nats per token), bits_per_token, bits_per_byte and perplexity are {value, se}; se_of_draws is the part of nelbo's
    standard error that more draws would take away (nan for one draw). loss_t_bins: the unweighted loss of masked tokens with
    noise level in [k / 10, (k + 1) / 10), nan where there were none.
    """
    meaning = meaning_of(run.config.objective)
    data = run.config.data
    validation = Validation(
        shards,
        data.sequence_length,
        micro_batch,
        most,
        isolate=data.packing == "isolate",
        eos_in_loss=data.pad_policy == "eos_in_loss",
        config=run.config,
        draws=draws,
        seed=seed,
    )
    bytes_of = TokenBytes(run.tokenizer)
    bins = torch.zeros(2, T_BINS, dtype=torch.float64)

    def measure(batch: DiffusionBatch, output: LossOutput) -> Tensor:
        bins.add_(sums_by_level(batch, output.value))
        found = loss_and_tokens(batch, output)
        sizes = [
            block_bytes(validation, bytes_of, int(i) // validation.draws, int(n))
            for i, n in zip(batch.sample_ids, found[:, 1])
        ]
        place = _place_in_strata(batch.t[:, :1].double(), validation)
        return torch.cat((found, torch.tensor(sizes, dtype=torch.float64)[:, None], place), 1)

    table = validation.per_sample(run, 4, measure, run.trainer["step"]).view(validation.total, validation.draws, 4)
    loss, tokens, sizes, _ = table.mean(1).T
    values, counts = sum_over_ranks(bins, run.mesh)
    if not tokens.sum():
        raise InputError(f"evaluate: nothing of {shards.location} counts in the loss: all of it is prompts or padding")
    if broken := broken_blocks(loss):
        raise InputError(
            f"evaluate: {run.folder} has no finite loss in {len(broken)} of the {validation.total} blocks of {shards.location}, "
            f"block {broken[0]} first (from token {data.sequence_length * broken[0]} on): take another checkpoint"
        )
    nelbo = ratio(loss, tokens)
    whole = validation.total == len(validation.blocks)
    return {
        **run.described(),
        "shards": shards.location,
        "measure": meaning.name,
        "bound": meaning.bound,
        "estimator": meaning.estimator,
        "draws": validation.draws,
        "seed": seed,
        "cfg_scale": 0.0,
        "blocks": int((tokens > 0).sum()),
        "tokens": int(tokens.sum()),
        "bytes": int(sizes.sum()),
        "text_bytes": shards.utf8_bytes if whole else None,
        "nelbo": nelbo._asdict(),
        "se_of_draws": _noise_of_draws(table),
        "bits_per_token": nelbo.times(1 / math.log(2))._asdict(),
        "bits_per_byte": ratio(loss, sizes).times(1 / math.log(2))._asdict(),
        "perplexity": nelbo.exp()._asdict(),
        "loss_t_bins": [float(v / n) if n else math.nan for v, n in zip(values, counts)],
    }


def block_bytes(validation: Validation, bytes_of: TokenBytes, g: int, tokens: int) -> int:
    """Bytes of the `tokens` tokens of block g that count."""
    if not tokens:
        return 0
    sample, counted = validation.sample(g)
    assert counted.sum() == tokens, f"block {g}: {counted.sum()} tokens are to be counted, {tokens} were"
    first = g * validation.blocks.sequence_length
    before = int(validation.blocks.store.read_tokens(first - 1, 1)[0]) if first else None
    return bytes_of.count(sample["tokens"].astype(np.int64), counted, sample.get("prompt"), before)


def _place_in_strata(t: Tensor, validation: Validation) -> Tensor:
    """What rises with the stratum of a sample, of its first noise level `t`.

    Kind block deals its parts out over as many ranges in an order of chance, and in each of them the samples over strata
    (data.noise.noise_levels). That chance is noise of the draw: sorted by the level itself it would be left out of the error.
    """
    if validation.form.kind != "block":
        return t
    return (t * -(-validation.blocks.sequence_length // validation.form.block_size)) % 1.0


def _noise_of_draws(table: Tensor) -> float:
    """Standard error of sum S / sum n from the draws alone, the blocks being what they are; nan for one draw.

    table: [blocks, draws, 4], loss, tokens, bytes and the place in the strata. Neighbours in them are compared, in an order that
    does not depend on what was drawn, so it is not too small in expectation (likelihood_draws.variance_of_mean).
    """
    order = table[:, :, 3].argsort(1)
    losses = table[:, :, 0].gather(1, order).numpy()
    return math.sqrt(float(variance_of_mean(losses).sum())) / float(table[:, 0, 1].sum())


def shown(found: dict[str, Any]) -> list[str]:
    """The lines that a person reads."""
    e = {name: Estimate(**found[name]) for name in ("nelbo", "bits_per_token", "bits_per_byte", "perplexity")}
    upper = found["bound"] == "upper bound"
    bytes_ = f"{found['bytes']:,} bytes of text"
    if found["text_bytes"] not in (None, found["bytes"]):
        bytes_ += (
            f" (the set's texts have {found['text_bytes']:,}: prompts are not counted, or the tokenizer changes texts)"
        )
    noise = f", of it {found['se_of_draws']:.4f} from the draws" if found["draws"] > 1 else ""
    return [
        f"{found['checkpoint']} (step {found['step']}, objective {found['objective']}) on {found['shards']}",
        f"  {found['blocks']:,} blocks, {found['tokens']:,} tokens, {bytes_}",
        f"  {found['measure']}: {found['bound']} of the negative log-likelihood; {found['estimator']}",
        f"  draws a block {found['draws']}, seed {found['seed']}, CFG off; standard errors are over blocks{noise}",
        f"  nats per token   {e['nelbo'].value:.4f} +- {e['nelbo'].se:.4f}",
        f"  bits per token   {e['bits_per_token'].value:.4f} +- {e['bits_per_token'].se:.4f}",
        f"  bits per byte    {e['bits_per_byte'].value:.4f} +- {e['bits_per_byte'].se:.4f}",
        f"  perplexity    {'<=' if upper else '  '} {e['perplexity'].value:.2f} +- {e['perplexity'].se:.2f}",
    ] + (_bin_lines(found["loss_t_bins"]) if upper else [])


def _bin_lines(bins: list[float]) -> list[str]:
    cells = "  ".join(f"{k / T_BINS:.1f}: {value:.3f}" for k, value in enumerate(bins) if not math.isnan(value))
    return [f"  loss by noise level (unweighted)  {cells}"]
