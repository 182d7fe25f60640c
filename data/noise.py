"""Noise levels: how t is drawn over the global batch, and how a schedule turns t into a mask probability and a weight.

A schedule is a decreasing alpha(t) from 1 to 0: the share of tokens that are still clean (Shi et al., "Simplified and Generalized
Masked Diffusion", arXiv 2406.04329, table 1). The mask probability runs over [low, high] of it:

    p(t) = low + (high - low) (1 - alpha(t)),      weight(t) = -alpha'(t) / p(t),      t uniform in (0, 1]

With low 0 and high 1 the expected weighted loss is the integral of E(p) / p over p, whatever the schedule: the bound. Every masked
token of Bernoulli masks has a floor low = eps (Nie et al., arXiv 2502.09992, Algorithm 1), which gives the mean of E(p) / p over
[eps, 1]: within about eps of the bound, and of finite variance (a polynomial's power must be above 1/2 for that).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from data import randomness

TSampling = Literal["stratified", "iid"]
ScheduleKind = Literal["linear", "cosine", "polynomial"]


@dataclass(frozen=True)
class Schedule:
    """How noise level t becomes a mask probability.

    Args:
        kind: `linear`: alpha = 1 - t; `cosine`: alpha = 1 - cos(pi/2 (1 - t)); `polynomial`: alpha = 1 - t^power.
        power: of `polynomial`.
        low, high: the mask probabilities that t in [0, 1] runs over. Clipped to less than [0, 1] (Arriola et al., arXiv
            2503.09573) the loss is the mean of E(p) / p over [low, high], which is not a bound.

    Raises ValueError for a range outside [0, 1] or a power that is not positive.
    """

    kind: ScheduleKind = "linear"
    power: float = 2.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"mask probabilities [{self.low}, {self.high}] must satisfy 0 <= low < high <= 1")
        if not (self.power > 0 and math.isfinite(self.power)):
            raise ValueError(f"power is {self.power}, it must be > 0")

    def above(self, floor: float) -> Schedule:
        """The same schedule, never below `floor`."""
        return replace(self, low=max(self.low, floor))

    def inside(self, eps: float) -> Schedule:
        """The same schedule, no nearer than eps to either end. ValueError if nothing of it is left."""
        return replace(self, low=max(self.low, eps), high=min(self.high, 1 - eps))

    def share(self, t: float) -> float:
        """1 - alpha(t): the share of tokens that is gone, rising from 0 to 1."""
        if self.kind == "linear":
            return t
        if self.kind == "cosine":
            return math.sin(0.5 * math.pi * t)
        return t**self.power

    def slope(self, t: float) -> float:
        """-alpha'(t)."""
        if self.kind == "linear":
            return 1.0
        if self.kind == "cosine":
            return 0.5 * math.pi * math.cos(0.5 * math.pi * t)
        return self.power * t ** (self.power - 1)

    def time(self, share: float) -> float:
        """t at which `share` of the tokens is gone: the inverse of `share`."""
        if self.kind == "linear":
            return share
        if self.kind == "cosine":
            return 2 / math.pi * math.asin(share)
        return share ** (1 / self.power)

    def probability(self, t: float) -> float:
        """p(t) in [low, high]."""
        return min(self.low + (self.high - self.low) * self.share(t), self.high)

    def weight(self, t: float) -> float:
        """-alpha'(t) / p(t), the weight of a masked token's loss."""
        return self.slope(t) / self.probability(t)

    def count(self, t: float, eligible: int) -> tuple[int, float]:
        """(l, weight): exactly l of `eligible` tokens masked. With low 0 and high 1 the expected weighted loss is sum_l E_l / l.

        l = ceil(p(t) eligible) falls on each value with the probability q_l that t has there, and the weight is
        1 / (l q_l (high - low)): eligible / l for the linear schedule (Ou et al., arXiv 2406.03736, eq. 11).
        """
        count = min(max(math.ceil(self.probability(t) * eligible), 1), eligible)
        before = self._reached((count - 1) / eligible) if count > 1 else 0.0
        after = self._reached(count / eligible) if count < eligible else 1.0
        return count, 1 / (count * (after - before) * (self.high - self.low))

    def _reached(self, probability: float) -> float:
        """t at which p(t) reaches `probability`, 0 or 1 outside of the range."""
        return self.time(min(max((probability - self.low) / (self.high - self.low), 0.0), 1.0))


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
    return (_rank(sample, global_batch) + u) / global_batch


def noise_levels(
    seed: int, stream: str, sample: int, global_batch: int, units: int, sampling: TSampling = "stratified"
) -> np.ndarray:
    """t in (0, 1] of each of the `units` parts of one sample that have noise levels of their own, float64 [units].

    `stratified`: the parts fall into as many equal strata, in an order drawn for the sample, so that noise does not depend on
    the place in it; inside each the samples of a step fall into B strata as in `noise_level`. All jitters are independent.
    """
    if units == 1:
        return np.array([noise_level(seed, stream, sample, global_batch, sampling)])
    u = randomness.uniform(seed, f"{stream}/noise_levels", sample, units)
    if sampling == "iid":
        return u
    order = np.argsort(randomness.words(seed, f"{stream}/noise_order", sample, units))
    return (order + (_rank(sample, global_batch) + u) / global_batch) / units


def _rank(sample: int, batch: int) -> float:
    step, position = divmod(sample, batch)
    return float(_strata(step, batch)[position])
