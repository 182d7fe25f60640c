"""The masking stage: which tokens of a sample are replaced by [MASK], and the weight their loss gets.

A webdataset-style stage: an iterator of sample dicts in, an iterator of sample dicts out. A sample comes with `sample_id` and
`tokens` [L], perhaps with `length` (tokens after it are padding) and `prompt` ([L] bool: shown clean, without loss); it leaves with
`mask` [L] bool, `t`, `p_mask`. Masks are drawn only where there is loss, and are carried from here on: nothing downstream
derives them from ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np

from data import noise, randomness


@dataclass(frozen=True)
class MaskingOptions:
    """How masks are drawn.

    Args:
        seed: of the run; the draw of a sample depends on it and on the sample's global index alone.
        global_batch: samples in one optimizer step (the strata of t).
        eps: smallest mask probability of the linear schedule (LLaDA: 1e-3).
        t_sampling: `stratified` over the global batch, or `iid`.
        masking: `bernoulli`: each token with probability p; `fixed_count`: exactly l tokens, l uniform in 1..eligible,
            weight eligible / l (exact bound and never more variance: Ou et al., arXiv 2406.03736, eq. 11).
        stream: name of the family of draws; validation draws from another one than training.
    """

    seed: int
    global_batch: int
    eps: float = 1e-3
    t_sampling: noise.TSampling = "stratified"
    masking: Literal["bernoulli", "fixed_count"] = "bernoulli"
    stream: str = "train"


def draw_mask(
    sample_id: int, length: int, prompt: Optional[np.ndarray], size: int, options: MaskingOptions
) -> tuple[np.ndarray, float, float]:
    """The mask of one sample: (mask [size] bool, t, p_mask), true only before `length` and outside `prompt` ([size] bool or None).

    1 / p_mask is the weight of each masked token. With `fixed_count` p_mask = l / eligible, so the weight is eligible / l. The
    draw of a token depends on its position, not on what else is eligible.
    """
    t = noise.noise_level(options.seed, options.stream, sample_id, options.global_batch, options.t_sampling)
    purpose = f"{options.stream}/mask"
    if options.masking == "bernoulli":
        p = noise.linear_mask_probability(t, options.eps)
        mask = randomness.bernoulli(options.seed, purpose, sample_id, length, p)
        if length < size:
            mask = np.concatenate([mask, np.zeros(size - length, bool)])
        if prompt is not None:
            mask &= ~prompt
        return mask, t, p
    mask = np.zeros(size, bool)
    eligible = np.arange(length) if prompt is None else np.flatnonzero(~prompt[:length])
    if not len(eligible):
        return mask, t, 1.0
    count = min(int(np.ceil(t * len(eligible))), len(eligible))  # t uniform in (0, 1] -> count uniform in 1..eligible
    scores = randomness.words(options.seed, purpose, sample_id, length)[eligible]
    mask[eligible[np.argpartition(scores, count - 1)[:count]]] = True
    return mask, t, count / len(eligible)


def masking(samples: Iterable[dict], options: MaskingOptions) -> Iterator[dict]:
    """Adds `mask` [L] bool, `t` and `p_mask` (float) to each sample."""
    for sample in samples:
        size = len(sample["tokens"])
        length = sample.get("length", size)
        mask, t, p = draw_mask(sample["sample_id"], length, sample.get("prompt"), size, options)
        yield {**sample, "length": length, "mask": mask, "t": t, "p_mask": p}


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
