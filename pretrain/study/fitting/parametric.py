"""Approach 3 of Hoffmann et al.: L = E + A / N^alpha + B / D^beta over all cells at once, with its bootstrap.

Huber's loss (delta 1e-3) of the log loss, the logsumexp form, L-BFGS from a grid of starts, as 2203.15556 section 3.3. Two traps
that Besiroglu et al. (2404.10102) found there are avoided: the objective is the SUM over cells scaled to order 1 (a mean of
numbers near 1e-6 stops L-BFGS at its tolerance), and nothing is rounded. The variables are centred: ln A and ln B at the middle of
the cells, not at N = D = 1, where they and the exponents are almost the same direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np

from pretrain.study.fitting.bootstrap import LEVEL, Estimate, Noise
from pretrain.study.fitting.laws import Cost, Refused, Surface
from pretrain.study.fitting.solver import huber, solve

Array = Any  # numpy array
DELTA = 1e-3
NUMBERS = 5
EXPONENTS = (0.05, 0.15, 0.3, 0.5, 0.8, 1.2)  # the grid of starts, for alpha and beta each
LEAST_SHARE = 1e-3  # E is held between this share of the least loss and the least loss


@dataclass(frozen=True)
class Space:
    """The centred variables x = (ln E, ln A - alpha m_N, ln B - beta m_D, alpha, beta) and the box they stay in."""

    middle_N: float
    middle_D: float
    low: Array
    high: Array

    @classmethod
    def of(cls, ln_N: Array, ln_D: Array, y: Array) -> Space:
        least = float(y.min())
        low = np.array([least + np.log(LEAST_SHARE), least - 20, least - 20, 0.01, 0.01])
        high = np.array([least, float(y.max()) + 5, float(y.max()) + 5, 3.0, 3.0])
        return cls(float(ln_N.mean()), float(ln_D.mean()), low, high)

    def surface(self, x: Array) -> Surface:
        """x: [5] or [S, 5]."""
        alpha, beta = x[..., 3], x[..., 4]
        return Surface(
            np.exp(x[..., 0]), x[..., 1] + alpha * self.middle_N, x[..., 2] + beta * self.middle_D, alpha, beta
        )

    def point(self, law: Surface) -> Array:
        """The variables of a law, [5]."""
        ln_A, ln_B = law.ln_A - law.alpha * self.middle_N, law.ln_B - law.beta * self.middle_D
        return np.array([np.log(law.E), ln_A, ln_B, law.alpha, law.beta])


def terms(x: Array, ln_N: Array, ln_D: Array) -> tuple[Array, Array]:
    """(log loss [S, n], Jacobian [S, n, 5]) of centred variables x [S, 5]; ln_N, ln_D: centred, [n] or [S, n]."""
    E, A, B, alpha, beta = (x[:, i, None] for i in range(5))
    t = np.broadcast_arrays(E + 0.0 * ln_D, A - alpha * ln_N, B - beta * ln_D)
    top = np.maximum(np.maximum(t[0], t[1]), t[2])
    w = [np.exp(one - top) for one in t]
    total = w[0] + w[1] + w[2]
    p = [one / total for one in w]
    return top + np.log(total), np.stack([p[0], p[1], p[2], -ln_N * p[1], -ln_D * p[2]], -1)


@dataclass(frozen=True)
class Parametric:
    """A fitted law, the noise around it, `draws`: the laws of the bootstrap's refits (fields [S]), and `ridge`: laws that the
    likelihood allows, furthest along each of the numbers (fields [R])."""

    law: Surface
    draws: Surface
    ridge: Surface
    noise: Noise
    rms: float  # of the log residuals around the law
    notes: tuple[str, ...] = ()

    def estimate(self, value: Callable[[Surface], Array], log: bool = False, least: float = -np.inf) -> Estimate:
        """A number of the law, given as a function of laws; `log`: the function gives its logarithm."""
        with np.errstate(invalid="ignore"):
            at = float(value(self.law))
            return Estimate(at, value(self.draws) - at, log, least, plausible=value(self.ridge))

    def report(self, cost: Cost) -> dict[str, Any]:
        """The part of fit.json."""
        p, k = cost.power, cost.ln_factor
        found = {
            "E": self.estimate(lambda law: law.E, least=0.0),
            "A": self.estimate(lambda law: law.ln_A, log=True),
            "B": self.estimate(lambda law: law.ln_B, log=True),
            "alpha": self.estimate(lambda law: law.alpha, least=0.0),
            "beta": self.estimate(lambda law: law.beta, least=0.0),
            "N_exponent": self.estimate(lambda law: law.allocation(cost)[0]),
            "N_coefficient": self.estimate(lambda law: law.allocation(cost)[1], log=True),
            "D_exponent": self.estimate(lambda law: 1 - p * law.allocation(cost)[0]),
            "D_coefficient": self.estimate(lambda law: -k - p * law.allocation(cost)[1], log=True),
        }
        numbers: dict[str, Any] = {name: estimate.number() for name, estimate in found.items()}
        numbers |= {"rms_log_residual": self.rms, "huber_delta": DELTA, "noise": self.noise.deviation}
        return numbers | ({"notes": list(self.notes)} if self.notes else {})

    def optimum(self, ln_C: float, cost: Cost) -> tuple[Estimate, Estimate, Estimate]:
        """(N_opt, D_opt, loss) of a budget, logarithms all."""
        N, D = (self.estimate(lambda law, i=i: law.optimum(ln_C, cost)[i], log=True) for i in (0, 1))  # type: ignore[misc]
        return N, D, self.estimate(lambda law: np.log(law.optimum(ln_C, cost)[2]), log=True)

    def ln_compute(self, loss: float, cost: Cost) -> Estimate:
        """ln of the FLOPs that reach a loss at the optimum."""
        return self.estimate(lambda law: law.ln_compute(loss, cost), log=True)


def check(ln_N: Array, ln_D: Array) -> None:
    """Refused where these cells cannot bear the five numbers, whatever their losses."""
    if len(ln_N) < NUMBERS + 1:
        raise Refused(f"{len(ln_N)} cells for the law's {NUMBERS} numbers: at least {NUMBERS + 1} are needed")
    for name, values in (("N", ln_N), ("D", ln_D)):
        distinct = 1 + int((np.diff(np.sort(values)) > 0.01).sum())
        if distinct < 3:
            raise Refused(f"the cells have {distinct} distinct values of {name}: its term needs at least 3")
    across = np.linalg.svd(np.stack([ln_N - ln_N.mean(), ln_D - ln_D.mean()], 1), compute_uv=False)[1]
    if across / np.sqrt(len(ln_N)) < 0.1:
        raise Refused(
            "collinear cells: N and D lie on one line in logarithms (as tokens in proportion to parameters do), so which term "
            "the loss falls by cannot be told; add cells off that line"
        )


def starts(ln_N: Array, ln_D: Array, y: Array, space: Space) -> Array:
    """[36, 5]: for each pair of exponents, E, A and B by non-negative least squares of the relative error (then the law is
    linear)."""
    from scipy.optimize import nnls

    u, v, loss = ln_N - space.middle_N, ln_D - space.middle_D, np.exp(y)
    found = []
    for alpha in EXPONENTS:
        for beta in EXPONENTS:
            design = np.stack([np.ones_like(u), np.exp(-alpha * u), np.exp(-beta * v)], 1) / loss[:, None]
            shares = np.maximum(nnls(design, np.ones_like(u))[0], 2 * LEAST_SHARE * loss.min())
            found.append([*np.log(shares), alpha, beta])
    return np.clip(np.array(found), space.low, space.high)


def objective(x: Array, u: Array, v: Array, y: Array, delta: Optional[float] = DELTA) -> tuple[float, Array]:
    """(the sum of Huber's losses scaled to order 1, its gradient) for centred variables x [5] and cells u, v, y [n]."""
    prediction, jacobian = terms(x[None], u, v)
    residual = prediction[0] - y
    slope = residual if delta is None else np.clip(residual, -delta, delta)
    scale = 1.0 / (len(y) * (delta or 1.0) ** 2)
    return float(huber(residual, delta)) * scale, jacobian[0].T @ slope * scale


def minimise(ln_N: Array, ln_D: Array, y: Array, space: Space, delta: Optional[float] = DELTA) -> Array:
    """[5]: the best of L-BFGS from every start of the grid. y: log losses [n]. The same input gives the same output."""
    from scipy.optimize import minimize

    u, v = ln_N - space.middle_N, ln_D - space.middle_D
    grid = starts(ln_N, ln_D, y, space)
    # A few damped Gauss-Newton steps for the whole grid at once, then L-BFGS from all that are still different from each other.
    near, value = solve(lambda x: terms(x, u, v), y, grid, space.low, space.high, delta, iterations=15)
    best: list[Array] = []
    for at in np.argsort(value, kind="stable"):
        if all(np.abs(near[at] - other).max() > 1e-3 for other in best) and len(best) < 8:
            best.append(near[at])
    bounds = list(zip(space.low, space.high))
    options = {"maxiter": 500, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 20}
    ends = [
        minimize(objective, x, (u, v, y, delta), "L-BFGS-B", jac=True, bounds=bounds, options=options) for x in best
    ]
    end = np.array(min(ends, key=lambda e: float(e.fun)).x)
    # L-BFGS ends where a kink of Huber's function stops it; weighted least squares goes on from there and never goes back.
    return solve(lambda x: terms(x, u, v), y, end[None], space.low, space.high, delta, iterations=200)[0][0]


def fit_parametric(ln_N: Array, ln_D: Array, y: Array, samples: int, random: np.random.Generator) -> Parametric:
    """The law of cells (ln N, ln D, log loss y; [n] each) and its bootstrap. Refused where they cannot bear one."""
    check(ln_N, ln_D)
    space = Space.of(ln_N, ln_D, y)
    u, v = ln_N - space.middle_N, ln_D - space.middle_D
    x = minimise(ln_N, ln_D, y, space)
    squares, _ = solve(lambda z: terms(z, u, v), y, x[None], space.low, space.high, None, iterations=200)
    prediction, jacobian = terms(squares, u, v)
    free = (squares[0] > space.low) & (squares[0] < space.high)
    noise = Noise.around(y - prediction[0], jacobian[0][:, free] if free.any() else jacobian[0])
    fitted = terms(x[None], u, v)[0][0]
    _check_separable(y, prediction[0], noise)
    ridge = _ridge(u, v, y, squares[0], noise, space)
    drawn = fitted + noise.draw(random, samples, len(y))
    refits, _ = solve(lambda z: terms(z, u, v), drawn, np.repeat(x[None], samples, 0), space.low, space.high, DELTA)
    rms = float(np.sqrt(np.square(y - fitted).mean()))
    allowed = space.surface(ridge)
    allowed = replace(
        allowed, E=np.where(ridge[:, 0] <= _floor(space), 0.0, allowed.E)
    )  # the edge of the box stands for none
    return Parametric(space.surface(x), space.surface(refits), allowed, noise, rms, _notes(x, ridge, refits, space))


def _check_separable(y: Array, fitted: Array, noise: Noise) -> None:
    """Refused where the law explains no more of the losses than chance would (F test against one loss for all cells, 5 %)."""
    from scipy.stats import f as distribution

    rest, whole = (float(np.square(y - middle).sum()) for middle in (fitted, y.mean()))
    ratio = (whole - rest) / (NUMBERS - 1) / max(rest / noise.free, 1e-300)
    if ratio <= distribution.ppf(LEVEL, NUMBERS - 1, noise.free):
        raise Refused(
            f"the losses are not separable from noise: over all cells the law falls by {np.ptp(fitted):.2%}, one cell scatters by "
            f"{noise.deviation:.2%}"
        )


def _ridge(u: Array, v: Array, y: Array, squares: Array, noise: Noise, space: Space) -> Array:
    """[R, 5]: points of the profile likelihood that a 95 % likelihood-ratio interval takes in (Bates and Watts 1988, section 6.1).

    Each number is held at values around the least-squares one, the others fitted; kept where RSS <= RSS_min (1 + F / (n - p)) with
    the 95 % point of F(1, n - p). Where a number is not identified this runs as far as the cells allow; refits do not.
    """
    from scipy.stats import f as distribution

    def model(x: Array) -> tuple[Array, Array]:
        return terms(x, u, v)

    prediction, jacobian = model(squares[None])
    least = float(np.square(prediction[0] - y).sum())
    covariance = np.linalg.pinv(jacobian[0].T @ jacobian[0], rcond=1e-12) * noise.deviation**2
    begin, low, high = [], [], []
    for i in range(NUMBERS):
        near = squares[i] + np.sqrt(covariance[i, i]) * np.linspace(-4, 4, 33)
        far = np.linspace(space.low[i], space.high[i], 33)
        if i == 0:  # E itself in even steps, not its logarithm
            far = np.log(np.linspace(np.exp(space.low[0]), np.exp(space.high[0]), 33))
        for held in np.clip(np.concatenate([near, far]), space.low[i], space.high[i]):
            along = covariance[:, i] / max(covariance[i, i], 1e-300)
            begin.append(squares + along * (held - squares[i]))
            low.append(np.where(np.arange(NUMBERS) == i, held, space.low))
            high.append(np.where(np.arange(NUMBERS) == i, held, space.high))
    x, value = solve(model, y, np.array(begin), np.array(low), np.array(high), None, iterations=100)
    cut = least * (1 + distribution.ppf(LEVEL, 1, noise.free) / noise.free)
    return np.concatenate([squares[None], x[2 * value <= cut]])


def _floor(space: Space) -> float:
    """ln E up to which a fit does without E."""
    return float(space.low[0]) + 0.7


def _notes(x: Array, ridge: Array, refits: Array, space: Space) -> tuple[str, ...]:
    floor = _floor(space)
    if x[0] <= floor or (ridge[:, 0] <= floor).any() or float((refits[:, 0] <= floor).mean()) > 0.05:
        return ("E is not identified from below: a law without it fits these cells as well",)
    return ()
