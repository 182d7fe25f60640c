"""What the objective section of a config means: the draws, the form of a batch, the row loss, and whether it is a bound."""

from __future__ import annotations

from typing import Literal, Optional

from data.batch import Form
from data.errors import InputError
from data.flow import MOST_CANDIDATES, FlowOptions
from data.masking import MaskingOptions
from data.noise import Schedule
from parallel.row_loss import RowLoss
from parallel.row_losses import row_loss
from pretrain.config import Config, ObjectiveConfig

BERT_MASK_RATIO = (0.15, 0.99)
ANNEAL_WINDOWS = 64
SMALL_EPS = 0.01  # what a floor or ceiling of so much leaves out is not held against a bound
MASKED_KINDS = ("masked", "block", "bert")  # those that replace tokens by the mask token
Normalizer = Literal["tokens", "masked", "answers"]


def schedule(objective: ObjectiveConfig) -> Schedule:
    """How the noise level becomes the probability that a token is corrupted."""
    low, high = objective.mask_ratio or (BERT_MASK_RATIO if objective.kind == "bert" else (0.0, 1.0))
    return Schedule(objective.schedule, objective.power, low, high)


def masking_options(config: Config) -> MaskingOptions:
    """The draws of the training stream."""
    objective = config.objective
    return MaskingOptions(
        seed=config.run.seed,
        global_batch=config.train.global_batch_size,
        eps=objective.eps,
        t_sampling=objective.t_sampling,
        masking=objective.masking,
        schedule=schedule(objective),
        unit="block" if objective.kind == "block" else objective.noise_unit,
        block_size=objective.block_size,
    )


def flow_options(config: Config, start: tuple[int, int] = (0, 0)) -> Optional[FlowOptions]:
    """The soft inputs, for `flow`. start: (step, sample) at which the stream begins."""
    objective = config.objective
    if objective.kind != "flow":
        return None
    return FlowOptions(
        config.model.vocab_size, objective.temperature, objective.temperature_steps, objective.candidates, start
    )


def normalizer(objective: ObjectiveConfig) -> Normalizer:
    """What the summed loss of the global batch is divided by."""
    return objective.normalizer or ("masked" if objective.kind == "bert" else "tokens")


def batch_form(objective: ObjectiveConfig, start_id: int) -> Form:
    """What a batch looks like. start_id: what stands before the first token of a text (end-of-text)."""
    return Form(
        kind=objective.kind,
        block_size=objective.block_size,
        shift=objective.shift,
        weighting=objective.weighting and objective.kind != "bert",
        per_answer=normalizer(objective) == "answers",
        start_id=start_id,
    )


def row_loss_of(objective: ObjectiveConfig) -> RowLoss:
    """What each counted token adds to the training loss."""
    if objective.kind == "flow":
        return row_loss("symmetric_kl", objective.smoothing)
    return row_loss("uniform" if objective.kind == "uniform" else "cross_entropy")


def row_length(config: Config) -> int:
    """Columns of a row that the model computes: data.sequence_length, twice that with a clean copy."""
    return config.data.sequence_length * batch_form(config.objective, 0).copies


