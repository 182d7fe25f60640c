"""A ratio of two sums over independent units, and its standard error."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """A value and its standard error; nan where nothing can be said."""

    value: float
    se: float

    def times(self, factor: float) -> Estimate:
        """The same in another unit."""
        return Estimate(self.value * factor, self.se * abs(factor))

    def exp(self) -> Estimate:
        """e to it, by the delta method; a value that overflows is held at e^700."""
        value = math.exp(min(self.value, 700.0))
        return Estimate(value, value * self.se)


def ratio(numerators: Tensor, denominators: Tensor) -> Estimate:
    """sum_i S_i / sum_i n_i of S, n [units] float64, over the units with n_i > 0.

    The standard error is that of a ratio estimator over independent units (Cochran, Sampling Techniques, eq. 6.10); nan for one
    unit, which says nothing about how units differ.
    """
    total, units = float(denominators.sum()), int((denominators > 0).sum())
    if not units:
        return Estimate(math.nan, math.nan)
    value = float(numerators.sum()) / total
    if units < 2:
        return Estimate(value, math.nan)
    residual = float(((numerators - value * denominators) ** 2).sum())
    return Estimate(value, math.sqrt(residual * units / (units - 1)) / total)
