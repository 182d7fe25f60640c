"""The laws themselves: loss against parameters and tokens, what a FLOP budget buys, the optimum of both. Arrays of laws at once.

N: parameters, D: tokens, C: FLOPs of the whole training, loss: nats per token. `ln` is the natural logarithm throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import InputError

Array = Any  # numpy array, or a float where one law is meant


class Refused(ValueError):
    """The evidence does not bear this part of a fit; the message is the reason, one line."""


@dataclass(frozen=True)
class Cost:
    """What a training costs: C = exp(ln_factor) N^power D. `C = 6 N D` is Cost(ln 6, 1).

    Small models pay for attention and the head too, so C / (N D) depends on N: over the sizes of one study a power of N says it.
    """

    ln_factor: float = float(np.log(6.0))
    power: float = 1.0

    def ln_tokens(self, ln_C: Array, ln_N: Array) -> Array:
        """ln of the tokens that C FLOPs buy at N parameters."""
        return ln_C - self.ln_factor - self.power * ln_N


def fit_cost(ln_N: Array, ln_D: Array, ln_C: Array) -> tuple[Cost, float]:
    """(the cost of rows by least squares, the largest relative error it makes on one of them)."""
    y = ln_C - ln_D
    if np.ptp(ln_N) < 1e-9:
        return Cost(float(np.mean(y - ln_N)), 1.0), 0.0
    power, factor = np.polyfit(ln_N - ln_N.mean(), y, 1)
    if abs(power - 1) < 1e-9:
        power = 1.0
    fitted = factor + power * (ln_N - ln_N.mean())
    return Cost(float(factor - power * ln_N.mean()), float(power)), float(np.expm1(np.abs(fitted - y).max()))


@dataclass(frozen=True)
class Surface:
    """L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2203.15556, equation 2). Fields: floats, or arrays [S] of S laws."""

    E: Array
    ln_A: Array
    ln_B: Array
    alpha: Array
    beta: Array

    @classmethod
    def of(cls, E: float, A: float, B: float, alpha: float, beta: float) -> Surface:
        return cls(E, float(np.log(A)), float(np.log(B)), alpha, beta)

    def ln_loss(self, ln_N: Array, ln_D: Array) -> Array:
        """[n], or [S, n] for S laws."""
        E, ln_A, ln_B, alpha, beta = (np.asarray(x)[..., None] for x in self.fields())
        with np.errstate(divide="ignore"):
            terms = np.log(E), ln_A - alpha * ln_N, ln_B - beta * ln_D
        return np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2])

    def fields(self) -> tuple[Array, ...]:
        """In the order of the constructor."""
        return self.E, self.ln_A, self.ln_B, self.alpha, self.beta

    def allocation(self, cost: Cost) -> tuple[Array, Array]:
        """(exponent, ln coefficient) of N_opt = coefficient C^exponent: dL = 0 along C = const gives alpha A / N^alpha =
        p beta B / D^beta with p = cost.power, hence exponent = beta / (alpha + p beta) (2203.15556, equation 4, where p = 1)."""
        both = self.alpha + cost.power * self.beta
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(self.alpha) + self.ln_A - np.log(cost.power * self.beta) - self.ln_B
            return self.beta / both, (ratio - self.beta * cost.ln_factor) / both

    def optimum(self, ln_C: Array, cost: Cost) -> tuple[Array, Array, Array]:
        """(ln N_opt, ln D_opt, loss there) of a budget ln_C (a float)."""
        exponent, ln_coefficient = self.allocation(cost)
        ln_N = ln_coefficient + exponent * ln_C
        ln_D = cost.ln_tokens(ln_C, ln_N)
        return ln_N, ln_D, self.E + np.exp(self.ln_A - self.alpha * ln_N) + np.exp(self.ln_B - self.beta * ln_D)

    def frontier(self, cost: Cost) -> tuple[Array, Array, Array]:
        """(E, ln k, g) of the loss at the optimum, which is exactly E + k C^-g with g = alpha beta / (alpha + p beta)."""
        exponent, ln_coefficient = self.allocation(cost)
        ln_k = self.ln_A - self.alpha * ln_coefficient + np.log1p(self.alpha / (cost.power * self.beta))
        return self.E, ln_k, self.alpha * exponent

    def ln_compute(self, loss: float, cost: Cost) -> Array:
        """ln of the FLOPs whose optimum has this loss; +inf for a law that never comes so low (loss <= E)."""
        E, ln_k, g = self.frontier(cost)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(loss > E, (ln_k - np.log(np.maximum(loss - E, 0.0))) / g, np.inf)


# As published; printed coefficients are rounded. N: non-embedding parameters for Quokka, all parameters for the others; C = 6 N D.
PUBLISHED: dict[str, Surface] = {
    "quokka": Surface.of(2.413, 798.6, 4604.9, 0.379, 0.378),  # arXiv 2510.03280, masked diffusion
    "chinchilla": Surface.of(1.69, 406.4, 410.7, 0.34, 0.28),  # arXiv 2203.15556, as printed
    "chinchilla_again": Surface.of(
        1.8172, 482.01, 2085.43, 0.3478, 0.3658
    ),  # arXiv 2404.10102: a re-fit of its figures
}


def published(name: str) -> Surface:
    """A published law by name; InputError with the names for another one."""
    if name not in PUBLISHED:
        raise InputError(f"no published law is called {name!r}; there are {', '.join(sorted(PUBLISHED))}")
    return PUBLISHED[name]


def effective_tokens(unique: Array, epochs: Array, half: Array) -> Array:
    """Muennighoff et al. 2305.16264, equation 5: D' = U + U R* (1 - exp(-R / R*)), R = epochs - 1 repetitions (none below one
    epoch: D' = U epochs). `half` is R*: after R* repetitions a token is worth 1/e of a fresh one."""
    repetitions = np.maximum(epochs - 1.0, 0.0)
    return unique * (np.minimum(epochs, 1.0) - half * np.expm1(-repetitions / half))


def effective_parameters(parameters: Array, useful: Array, half: Array) -> Array:
    """The same for parameters in excess of what the unique data can use (equation 6): N' = U_N + U_N R*_N (1 - exp(-R_N / R*_N)),
    R_N = max(0, N / U_N - 1); `useful` is U_N, the optimal N for training on the unique tokens once."""
    return effective_tokens(useful, parameters / useful, half)


def quokka_repeated_loss(parameters: Array, unique: Array, epochs: Array) -> Array:
    """Quokka's law of repeated data (arXiv 2510.03280): L = 1535.23 / N^.42 + 54.21 / D'^.13 with
    D' = U E^1.49 exp(-(max(0, E - 1) / Ep)^.40), Ep = 254.35 U^.39 / N^.55.

    As printed, with its oddities: there is no constant term, and for a few epochs D' is above U E: it says that a repeated token
    is worth more than a fresh one. Do not extrapolate with it.
    """
    scale = 254.35 * unique**0.39 / parameters**0.55
    effective = unique * epochs**1.49 * np.exp(-((np.maximum(0.0, epochs - 1.0) / scale) ** 0.40))
    return 1535.23 / parameters**0.42 + 54.21 / effective**0.13
