"""What optimal training does as compute grows: power laws N_opt(C), D_opt(C) and the loss there, through the optima of the budgets.

Approaches 1 and 2 differ in how they find those optima (envelope.py, isoflop.py) and share all of this. Their errors are those
they make in simulated studies whose truth is known (worlds.py): noise, the bias of a parabola or of a coarse grid, and what a
power law without E loses when it is extrapolated are all in them. Where there is no parametric law to simulate from, the worlds
are straight lines and do not know of E: there the likelihood of E through the optima says how far the losses may lie (allowed).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Optional

import numpy as np

from pretrain.study.fitting.bootstrap import Estimate
from pretrain.study.fitting.laws import Cost, Refused
from pretrain.study.fitting.solver import solve
from pretrain.study.fitting.worlds import World

Array = Any  # numpy array
WITH_E, WITHOUT_E = "L = E + k C^-g", "L = k C^-g"
LEAST_BUDGETS = 3


def power_law(ln_x: Array, ln_y: Array) -> tuple[Array, Array]:
    """(exponent [S], ln coefficient [S]) of y = coefficient x^exponent by least squares in logarithms. ln_x [k], ln_y [S, k].

    NaN in ln_y leaves that point of that row out; a row with fewer than three points gives NaN.
    """
    known = ~np.isnan(ln_y)
    count = known.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        x = np.where(known, ln_x, 0.0)
        middle = x.sum(-1) / count
        away = np.where(known, ln_x - middle[..., None], 0.0)
        height = np.where(known, ln_y, 0.0)
        exponent = (away * height).sum(-1) / np.square(away).sum(-1)
        constant = height.sum(-1) / count - exponent * middle
    enough = count >= LEAST_BUDGETS
    return np.where(enough, exponent, np.nan), np.where(enough, constant, np.nan)


@dataclass(frozen=True)
class LossLaw:
    """Loss at the optimum against compute: E + k C^-g; fields [S]; E is 0 in the law without it."""

    E: Array
    ln_k: Array
    g: Array

    def ln_loss(self, ln_C: float) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.logaddexp(np.log(self.E), self.ln_k - self.g * ln_C)

    def ln_compute(self, loss: float) -> Array:
        """+inf where the law never comes so low."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(loss > self.E, (self.ln_k - np.log(np.maximum(loss - self.E, 0.0))) / self.g, np.inf)


def fit_loss_law(ln_C: Array, ln_L: Array, with_E: bool, near: Optional[LossLaw] = None) -> LossLaw:
    """Least squares of log losses ln_L [S, k] at ln_C [k]; NaN leaves a point out. near: a law to start from, not a grid."""
    exponent, constant = power_law(ln_C, ln_L)
    if not with_E:
        return LossLaw(np.zeros_like(exponent), constant, -exponent)
    known = ~np.isnan(ln_L)
    usable = known.sum(-1) > LEAST_BUDGETS
    y = np.where(known, ln_L, 0.0)
    middle = float(ln_C.mean())
    u = ln_C - middle
    least = np.where(known, ln_L, np.inf).min(-1)
    floor = float(np.min(least[np.isfinite(least)], initial=0.0))

    def model(x: Array) -> tuple[Array, Array]:
        # The first variable is E's share of the least loss through a logistic: a box that each row has for itself.
        share = 1 / (1 + np.exp(-x[:, :1]))
        below = np.where(np.isfinite(least), least, 0.0)[:, None] + np.log(share)
        t = x[:, 1:2] - x[:, 2:3] * u
        total = np.logaddexp(below, t)
        p, q = np.exp(below - total), np.exp(t - total)
        jacobian = np.stack([p * (1 - share), q, -u * q], -1)
        return np.where(known, total, 0.0), np.where(known[..., None], jacobian, 0.0)

    low, high = np.array([-9.0, floor - 15, 0.003]), np.array([9.0, floor + 15, 3.0])
    ends = []
    grid = [(-4.0, 0.05), (0.0, 0.1), (1.0, 0.2), (3.0, 0.5)]
    if near is not None:
        part = float(np.clip(near.E[0] / np.exp(least[np.isfinite(least)].mean()), 1e-3, 0.999))
        grid = [(float(np.log(part / (1 - part))), float(near.g[0]))]
    for share, g in grid:
        rest = np.where(np.isfinite(least), least, 0.0) - np.log1p(np.exp(share))
        begin = np.stack([np.full_like(rest, share), rest, np.full_like(rest, g)], -1)
        ends.append(solve(model, y, begin, low, high, iterations=60))
    which = np.argmin([value for _, value in ends], axis=0)
    best = np.stack([x for x, _ in ends])[which, np.arange(len(which))]
    E = np.exp(np.where(usable, least, 0.0)) / (1 + np.exp(-best[:, 0]))
    g = best[:, 2]
    return LossLaw(*(np.where(usable, field, np.nan) for field in (E, best[:, 1] + g * middle, g)))


