"""Approach 1 of Hoffmann et al. (2203.15556, section 3.1), on final points: the best cell of each budget, and power laws through
them.

The paper takes the lower envelope of learning curves. Ours would mislead: a point in the middle of a run with a decayed learning
rate is worse than a run of that length whose rate came down in time, so only final losses are compared. What is left of a grid of
sizes is coarse: the optimum lies between the neighbours of the best cell, and the least of several noisy losses is too low. The
intervals come from simulated studies with the same grid, where both happen too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # numpy array


def best_cells(
    groups: list[tuple[float, Array]], ln_N: Array, y: Array, optima: bool = False
) -> tuple[Array, Array, list[str]]:
    """(ln N [S, k], log loss [S, k], reasons of the first study) of the best size of each budget.

    groups: (ln C, cells) of k budgets; ln_N [n]; y [S, n]: log losses. Repeats of a size are averaged. NaN where the best size is
    the smallest or the largest of its budget, as a single one is. optima: a single size is its budget's optimum, found elsewhere.
    """
    found_N, found_L, reasons = [], [], []
    for ln_C, cells in groups:
        sizes = distinct_sizes(ln_N[cells])
        loss = np.stack([y[:, cells[at]].mean(-1) for _, at in sizes], -1)
        best = loss.argmin(-1)
        values = np.array([size for size, _ in sizes])
        edge = (best == 0) | (best == len(sizes) - 1)
        if optima and len(sizes) == 1:
            edge = np.zeros(len(y), dtype=bool)
        found_N.append(np.where(edge, np.nan, values[best]))
        found_L.append(np.where(edge, np.nan, loss.min(-1)))
        side = "largest" if best[0] else "smallest"
        add = "larger" if best[0] else "smaller"
        words = f"no interior minimum: the {side} size is the best at C = {np.exp(ln_C):.3g}: add {add} sizes"
        if len(sizes) == 1:
            words = f"no optimum: one size at C = {np.exp(ln_C):.3g} says nothing of others"
        reasons.append(words if edge[0] else "")
    return np.stack(found_N, -1), np.stack(found_L, -1), reasons


def distinct_sizes(ln_N: Array) -> list[tuple[float, Array]]:
    """(ln N, positions) of sizes that differ by more than 1 %, rising."""
    order = np.argsort(ln_N, kind="stable")
    cuts = np.flatnonzero(np.diff(ln_N[order]) > 0.01) + 1
    return [(float(ln_N[at].mean()), at) for at in np.split(order, cuts)]
