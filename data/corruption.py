"""Corruption without a mask token: uniform-state noise, and none at all (autoregressive).

Webdataset-style stages like data.masking, with the same fields going in and coming out; `mask` then says which tokens count in
the loss (all that are eligible), and `noisy` [L] what the model is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Optional

import numpy as np

from data import randomness
from data.masking import MaskingOptions, draw_mask, unit_starts

Stage = Callable[[Iterable[dict]], Iterator[dict]]


def eligible_tokens(size: int, length: int, prompt: Optional[np.ndarray]) -> np.ndarray:
    """[size] bool: tokens that may count in the loss, before `length` and outside the prompt."""
    counted = np.arange(size) < length
    return counted if prompt is None else counted & ~prompt


def id_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The narrowest type that loaders ship ids below `vocab_size` in."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def random_tokens(seed: int, purpose: str, index: int, count: int, vocab_size: int) -> np.ndarray:
    """`count` token ids, uniform over 0..vocab_size - 1 to within 2**-32, int64 [count]."""
    words = randomness.words(seed, purpose, index, (count + 1) // 2).view(np.uint32)[:count]
    return ((words.astype(np.uint64) * np.uint64(vocab_size)) >> np.uint64(32)).astype(np.int64)


def uniform_corruption(samples: Iterable[dict], options: MaskingOptions, vocab_size: int) -> Iterator[dict]:
    """Uniform-state noise: each eligible token becomes, with probability p(t), one of all `vocab_size` ids at random.

    The marginal is q(z | x) = alpha onehot(x) + (1 - alpha) / vocab_size with alpha = 1 - p, and the weight of each eligible token
    is the rate -alpha'(t) / alpha of the continuous-time bound (Schiff et al., "Simple Guidance Mechanisms for Discrete
    Diffusion Models", arXiv 2412.10193, section 4). p runs over [eps, 1 - eps]: at both ends the rate or the bracket diverges.
    """
    schedule = options.schedule.inside(options.eps)
    options = replace(options, schedule=schedule, masking="bernoulli")
    for sample in samples:
        size, index = len(sample["tokens"]), sample["sample_id"]
        length = sample.get("length", size)
        units = unit_starts(sample, size, options.unit, options.block_size)
        drawn = draw_mask(index, length, sample.get("prompt"), size, options, units)
        noise = random_tokens(options.seed, f"{options.stream}/corruption", index, size, vocab_size)
        levels = np.atleast_1d(drawn.t)
        spread = schedule.high - schedule.low
        weight = np.array([spread * schedule.slope(t) / (1 - schedule.probability(t)) for t in levels])
        sample = {
            **sample,
            "length": length,
            "mask": eligible_tokens(size, length, sample.get("prompt")),
            "noisy": np.where(drawn.mask, noise, sample["tokens"]).astype(id_dtype(vocab_size)),
            "t": drawn.t,
            "p_mask": drawn.p_mask,
            "weight": weight if units is not None else float(weight[0]),
        }
        if units is not None:
            sample["units"] = units
        yield sample


def no_corruption(samples: Iterable[dict]) -> Iterator[dict]:
    """Every eligible token counts with weight 1, from the tokens before it alone (autoregressive)."""
    for sample in samples:
        size = len(sample["tokens"])
        length = sample.get("length", size)
        counted = eligible_tokens(size, length, sample.get("prompt"))
        yield {**sample, "length": length, "mask": counted, "t": 1.0, "p_mask": 1.0, "weight": 1.0}


def with_first_tokens_given(samples: Iterable[dict], corruption: Stage) -> Iterator[dict]:
    """A corruption in which the first token of each text is given: where the hidden state at i predicts token i + 1, nothing
    predicts it. It is no condition: what leaves has the prompt that came.
    """
    for sample in corruption(first_tokens_given(samples)):
        sample["prompt"] = sample.pop("own_prompt")
        yield sample


def first_tokens_given(samples: Iterable[dict]) -> Iterator[dict]:
    """Marks the first token of each text as prompt; `own_prompt` keeps what was."""
    for sample in samples:
        prompt = np.zeros(len(sample["tokens"]), bool) if sample.get("prompt") is None else sample["prompt"].copy()
        prompt[:1] = True
        if sample.get("borders") is not None:
            prompt |= sample["borders"]
        yield {**sample, "prompt": prompt, "own_prompt": sample.get("prompt")}
