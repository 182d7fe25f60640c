"""Approach 2 of Hoffmann et al. (2203.15556, section 3.2): a parabola in ln N through the final losses of each budget, its
minimum, and power laws through the minima.

A parabola is the second-order form of the true curve: off-centre or wide grids (more than about 4x to each side) bias its minimum
(arXiv 2603.22339). The simulated studies that give the intervals have that bias too, so the intervals allow for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from pretrain.study.fitting.laws import Refused

Array = Any  # numpy array
SIZES = 3


@dataclass(frozen=True)
class Parabola:
    """One budget: its cells (indices into the study's), ln N of each, and the projector from losses to coefficients in x -
    middle."""

    ln_C: float
    cells: Array  # [m]
    x: Array  # [m], ln N
    middle: float
    project: Array  # [3, m]
    curvature_factor: float  # standard error of c2 for unit noise

    @classmethod
    def of(cls, ln_C: float, cells: Array, x: Array) -> Parabola:
        """Refused with fewer than three sizes."""
        distinct = 1 + int((np.diff(np.sort(x)) > 0.01).sum())
        if distinct < SIZES:
            sizes = "size" if distinct == 1 else "sizes"
            raise Refused(f"{distinct} {sizes} at C = {np.exp(ln_C):.3g}: a parabola needs at least {SIZES}")
        middle = float(x.mean())
        design = np.vander(x - middle, 3, increasing=True)
        inverse = np.linalg.inv(design.T @ design)
        return cls(ln_C, cells, x, middle, inverse @ design.T, float(np.sqrt(inverse[2, 2])))

    @property
    def free(self) -> int:
        return len(self.x) - 3

    def fit(self, loss: Array) -> tuple[Array, Array]:
        """(coefficients [S, 3] in x - middle, residuals [S, m]) of losses [S, m], nats."""
        coefficients = loss @ self.project.T
        return coefficients, loss - coefficients @ np.vander(self.x - self.middle, 3, increasing=True).T

    def vertex(self, coefficients: Array) -> tuple[Array, Array]:
        """(ln N [S], loss [S]) where the slope is zero."""
        c0, c1, c2 = coefficients.T
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.middle - c1 / (2 * c2), c0 - c1 * c1 / (4 * c2)

    def in_ln_N(self, coefficients: Array) -> list[float]:
        """[c0, c1, c2] of loss = c0 + c1 x + c2 x^2 with x = ln N."""
        c0, c1, c2 = (float(c) for c in coefficients)
        m = self.middle
        return [c0 - c1 * m + c2 * m * m, c1 - 2 * c2 * m, c2]


@dataclass(frozen=True)
class Minima:
    """Minima of k budgets in S studies: ln N and log loss [S, k], NaN where refused; the reasons for the first study."""

    ln_N: Array
    ln_L: Array
    coefficients: list[Array]  # of each budget, [S, 3]
    reasons: list[str]
    noise: float  # relative, of one cell of the first study


def minima(parabolas: list[Parabola], y: Array, known_noise: Optional[float] = None) -> Minima:
    """The interior minima of each budget for S studies, y [S, n]: log losses of all cells.

    The noise of a cell is pooled over the budgets (relative to the loss); where three sizes a budget leave none of it,
    `known_noise` is taken. A minimum counts if the parabola opens upward by more than the noise makes it (t test, 95 %) and lies
    inside the sizes.
    """
    from scipy.stats import t as student

    fits = [(p, np.exp(y[:, p.cells])) for p in parabolas]
    solved = [(p, *p.fit(loss), loss.mean(-1)) for p, loss in fits]
    free = sum(p.free for p in parabolas)
    if free:
        spread = sum(np.square(residuals / mean[:, None]).sum(-1) for _, _, residuals, mean in solved)
        noise, quantile = np.sqrt(spread / free), float(student.ppf(0.975, free))
    elif known_noise is not None:
        noise, quantile = np.full(len(y), known_noise), 1.96
    else:
        raise Refused("three sizes a budget and no repeats leave nothing to tell the noise by: add sizes")
    found_N, found_L, coefficients, reasons = [], [], [], []
    for p, c, _, mean in solved:
        ln_N, loss = p.vertex(c)
        error = quantile * noise * mean * p.curvature_factor
        inside = (ln_N > p.x.min()) & (ln_N < p.x.max())
        good = (c[:, 2] > error) & inside
        found_N.append(np.where(good, ln_N, np.nan))
        found_L.append(np.where(good, np.log(np.where(loss > 0, loss, np.nan)), np.nan))
        coefficients.append(c)
        reasons.append("" if good[0] else _reason(p, c[0], float(error[0]), float(2 * noise[0] * mean[0])))
    return Minima(np.stack(found_N, -1), np.stack(found_L, -1), coefficients, reasons, float(noise[0]))


def _reason(p: Parabola, c: Array, error: float, noise: float) -> str:
    """Why a budget has no minimum that counts. error: half the interval of c2; noise: two deviations of a cell, nats."""
    at = f"at C = {np.exp(p.ln_C):.3g}"
    low, high = p.x.min() - p.middle, p.x.max() - p.middle
    ends = c[1] + 2 * c[2] * low, c[1] + 2 * c[2] * high  # slopes of the parabola at the smallest and the largest size
    if ends[0] < 0 and ends[1] < 0:
        return f"no interior minimum: the parabola still falls towards larger N {at}: add larger sizes"
    if ends[0] > 0 and ends[1] > 0:
        return f"no interior minimum: the parabola still falls towards smaller N {at}: add smaller sizes"
    if c[2] <= 0 and abs(c[1] * (high - low) + c[2] * (high**2 - low**2)) > noise:
        # It bends the wrong way, but one end is lower than the other by more than the noise: the minimum is beyond that end.
        towards = "smaller" if c[1] * (high - low) + c[2] * (high**2 - low**2) > 0 else "larger"
        return f"no interior minimum: the parabola still falls towards {towards} N {at}: add {towards} sizes"
    if c[2] <= 0:
        return f"the parabola opens downward {at}: its losses are not separable from noise, repeat its cells or widen its sizes"
    return (
        f"curvature not separable from noise {at}: c2 = {c[2]:.3g}, between {c[2] - error:.3g} and {c[2] + error:.3g}: "
        "repeat its cells or widen its sizes"
    )
