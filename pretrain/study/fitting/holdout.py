"""How well each approach foresees a budget it has not seen: one budget left out at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import numpy as np

from pretrain.study.fitting.laws import Cost, Refused, Surface
from pretrain.study.fitting.parametric import Space, check, minimise
from pretrain.study.fitting.table import Cells

LEAST_BUDGETS = 4


def leave_one_budget_out(
    cells: Cells, cost: Cost, parametric: bool, optima: dict[int, float], predict: Callable[[Cells, float], float]
) -> dict[str, Any]:
    """Each budget foreseen from the others: the loss at its optimum, and by the parametric law the losses of all its cells.

    parametric: whether all cells bear that law; one that was refused is not scored. optima: group number -> log loss measured at
    its optimum, of the budgets that have one. predict: (cells without a budget, its ln C) -> log loss by the IsoFLOP frontier; it
    may raise Refused. Refused below four budgets, and where no approach has a law.
    """
    if len(cells.groups) < LEAST_BUDGETS:
        raise Refused(f"{len(cells.groups)} budgets: leaving one out needs at least {LEAST_BUDGETS}")
    found: dict[str, list[dict[str, Any]]] = {"parametric": [], "isoflop": [], "cells": []}
    errors: dict[str, list[float]] = {"parametric": [], "isoflop": [], "cells": []}
    for group, (ln_C, at) in enumerate(cells.groups):
        rest, C = cells.without(group), float(np.exp(ln_C))
        foreseen: dict[str, float] = {}
        law = _parametric(rest) if parametric else None
        if law is not None:
            foreseen["parametric"] = float(np.log(law.optimum(ln_C, cost)[2]))
            off = np.expm1(law.ln_loss(cells.ln_N[at], cells.ln_D[at]) - cells.y[at])
            found["cells"].append({"C": C, "cells": len(at), "rms_relative_error": _rms(off)})
            errors["cells"] += off.tolist()
        if group not in optima:
            continue
        try:
            foreseen["isoflop"] = predict(rest, ln_C)
        except Refused:
            pass
        measured = float(np.exp(optima[group]))
        for approach, ln_loss in foreseen.items():
            predicted = float(np.exp(ln_loss))
            errors[approach].append(predicted / measured - 1)
            entry = {"C": C, "predicted": predicted, "measured": measured, "relative_error": errors[approach][-1]}
            found[approach].append(entry)
    if not any(errors.values()):
        raise Refused("no approach gave a law, of all budgets and without one of them")
    return {**found, "rms_relative_error": {name: _rms(part) for name, part in errors.items() if part}}


def _rms(errors: Any) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def _parametric(cells: Cells) -> Optional[Surface]:
    try:
        check(cells.ln_N, cells.ln_D)
    except Refused:
        return None
    space = Space.of(cells.ln_N, cells.ln_D, cells.y)
    return space.surface(minimise(cells.ln_N, cells.ln_D, cells.y, space))