def has_constant(ln_C: Array, ln_L: Array) -> bool:
    """Whether the optima show that the loss levels off: E lowers the residuals by more than chance (F test, 5 %), four budgets at
    least."""
    from scipy.stats import f as distribution

    free = len(ln_C) - 3
    if free < 1:
        return False
    rest = []
    for with_E in (False, True):
        law = fit_loss_law(ln_C, ln_L[None], with_E)
        rest.append(float(np.square(ln_L - np.array([law.ln_loss(c)[0] for c in ln_C])).sum()))
    gain = (rest[0] - rest[1]) * free
    return bool(gain > distribution.ppf(0.95, 1, free) * max(rest[1], 1e-18))


def allowed(ln_C: Array, ln_L: Array, with_E: bool) -> LossLaw:
    """Laws E + k C^-g (fields [R]) that a 95 % likelihood-ratio interval takes in, through optima ln_C, ln_L [k].

    E is held at values from 0 to the least loss, ever closer around the best, k and g are fitted and then moved as far as
    RSS <= RSS_min + s^2 F allows: the 95 % point of F(1, n - numbers), s^2 the scatter around the law that was chosen, with or
    without E (as parametric._ridge).
    """
    from scipy.stats import f as distribution

    shares = np.linspace(0.0, 1.0, 100, endpoint=False)
    for width in (1e-2, 5e-4, 2.5e-5, 1e-6):  # the first grid alone would take its own width for scatter
        best = shares[np.argmin(_through(ln_C, ln_L, shares[:, None] * np.exp(ln_L.min()))[0])]
        shares = np.union1d(shares, np.clip(best + width * np.linspace(-1.0, 1.0, 41), 0.0, 1 - 1e-6))
    E = shares[:, None] * np.exp(ln_L.min())
    rest, height, slope, middle, total, across = _through(ln_C, ln_L, E)
    free = len(ln_C) - (3 if with_E else 2)
    scatter = (rest.min() if with_E else rest[0, 0]) / free
    room = rest.min() + scatter * distribution.ppf(0.95, 1, free) - rest
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    with np.errstate(invalid="ignore"):  # NaN where an E is not allowed at all
        height = height + np.sqrt(room / total) * np.cos(angle)
        slope = slope + np.sqrt(room / across) * np.sin(angle)
    kept = slope < 0
    return LossLaw(np.broadcast_to(E, kept.shape)[kept], (height - slope * middle)[kept], -slope[kept])


def _through(ln_C: Array, ln_L: Array, E: Array) -> tuple[Array, ...]:
    """Lines ln (L - E) = height + slope (ln C - middle) through optima [k], for each E [R, 1]: the sum of squares that is left in
    ln L, height, slope, middle, and the sum and the second moment of the weights; [R, 1] each."""
    above = np.exp(ln_L) - E
    # To first order an error of ln L is one of ln (L - E) times the share of L that lies above E: that is the weight.
    weight = np.square(above / np.exp(ln_L))
    total = weight.sum(-1, keepdims=True)
    middle = (weight * ln_C).sum(-1, keepdims=True) / total
    away = ln_C - middle
    across = (weight * np.square(away)).sum(-1, keepdims=True)
    height = (weight * np.log(above)).sum(-1, keepdims=True) / total
    slope = (weight * away * np.log(above)).sum(-1, keepdims=True) / across
    rest = np.square(ln_L - np.log(E + np.exp(height + slope * away))).sum(-1, keepdims=True)
    return rest, height, slope, middle, total, across


