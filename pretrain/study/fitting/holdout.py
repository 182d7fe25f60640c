"""How well each approach foresees a budget it has not seen: one budget left out at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pretrain.study.fitting.laws import Cost, Refused
from pretrain.study.fitting.parametric import Space, check, minimise
from pretrain.study.fitting.table import Cells

LEAST_BUDGETS = 4


def leave_one_budget_out(
    cells: Cells, cost: Cost, optima: dict[int, float], predict: Callable[[Cells, float], float]
) -> dict[str, Any]:
    """Predicted against measured loss at the optimum of each budget, fitted without it.

    optima: group number -> log loss measured at its optimum. predict: (cells without a budget, its ln C) -> log loss by the IsoFLOP
    frontier; it may raise Refused. Refused below four budgets.
    """
    if len(optima) < LEAST_BUDGETS:
        raise Refused(f"{len(optima)} budgets have an optimum: leaving one out needs at least {LEAST_BUDGETS}")
    found: dict[str, list[dict[str, Any]]] = {"parametric": [], "isoflop": []}
    for group, measured in sorted(optima.items()):
        rest, ln_C = cells.without(group), cells.groups[group][0]
        for approach, ask in (("parametric", lambda c, at: _parametric(c, at, cost)), ("isoflop", predict)):
            try:
                predicted = ask(rest, ln_C)
            except Refused:
                continue
            loss = float(np.exp(predicted)), float(np.exp(measured))
            entry = {"C": float(np.exp(ln_C)), "predicted": loss[0], "measured": loss[1]}
            found[approach].append(entry | {"relative_error": loss[0] / loss[1] - 1})
    errors = {name: [entry["relative_error"] for entry in part] for name, part in found.items()}
    rms = {name: float(np.sqrt(np.mean(np.square(part)))) for name, part in errors.items() if part}
    return {**found, "rms_relative_error": rms}


def _parametric(cells: Cells, ln_C: float, cost: Cost) -> float:
    check(cells.ln_N, cells.ln_D)
    space = Space.of(cells.ln_N, cells.ln_D, cells.y)
    law = space.surface(minimise(cells.ln_N, cells.ln_D, cells.y, space))
    return float(np.log(law.optimum(ln_C, cost)[2]))
