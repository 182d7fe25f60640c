"""Simulated studies whose truth is known: what an approach gets wrong there is what it is taken to get wrong here.

A world is a law (a refit of the bootstrap, so that the uncertainty of the law itself is in it) and a study of the same cells with
fresh noise. Where the parametric law cannot be had, the parabolas of the budgets stand in for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from pretrain.study.fitting.bootstrap import Noise
from pretrain.study.fitting.laws import Cost, Surface
from pretrain.study.fitting.parametric import Parametric

Array = Any  # numpy array


@dataclass(frozen=True)
class World:
    """simulated [S, n]: log losses of the cells in each of S worlds. ln_N, ln_loss: true optima of budgets, [k] -> [S, k].

    frontier: (E, ln k, g), [S] each, where the true loss at the optimum is exactly E + k C^-g; else None.
    """

    simulated: Array
    cost: Cost
    ln_N: Callable[[Array], Array]
    ln_loss: Callable[[Array], Array]
    frontier: Optional[tuple[Array, Array, Array]] = None

    def ln_compute(self, loss: float, budgets: Array) -> Array:
        """[S]: ln of the FLOPs that truly reach a loss; +inf for a world that never comes so low."""
        if self.frontier is None:
            slope, constant = _lines(budgets, self.ln_loss(budgets))
            return (np.log(loss) - constant) / slope
        E, ln_k, g = self.frontier
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(loss > E, (ln_k - np.log(np.maximum(loss - E, 0.0))) / g, np.inf)


def of_surface(fit: Parametric, cost: Cost, cells: tuple[Array, Array], random: np.random.Generator) -> World:
    """Worlds of the parametric law. cells: (ln N, ln D), [n] each.

    Half of their laws are refits of the bootstrap, half points of the likelihood's ridge: where a number is hardly identified
    those reach much further, elsewhere about as far.
    """
    count = len(fit.draws.E)
    pick = random.integers(0, len(fit.ridge.E), count // 2)
    fields = zip(fit.draws.fields(), fit.ridge.fields())
    draws = Surface(*(np.concatenate([drawn[: count - len(pick)], ridge[pick]]) for drawn, ridge in fields))
    mean = draws.ln_loss(*cells)

    def ln_N(ln_C: Array) -> Array:
        return np.stack([draws.optimum(c, cost)[0] for c in ln_C], -1)

    def ln_loss(ln_C: Array) -> Array:
        return np.log(np.stack([draws.optimum(c, cost)[2] for c in ln_C], -1))

    return World(mean + fit.noise.draw(random, *mean.shape), cost, ln_N, ln_loss, draws.frontier(cost))


def of_optima(
    ln_C: Array,
    ln_N: Array,
    ln_L: Array,
    mean: Array,
    noise: Noise,
    cost: Cost,
    random: np.random.Generator,
    samples: int,
) -> World:
    """Worlds whose optima lie on the straight lines through the optima found, [k] each; mean [n]: log losses of the cells there."""
    simulated = mean + noise.draw(random, samples, len(mean))
    lines = [np.polyfit(ln_C, y, 1) for y in (ln_N, ln_L)]

    def line(which: int) -> Callable[[Array], Array]:
        found = (ln_N, ln_L)[which]
        known = {float(c): float(y) for c, y in zip(ln_C, found)}
        slope, constant = lines[which]
        return lambda at: np.tile([known.get(float(c), slope * c + constant) for c in at], (samples, 1))

    return World(simulated, cost, line(0), line(1))


def _lines(x: Array, y: Array) -> tuple[Array, Array]:
    """(slope [S], constant [S]) of y [S, k] over x [k]."""
    away = x - x.mean()
    slope = (y * away).sum(-1) / np.square(away).sum()
    return slope, y.mean(-1) - slope * x.mean()