def lookahead(config: Config, step: int) -> Optional[int]:
    """How many tokens ahead each token sees at an optimizer step; None: all of them.

    Grows linearly from 0 (causal) to all in `anneal_attention` steps, as Gong et al. (arXiv 2410.17891) let more and
    more of the right context in; a window instead of random entries of the mask, so that fused kernels can take it.
    """
    steps, length = config.objective.anneal_attention, config.data.sequence_length
    if step >= steps:
        return None
    grain = max(1, length // ANNEAL_WINDOWS)  # few windows, so that compiled layers are compiled few times
    return int((length - 1) * step / steps) // grain * grain


def not_a_bound(objective: ObjectiveConfig) -> str:
    """Why the training loss is no bound of the negative log-likelihood; "" if it is one.

    A small eps, which leaves out a part of about eps (of `uniform` more: docs/objectives.md), is not held against it.
    """
    if objective.kind == "bert":
        return "bert is plain cross-entropy at variable mask rates"
    if objective.kind == "flow":
        return "flow trains a symmetric divergence from smoothed labels"
    if not objective.weighting and objective.kind != "autoregressive":
        return "objective.weighting is off"
    chosen = schedule(objective)
    if (chosen.low, chosen.high) != (0.0, 1.0) and objective.kind != "autoregressive":
        return f"objective.mask_ratio [{chosen.low:g}, {chosen.high:g}] leaves out a part of the noise levels"
    exact = objective.kind == "autoregressive" or objective.masking == "fixed_count"
    if objective.eps > SMALL_EPS and not exact:
        return f"objective.eps {objective.eps:g} leaves out a part of the noise levels (up to {SMALL_EPS:g} is small)"
    return ""


def check_objective(config: Config) -> None:
    """InputError for settings that are out of range or mean nothing together."""
    objective, kind = config.objective, config.objective.kind
    ratio, temperature = objective.mask_ratio, objective.temperature
    length, size = config.data.sequence_length, objective.block_size
    of_masks = kind in MASKED_KINDS
    rules = [
        ("eps", 0 < objective.eps < 0.5, "in (0, 0.5): with eps 0 the weight 1/p has infinite variance"),
        (
            "power",
            (0.2 if objective.masking == "fixed_count" else 0.501) <= objective.power <= 100,
            "above 0.5 and at most 100 (below, Bernoulli weights have infinite variance; fixed_count takes 0.2 and more)",
        ),
        ("mask_ratio", ratio is None or 0 <= ratio[0] < ratio[1] <= 1, "[low, high] with 0 <= low < high <= 1"),
        ("block_size", kind != "block" or size >= 1, "at least 1 with objective.kind block"),
        (
            "block_size",
            kind != "block" or length % max(size, 1) == 0,
            f"a divisor of data.sequence_length ({length}); nearest: {_divisor(length, size)}",
        ),
        ("block_size", kind == "block" or size == 0, f"0 with objective.kind {kind}: only block has blocks"),
        ("anneal_attention", objective.anneal_attention >= 0, ">= 0 (0 = full attention from the start)"),
        (
            "anneal_attention",
            objective.anneal_attention <= config.train.steps,
            f"at most train.steps ({config.train.steps}), or attention would never be full",
        ),
        (
            "normalizer",
            objective.normalizer != "masked" or kind not in ("masked", "block") or not objective.weighting,
            "tokens or answers: weighted losses divided by masked tokens alone are neither a bound nor a mean "
            "(objective.weighting=false makes them a mean)",
        ),
        ("smoothing", 0 < objective.smoothing < 1, "in (0, 1): without smoothing the divergence is infinite"),
        ("temperature", 0 < temperature[1] <= temperature[0] < float("inf"), "[first, last], 0 < last <= first"),
        ("temperature_steps", objective.temperature_steps >= 1, ">= 1"),
        ("candidates", 1 <= objective.candidates <= MOST_CANDIDATES, f"1 to {MOST_CANDIDATES}"),
        ("shift", not objective.shift or kind in ("masked", "bert"), f"false with objective.kind {kind}"),
        (
            "anneal_attention",
            not objective.anneal_attention or kind in ("masked", "bert"),
            f"0 with objective.kind {kind}",
        ),
        (
            "masking",
            objective.masking == "bernoulli" or of_masks,
            f"bernoulli with objective.kind {kind}: only {', '.join(MASKED_KINDS)} mask",
        ),
        (
            "noise_unit",
            objective.noise_unit == "sequence"
            or (config.data.packing == "isolate" and kind in ("masked", "bert", "uniform")),
            "sequence, unless data.packing is isolate and objective.kind masked, bert or uniform",
        ),
    ]
    for key, fine, allowed in rules:
        if not fine:
            raise InputError(f"config: objective.{key} is {getattr(objective, key)!r}, it must be {allowed}")
    try:
        chosen = schedule(objective)
        chosen.above(objective.eps) if of_masks else chosen.inside(objective.eps)
    except ValueError:
        raise InputError(
            f"config: objective.eps {objective.eps} leaves nothing of objective.mask_ratio [{chosen.low:g}, {chosen.high:g}]: "
            "lower it, or widen the range"
        ) from None


def _divisor(length: int, size: int) -> int:
    """The divisor of `length` that is nearest to `size`."""
    return min((d for d in range(1, length + 1) if length % d == 0), key=lambda d: abs(d - size), default=1)
