"""Intervals by bootstrap: how noise is drawn, and how the errors of refits become an interval.

Resampling the cells themselves covers badly at the size of real studies: twelve cells bear five numbers, a resample of them often
fewer. So the residuals are resampled, each corrected for what the fit took of it, and their spread for its own uncertainty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

LEVEL = 0.95
Array = Any  # numpy array


@dataclass(frozen=True)
class Noise:
    """Errors of log loss around a least-squares fit. residuals [n], free: cells less fitted numbers, deviation: of one cell."""

    residuals: Array
    free: int
    deviation: float

    @classmethod
    def around(cls, residuals: Array, jacobian: Array) -> Noise:
        """From the residuals [n] and the Jacobian [n, p] of a least-squares fit: r / sqrt(1 - h) with h the leverage of a cell
        (Davison and Hinkley 1997, section 6.2), then scaled so that their mean square is the unbiased RSS / (n - p)."""
        count, numbers = jacobian.shape
        free = count - numbers
        basis, triangle = np.linalg.qr(jacobian)
        kept = np.abs(np.diag(triangle)) > 1e-12 * np.abs(triangle).max()
        leverage = np.square(basis[:, kept]).sum(1)
        deviation = float(np.sqrt(np.square(residuals).sum() / free))
        corrected = residuals / np.sqrt(np.maximum(1 - leverage, 1.0 / count))
        spread = float(np.sqrt(np.square(corrected).mean()))
        return cls(corrected * (deviation / spread) if spread > 0 else corrected, free, deviation)

    def draw(self, random: np.random.Generator, samples: int, count: int) -> Array:
        """[samples, count]: residuals with random signs, times sqrt(free / chi^2(free)) once a sample: the deviation is an estimate
        too, and with few cells a poor one (this is what turns normal quantiles into Student's)."""
        signs = random.integers(0, 2, (samples, count)) * 2.0 - 1.0
        scale = np.sqrt(self.free / random.chisquare(self.free, (samples, 1)))
        return random.choice(self.residuals, (samples, count)) * signs * scale


@dataclass(frozen=True)
class Estimate:
    """A number and the errors that refits make of it. `log`: value and errors are natural logarithms of the number.

    errors [S]: refit minus truth; NaN where a refit was refused, +-inf where it does not exist.
    """

    value: float
    errors: Array
    log: bool = False
    least: float = -np.inf  # what the number cannot be below, on the scale of value
    plausible: Any = ()  # values that the likelihood allows: the interval reaches at least to the furthest of them

    def number(self, level: float = LEVEL) -> dict[str, Optional[float]]:
        """{"value", "low", "high"}: an end without a bound is None.

        Both ends lie as far off, on the scale of value, as the wider of the two tails of the errors: the union of the percentile
        and the basic interval (Davison and Hinkley, section 5.2), which keeps its level whichever way the errors lean.
        """
        half = half_width(self.errors, level)
        down, up = self.reach()
        ends = [self.value, max(self.value - max(half, down), self.least), self.value + max(half, up)]
        if self.log:
            with np.errstate(over="ignore"):
                ends = [float(np.exp(end)) for end in ends]
            ends[1] = ends[1] if ends[1] > 0 else -np.inf
        return {name: float(end) if np.isfinite(end) else None for name, end in zip(("value", "low", "high"), ends)}

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two independent estimates on the same scale."""
        with np.errstate(invalid="ignore"):
            errors, value = self.errors - other.errors, self.value - other.value
            # Independent likelihoods: the reaches of both add as squares.
            (down, up), (other_down, other_up) = self.reach(), other.reach()
            ends = (value - np.hypot(down, other_up), value + np.hypot(up, other_down))
        return Estimate(value, errors, self.log, plausible=ends)

    def reach(self) -> tuple[float, float]:
        """How far the plausible values lie below and above the value."""
        allowed = np.asarray(self.plausible, dtype=float)
        away = allowed[~np.isnan(allowed)] - self.value
        return float(-np.min(away, initial=0.0)), float(np.max(away, initial=0.0))


def half_width(errors: Array, level: float = LEVEL) -> float:
    """The larger of the two tails of the errors at this level; inf when too few refits bear the number to say."""
    known = np.sort(errors[~np.isnan(errors)])
    if len(known) < max(20, len(errors) // 10):
        return float("inf")
    # Order statistics, no interpolation: an infinite error beside a finite one must not become NaN.
    low = known[int(np.floor((1 - level) / 2 * (len(known) - 1)))]
    high = known[int(np.ceil((1 + level) / 2 * (len(known) - 1)))]
    return float(max(-low, high, 0.0))
