"""Noise levels: how t is drawn over the global batch, and how a schedule turns t into a mask probability and a weight.

Linear schedule (Nie et al., "Large Language Diffusion Models", arXiv 2502.09992, Algorithm 1): p = (1 - eps) t + eps, weight 1/p.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from data import randomness

TSampling = Literal["stratified", "iid"]


def radical_inverse(i: np.ndarray) -> np.ndarray:
    """Van der Corput's value of each i in base 2: its 64 bits mirrored, as uint64 (order is all that is used)."""
    x = np.asarray(i, np.uint64)
    for shift, mask in ((1, 0x5555555555555555), (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F)):
        s, m = np.uint64(shift), np.uint64(mask)
        x = ((x >> s) & m) | ((x & m) << s)
    return x.byteswap()


@lru_cache(maxsize=4)
def _strata(step: int, batch: int) -> np.ndarray:
    """rank(i) for the `batch` samples of one step: the order of their van der Corput values, shape [batch]."""
    ids = np.arange(step * batch, (step + 1) * batch, dtype=np.uint64)
    ranks = np.empty(batch, np.int64)
    ranks[np.argsort(radical_inverse(ids), kind="stable")] = np.arange(batch)
    return ranks


def noise_level(seed: int, stream: str, sample: int, global_batch: int, sampling: TSampling = "stratified") -> float:
    """t in (0, 1] of one sample of the named stream of draws.

    `stratified`: t = (rank + U) / B, one sample in each of B equal strata of every step; the strata are dealt in
    van der Corput order so that any contiguous slice of the batch (a rank's share) is nearly stratified as well, and the
    noise does not grow with the position in the batch. `iid`: t = U.
    """
    u = randomness.chance(seed, f"{stream}/noise_level", sample)
    if sampling == "iid":
        return u
    step, position = divmod(sample, global_batch)
    return (float(_strata(step, global_batch)[position]) + u) / global_batch


def linear_mask_probability(t: float, eps: float) -> float:
    """p = (1 - eps) t + eps: never below eps, since Bernoulli masks with weight 1/p have infinite variance at p -> 0."""
    return (1.0 - eps) * t + eps
