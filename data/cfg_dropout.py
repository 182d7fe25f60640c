"""The CFG-dropout stage: the condition of a sample is sometimes hidden, so that the model also learns the unconditional case.

Classifier-free guidance (Ho & Salimans, arXiv 2207.12598; for masked diffusion: Nie et al., arXiv 2410.18514, section 4): a
dropped condition is replaced by mask tokens, which is exactly the sampler's unconditional input. The positions that
carry loss, their masks and weights do not change.

The condition of a sample is its `prompt` ([L] bool): the question of an instruction pair, a prefix of metadata, or - for plain
text - a random prefix that `prefix_condition` marks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from data import randomness


def prefix_condition(samples: Iterable[dict], seed: int) -> Iterator[dict]:
    """Adds a random prefix of each sample, uniform in 0..length // 2 tokens, to its `prompt` (shown clean, without loss)."""
    for sample in samples:
        u = randomness.chance(seed, "condition_prefix", sample["sample_id"])
        most = sample.get("length", len(sample["tokens"])) // 2
        prompt = np.zeros(len(sample["tokens"]), bool)
        prompt[: min(int(u * (most + 1)), most)] = True
        if sample.get("prompt") is not None:
            prompt |= sample["prompt"]
        yield {**sample, "prompt": prompt}


def cfg_dropout(samples: Iterable[dict], seed: int, rate: float) -> Iterator[dict]:
    """Adds `dropped` (bool): true with probability `rate`; the condition of such a sample is shown as mask tokens.

    A sample without a condition has nothing to drop: `dropped` stays false. All documents of a sample are dropped together.
    """
    for sample in samples:
        u = randomness.chance(seed, "cfg_dropout", sample["sample_id"])
        prompt = sample.get("prompt")
        yield {**sample, "dropped": bool(u <= rate and prompt is not None and prompt[: sample["length"]].any())}


def no_dropout(samples: Iterable[dict]) -> Iterator[dict]:
    """The stage for rate 0: nothing is drawn, `dropped` is false, the objective is unchanged."""
    for sample in samples:
        yield {**sample, "dropped": False}
