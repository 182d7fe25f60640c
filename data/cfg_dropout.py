"""The CFG-dropout stage: the condition of a sample is sometimes hidden, so that the model also learns the unconditional case.

Classifier-free guidance (Ho & Salimans, arXiv 2207.12598; for masked diffusion: Nie et al., arXiv 2410.18514, section 4): a
dropped condition is replaced by mask tokens, which is exactly the sampler's unconditional input. The positions that
carry loss, their masks and weights do not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from data import randomness


def prefix_condition(samples: Iterable[dict], seed: int) -> Iterator[dict]:
    """Marks a random prefix of each sample, uniform in 0..length // 2 tokens, as its condition (kept clean, without loss)."""
    for sample in samples:
        u = float(randomness.uniform(seed, "condition_prefix", sample["sample_id"], 1)[0])
        most = sample["length"] // 2
        yield {**sample, "condition_length": min(int(u * (most + 1)), most)}


def cfg_dropout(samples: Iterable[dict], seed: int, rate: float) -> Iterator[dict]:
    """Adds `dropped` (bool): true with probability `rate`; the condition of such a sample is shown as mask tokens.

    A sample without a condition has nothing to drop: `dropped` stays false.
    """
    for sample in samples:
        u = float(randomness.uniform(seed, "cfg_dropout", sample["sample_id"], 1)[0])
        yield {**sample, "dropped": bool(u <= rate and sample["condition_length"] > 0)}


def no_dropout(samples: Iterable[dict]) -> Iterator[dict]:
    """The stage for rate 0: nothing is drawn, `dropped` is false, the objective is unchanged."""
    for sample in samples:
        yield {**sample, "dropped": False}
