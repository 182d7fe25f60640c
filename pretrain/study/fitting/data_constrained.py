"""Repeated data (Muennighoff et al., arXiv 2305.16264): what a token is worth when it is seen again.

L = E + A / N^alpha + B / D'^beta with D' = U + U R* (1 - exp(-R / R*)), U unique tokens, R = epochs - 1 repetitions. All six
numbers are fitted together, to fresh and repeated cells. (The paper's second half, N' for parameters in excess, is
laws.effective_parameters: it needs cells far above the optimal size for their unique tokens, and is evaluated, not fitted.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pretrain.study.fitting.bootstrap import Estimate, Noise
from pretrain.study.fitting.laws import Refused, effective_tokens
from pretrain.study.fitting.parametric import DELTA, Space, check, minimise, terms
from pretrain.study.fitting.solver import solve

Array = Any  # numpy array
LEAST, MOST = np.log(0.05), np.log(1e4)  # R* is looked for between 0.05 and 10 000 repetitions
REPEATED = 1.0 + 1e-6


def repeated(epochs: Array) -> Array:
    """Whether a cell saw tokens again; NaN (not given) counts as one epoch."""
    return np.nan_to_num(epochs, nan=1.0) > REPEATED


def fit_repeated(
    ln_N: Array, unique: Array, epochs: Array, y: Array, samples: int, random: np.random.Generator
) -> dict[str, Any]:
    """The part of fit.json. ln_N, unique tokens, epochs, log losses y: [n]. Refused where no or too few cells repeat their data."""
    again = repeated(epochs)
    if not again.any():
        raise Refused("no cell saw its tokens twice")
    if again.sum() < 3:
        raise Refused(f"{again.sum()} cells saw their tokens again: at least 3 are needed")
    if len(y) < 7:
        raise Refused(f"{len(y)} cells for the law's 6 numbers: at least 7 are needed")
    ln_D = np.log(unique * epochs)
    check(ln_N, ln_D)
    space = Space.of(ln_N, ln_D, y)
    low, high = np.append(space.low, LEAST), np.append(space.high, MOST)

    def model(x: Array) -> tuple[Array, Array]:
        half = np.exp(x[:, 5:6])
        effective = effective_tokens(unique, epochs, half)
        prediction, jacobian = terms(x[:, :5], ln_N - space.middle_N, np.log(effective) - space.middle_D)
        repetitions = np.maximum(epochs - 1, 0.0) / half
        growth = unique * half * (-np.expm1(-repetitions) - repetitions * np.exp(-repetitions))  # dD' / d ln R*
        share = jacobian[..., 2] * -x[:, 4:5] * growth / effective
        return prediction, np.concatenate([jacobian, share[..., None]], -1)

    begin = []
    for half in (1.0, 5.0, 15.0, 60.0):
        ln_effective = np.log(effective_tokens(unique, epochs, half))
        begin.append(np.append(minimise(ln_N, ln_effective, y, Space.of(ln_N, ln_D, y)), np.log(half)))
    found, values = solve(model, y, np.array(begin), low, high, DELTA, iterations=300)
    x = found[int(np.argmin(values))]
    squares, _ = solve(model, y, found, low, high, None, iterations=300)
    residuals = model(squares)[0] - y
    best = int(np.argmin(np.square(residuals).sum(-1)))
    inside = (squares[best] > low) & (squares[best] < high)
    noise = Noise.around(residuals[best], model(squares[best : best + 1])[1][0][:, inside])
    fitted = model(x[None])[0][0]
    drawn = fitted + noise.draw(random, samples, len(y))
    refits, _ = solve(model, drawn, np.repeat(x[None], samples, 0), low, high, DELTA, iterations=80)
    law, draws = space.surface(x[:5]), space.surface(refits[:, :5])
    worth = Estimate(float(x[5]), refits[:, 5] - x[5], log=True)
    # At the edge of the box the number has no end on that side: the cells do not say how fast repeats lose their worth.
    unbounded = bool(worth.value + np.quantile(worth.errors, 0.975) >= MOST - 1e-6)
    number = worth.number() | ({"high": None} if unbounded else {})
    part: dict[str, Any] = {
        "form": "muennighoff",
        "E": Estimate(law.E, draws.E - law.E, least=0.0).number(),
        "A": Estimate(law.ln_A, draws.ln_A - law.ln_A, log=True).number(),
        "B": Estimate(law.ln_B, draws.ln_B - law.ln_B, log=True).number(),
        "alpha": Estimate(law.alpha, draws.alpha - law.alpha, least=0.0).number(),
        "beta": Estimate(law.beta, draws.beta - law.beta, least=0.0).number(),
        "R_star": number,
        "cells": len(y),
        "repeated_cells": int(again.sum()),
        "rms_log_residual": float(np.sqrt(np.square(y - fitted).mean())),
    }
    if unbounded:
        part["note"] = "R* has no upper end: repeats may be worth as much as fresh tokens over these epochs"
    return part