@dataclass(frozen=True)
class Frontier:
    """The laws through the optima of one approach. Simulated fields [S, k] belong to the worlds; NaN: refused there."""

    ln_C: Array  # [k]
    ln_N: Array  # [k]
    ln_L: Array  # [k]
    simulated_N: Array
    simulated_L: Array
    world: World
    cost: Cost
    with_E: bool

    @classmethod
    def of(cls, ln_C: Array, optima: tuple[Array, Array], simulated: tuple[Array, Array], world: World) -> Frontier:
        """optima: (ln N, log loss), [k] each. Refused with fewer than three budgets."""
        if len(ln_C) < LEAST_BUDGETS:
            raise Refused(f"{len(ln_C)} budgets have an optimum: a law in C needs at least {LEAST_BUDGETS}")
        return cls(ln_C, *optima, *simulated, world, world.cost, has_constant(ln_C, optima[1]))

    def laws(self) -> dict[str, Any]:
        """N_opt(C) and D_opt(C), for fit.json."""
        (value, ln_value), (drawn, ln_drawn) = (power_law(self.ln_C, y) for y in (self.ln_N[None], self.simulated_N))
        true, ln_true = power_law(self.ln_C, self.world.ln_N(self.ln_C))
        p, k = self.cost.power, self.cost.ln_factor
        exponent = Estimate(float(value[0]), drawn - true)
        coefficient = Estimate(float(ln_value[0]), ln_drawn - ln_true, log=True)
        return {
            "N_exponent": exponent.number(),
            "N_coefficient": coefficient.number(),
            "D_exponent": Estimate(1 - p * exponent.value, -p * exponent.errors).number(),
            "D_coefficient": Estimate(-k - p * coefficient.value, -p * coefficient.errors, log=True).number(),
        }

    def at_budget(self, i: int) -> tuple[Estimate, Estimate, Estimate]:
        """(N_opt, D_opt, loss) of budget i, as found there, no law."""
        C = self.ln_C[i : i + 1]
        N = Estimate(float(self.ln_N[i]), self.simulated_N[:, i] - self.world.ln_N(C)[:, 0], log=True)
        loss = Estimate(float(self.ln_L[i]), self.simulated_L[:, i] - self.world.ln_loss(C)[:, 0], log=True)
        return N, self._tokens(float(C[0]), N), loss

    def optimum(self, ln_C: float) -> tuple[Estimate, Estimate, Estimate]:
        """(N_opt, D_opt, loss) by the laws."""
        (value, ln_value), (drawn, ln_drawn) = (power_law(self.ln_C, y) for y in (self.ln_N[None], self.simulated_N))
        C = np.array([ln_C])
        N = Estimate(float(ln_value[0] + value[0] * ln_C), ln_drawn + drawn * ln_C - self.world.ln_N(C)[:, 0], log=True)
        found, refits, _ = self._loss_laws
        errors = refits.ln_loss(ln_C) - self.world.ln_loss(C)[:, 0]
        plausible = self._allowed.ln_loss(ln_C)
        return N, self._tokens(ln_C, N), Estimate(float(found.ln_loss(ln_C)[0]), errors, log=True, plausible=plausible)

    def _tokens(self, ln_C: float, N: Estimate) -> Estimate:
        return Estimate(float(self.cost.ln_tokens(ln_C, N.value)), -self.cost.power * N.errors, log=True)

    @cached_property
    def _loss_laws(self) -> tuple[LossLaw, LossLaw, LossLaw]:
        """(found, refitted in the simulated studies, what those should have found)."""
        found = fit_loss_law(self.ln_C, self.ln_L[None], self.with_E)
        refits = fit_loss_law(self.ln_C, self.simulated_L, self.with_E, found)
        known = ~np.isnan(self.simulated_L)
        true = np.where(known, self.world.ln_loss(self.ln_C), np.nan)
        if self.with_E and self.world.frontier is not None:
            return found, refits, LossLaw(*self.world.frontier)
        return found, refits, fit_loss_law(self.ln_C, true, self.with_E, found)

    @cached_property
    def _allowed(self) -> LossLaw:
        """None (fields [0]) where the worlds' own laws have their E."""
        if self.world.frontier is not None:
            return LossLaw(*(np.empty(0) for _ in range(3)))
        return allowed(self.ln_C, self.ln_L, self.with_E)

    def loss_law(self) -> dict[str, Any]:
        """The frontier of fit.json."""
        found, refits, true = self._loss_laws
        part: dict[str, Any] = {"law": WITH_E if self.with_E else WITHOUT_E, "budgets": len(self.ln_C)}
        if self.with_E:
            part["E"] = Estimate(float(found.E[0]), refits.E - true.E, least=0.0, plausible=self._allowed.E).number()
        also = self._allowed if self.with_E else LossLaw((), (), ())  # without E both are of the straight line
        part["k"] = Estimate(float(found.ln_k[0]), refits.ln_k - true.ln_k, log=True, plausible=also.ln_k).number()
        part["g"] = Estimate(float(found.g[0]), refits.g - true.g, plausible=also.g).number()
        if not self.with_E:
            few = len(self.ln_C) <= LEAST_BUDGETS
            part["note"] = (
                "E needs four budgets" if few else f"{len(self.ln_C)} budgets do not show that the loss levels off"
            )
        return part

    def ln_compute(self, loss: float, cost: Cost) -> Estimate:
        """ln of the FLOPs that reach a loss."""
        found, refits, _ = self._loss_laws
        value = float(found.ln_compute(loss)[0])
        errors = refits.ln_compute(loss) - self.world.ln_compute(loss, self.ln_C)
        return Estimate(value, errors, log=True, plausible=self._allowed.ln_compute(loss))
