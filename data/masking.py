"""The masking stage: which tokens of a sample are replaced by [MASK], and the weight their loss gets.

A webdataset-style stage: an iterator of sample dicts in, an iterator of sample dicts out. A sample comes with `sample_id` and
`tokens` [L], perhaps with `length` (tokens after it are padding), `prompt` ([L] bool: shown clean, without loss) and `borders`
([L] bool: first tokens of documents); it leaves with `mask` [L] bool, `t`, `p_mask`, `weight`, and `units` ([L] bool: first tokens
of the parts that have a noise level each) where there is more than one. Masks are drawn only where there is loss, and are
carried from here on: nothing downstream derives them from ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Optional

import numpy as np

from data import noise, randomness
from data.noise import Schedule

NoiseUnit = Literal["sequence", "document", "block"]


@dataclass(frozen=True)
class MaskingOptions:
    """How masks are drawn.

    Args:
        seed: of the run; the draw of a sample depends on it and on the sample's global index alone.
        global_batch: samples in one optimizer step (the strata of t).
        eps: smallest mask probability of `bernoulli` (LLaDA: 1e-3).
        t_sampling: `stratified` over the global batch, or `iid`.
        masking: `bernoulli`: each token with probability p(t), weight -alpha'/p; `fixed_count`: exactly l tokens, for the
            linear schedule l uniform in 1..eligible with weight eligible / l (the exact bound, and never more variance).
        stream: name of the family of draws; validation draws from another one than training.
        schedule: how t becomes a probability.
        unit: what has a noise level of its own: the sample, each document (those that `borders` tells apart), or each
            block of `block_size` tokens.
    """

    seed: int
    global_batch: int
    eps: float = 1e-3
    t_sampling: noise.TSampling = "stratified"
    masking: Literal["bernoulli", "fixed_count"] = "bernoulli"
    stream: str = "train"
    schedule: Schedule = Schedule()
    unit: NoiseUnit = "sequence"
    block_size: int = 0


class Mask(NamedTuple):
    """What is masked in one sample. t, p_mask and weight: a number each, or [units] where parts have noise levels of their own."""

    mask: np.ndarray  # [L] bool
    t: float | np.ndarray
    p_mask: float | np.ndarray  # the probability, or the share of masked tokens
    weight: float | np.ndarray  # of the loss of each masked token


def draw_mask(
    sample_id: int,
    length: int,
    prompt: Optional[np.ndarray],
    size: int,
    options: MaskingOptions,
    units: Optional[np.ndarray] = None,
) -> Mask:
    """The mask of one sample of `size` tokens, true only before `length` and outside `prompt` ([size] bool or None).

    units: [size] bool, first tokens of the parts with noise levels of their own (the first token is one); None: the sample has
    one. The draw of a token depends on its position, not on what else is eligible.
    """
    if units is not None:
        return _draw_parts(sample_id, length, prompt, size, options, units)
    t = noise.noise_level(options.seed, options.stream, sample_id, options.global_batch, options.t_sampling)
    purpose = f"{options.stream}/mask"
    if options.masking == "bernoulli":
        schedule = options.schedule.above(options.eps)
        p = schedule.probability(t)
        mask = randomness.bernoulli(options.seed, purpose, sample_id, length, p)
        if length < size:
            mask = np.concatenate([mask, np.zeros(size - length, bool)])
        if prompt is not None:
            mask &= ~prompt
        return Mask(mask, t, p, schedule.slope(t) / p)
    mask = np.zeros(size, bool)
    eligible = np.arange(length) if prompt is None else np.flatnonzero(~prompt[:length])
    if not len(eligible):
        return Mask(mask, t, 1.0, 1.0)
    count, weight = options.schedule.count(t, len(eligible))
    scores = randomness.words(options.seed, purpose, sample_id, length)[eligible]
    mask[eligible[np.argpartition(scores, count - 1)[:count]]] = True
    return Mask(mask, t, count / len(eligible), weight)


def _draw_parts(
    sample_id: int, length: int, prompt: Optional[np.ndarray], size: int, options: MaskingOptions, units: np.ndarray
) -> Mask:
    part = np.cumsum(units) - 1  # [size], the part that each token belongs to
    parts = int(part[-1]) + 1
    t = noise.noise_levels(options.seed, options.stream, sample_id, options.global_batch, parts, options.t_sampling)
    open_to_loss = np.arange(size) < length
    if prompt is not None:
        open_to_loss &= ~prompt
    purpose = f"{options.stream}/mask"
    if options.masking == "bernoulli":
        schedule = options.schedule.above(options.eps)
        p = np.array([schedule.probability(level) for level in t])
        weight = np.array([schedule.weight(level) for level in t])
        drawn = randomness.uniform(options.seed, purpose, sample_id, size) <= p[part]
        return Mask(drawn & open_to_loss, t, p, weight)
    eligible = np.bincount(part[open_to_loss], minlength=parts)
    drawn_counts = [options.schedule.count(level, int(n)) if n else (0, 1.0) for level, n in zip(t, eligible)]
    count, weight = (np.array(column) for column in zip(*drawn_counts))
    where = np.flatnonzero(open_to_loss)
    scores = randomness.words(options.seed, purpose, sample_id, size)[where]
    order = where[np.lexsort((scores, part[where]))]  # part by part, in each the lowest scores first
    place = np.arange(len(order)) - (np.cumsum(eligible) - eligible)[part[order]]
    mask = np.zeros(size, bool)
    mask[order[place < count[part[order]]]] = True
    return Mask(mask, t, np.where(eligible > 0, count / np.maximum(eligible, 1), 1.0), weight)


def unit_starts(sample: dict, size: int, unit: NoiseUnit, block_size: int) -> Optional[np.ndarray]:
    """[size] bool, the first tokens of the parts of a sample that have a noise level each; None: all of it has one."""
    if unit == "block":
        return np.arange(size) % block_size == 0
    borders = sample.get("borders")
    if unit == "sequence" or borders is None:
        return None
    starts = borders.copy()
    starts[:1] = True
    return starts


def masking(samples: Iterable[dict], options: MaskingOptions) -> Iterator[dict]:
    """Adds `mask` [L] bool, `t`, `p_mask`, `weight` (float, or [units] with `units` [L] bool) to each sample."""
    for sample in samples:
        size = len(sample["tokens"])
        length = sample.get("length", size)
        units = None
        if options.unit != "sequence":
            units = unit_starts(sample, size, options.unit, options.block_size)
        drawn = draw_mask(sample["sample_id"], length, sample.get("prompt"), size, options, units)
        sample = {**sample, "length": length, **drawn._asdict()}
        if units is not None:
            sample["units"] = units
        yield sample


def random_length(samples: Iterable[dict], seed: int, probability: float) -> Iterator[dict]:
    """Cuts a sample to a uniform random length in 1..length with `probability` (LLaDA: 1%), each sample on its own.

    Only `length` changes: what follows becomes padding, which is neither attended to, nor masked, nor counted.
    """
    for sample in samples:
        index = sample["sample_id"]
        if randomness.chance(seed, "random_length", index) <= probability:
            length = sample.get("length", len(sample["tokens"]))
            sample = {**sample, "length": math.ceil(randomness.chance(seed, "random_length", index, 1) * length)}
        yield sample
