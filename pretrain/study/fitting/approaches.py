"""Approaches 1 and 2 on one objective's cells: optima of the budgets, simulated studies beside them, laws or why there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, TypeVar, Union

import numpy as np

from pretrain.study.fitting import worlds
from pretrain.study.fitting.bootstrap import Noise
from pretrain.study.fitting.envelope import best_cells
from pretrain.study.fitting.frontier import LEAST_BUDGETS, Frontier, fit_loss_law, has_constant
from pretrain.study.fitting.isoflop import Minima, Parabola, minima
from pretrain.study.fitting.laws import Cost, Refused
from pretrain.study.fitting.parametric import Parametric
from pretrain.study.fitting.table import Cells

Result = TypeVar("Result")


def attempt(fit: Callable[[], Result]) -> Union[Result, Refused]:
    """What `fit` returns, or the Refused it raised."""
    try:
        return fit()
    except Refused as reason:
        return reason


def isoflop_laws_of(
    cells: Cells, cost: Cost, parametric: Union[Parametric, Refused], samples: int, random: np.random.Generator
) -> tuple[Union[Frontier, Refused], list[dict[str, Any]]]:
    """(the laws or why there are none, the budgets of fit.json)."""
    able, unable = parabolas_of(cells)
    entries = [
        {"C": float(np.exp(cells.groups[n][0])), "points": _points(cells, cells.groups[n][1]), "refused": r}
        for n, r in unable
    ]
    if not able:
        return Refused("no budget has three sizes: IsoFLOP parabolas need several sizes at one C"), entries
    deviation = None if isinstance(parametric, Refused) else parametric.noise.deviation
    found = attempt(lambda: minima(able, cells.y[None], deviation))
    if isinstance(found, Refused):
        return found, [
            *entries,
            *({"C": float(np.exp(p.ln_C)), "points": _points(cells, p.cells), "refused": str(found)} for p in able),
        ]
    good = np.flatnonzero(~np.isnan(found.ln_N[0]))
    laws: Union[Frontier, Refused]
    if len(good) < LEAST_BUDGETS:
        reasons = [reason for reason in found.reasons if reason]
        words = f"{len(good)} of {len(cells.groups)} budgets have an interior minimum: a law in C needs at least {LEAST_BUDGETS}"
        laws = Refused(f"{words}; {reasons[0]}" if reasons else words)
    else:
        laws = attempt(lambda: _isoflop_laws(cells, cost, parametric, able, found, good, samples, random, deviation))
    for i, parabola in enumerate(able):
        entry: dict[str, Any] = {"C": float(np.exp(parabola.ln_C)), "points": _points(cells, parabola.cells)}
        if found.reasons[i]:
            entry["refused"] = found.reasons[i]
        else:
            entry["parabola"] = parabola.in_ln_N(found.coefficients[i][0])
            entry |= _minimum(laws, int(np.searchsorted(good, i)), parabola, found, i, cost)
        entries.append(entry)
    return laws, sorted(entries, key=lambda e: e["C"])


def parabolas_of(cells: Cells) -> tuple[list[Parabola], list[tuple[int, str]]]:
    """(the budgets that have sizes enough, (number, reason) of the others)."""
    able, unable = [], []
    for number, (ln_C, at) in enumerate(cells.groups):
        try:
            able.append(Parabola.of(ln_C, at, cells.ln_N[at]))
        except Refused as reason:
            unable.append((number, str(reason)))
    return able, unable


def _minimum(
    laws: Union[Frontier, Refused], at: int, parabola: Parabola, found: Minima, i: int, cost: Cost
) -> dict[str, Any]:
    """N_opt, D_opt, loss_opt of a budget; bare values (ends None) where no law bears their errors."""
    if isinstance(laws, Frontier):
        estimates = laws.at_budget(at)
        return dict(zip(("N_opt", "D_opt", "loss_opt"), (e.number() for e in estimates)))
    ln_N, ln_L = float(found.ln_N[0, i]), float(found.ln_L[0, i])
    values = np.exp([ln_N, float(cost.ln_tokens(parabola.ln_C, ln_N)), ln_L]).tolist()
    return {name: {"value": v, "low": None, "high": None} for name, v in zip(("N_opt", "D_opt", "loss_opt"), values)}


def _isoflop_laws(
    cells: Cells,
    cost: Cost,
    parametric: Union[Parametric, Refused],
    able: list[Parabola],
    found: Minima,
    good: Any,
    samples: int,
    random: np.random.Generator,
    deviation: Optional[float],
) -> Frontier:
    ln_C = np.array([able[i].ln_C for i in good])
    optima = found.ln_N[0, good], found.ln_L[0, good]
    if isinstance(parametric, Refused):
        world = _parabola_world(cells, able, found, good, cost, samples, random)
    else:
        world = worlds.of_surface(parametric, cost, (cells.ln_N, cells.ln_D), random)
    again = minima(able, world.simulated, deviation)
    return Frontier.of(ln_C, optima, (again.ln_N[:, good], again.ln_L[:, good]), world)


def _parabola_world(
    cells: Cells, able: list[Parabola], found: Minima, good: Any, cost: Cost, samples: int, random: np.random.Generator
) -> worlds.World:
    """Where the parametric law was refused: the budgets' own parabolas are the truth."""
    mean, residuals, rows = cells.y.copy(), [], 0
    for parabola in able:
        coefficients, rest = parabola.fit(np.exp(cells.y[None, parabola.cells]))
        fitted = np.exp(cells.y[parabola.cells]) - rest[0]
        mean[parabola.cells] = np.log(fitted)
        residuals.append(rest[0] / fitted)
        rows += parabola.free
    residual = np.concatenate(residuals)
    if not rows:
        raise Refused("three sizes a budget and no repeats leave nothing to tell the noise by: add sizes")
    noise = Noise(residual * np.sqrt(len(residual) / rows), rows, float(np.sqrt(np.square(residual).sum() / rows)))
    ln_C = np.array([able[i].ln_C for i in good])
    return worlds.of_optima(ln_C, found.ln_N[0, good], found.ln_L[0, good], mean, noise, cost, random, samples)


def envelope_laws_of(
    cells: Cells,
    cost: Cost,
    parametric: Union[Parametric, Refused],
    isoflop: Union[Frontier, Refused],
    samples: int,
    random: np.random.Generator,
    optima: bool = False,
) -> Frontier:
    """optima: a budget's single cell is its optimum, by the word of whoever made the table."""
    if not cells.groups:
        raise Refused("no cell saw its tokens just once")
    ln_N, ln_L, reasons = best_cells(cells.groups, cells.ln_N, cells.y[None], optima)
    good = np.flatnonzero(~np.isnan(ln_N[0]))
    if len(good) < LEAST_BUDGETS:
        words = f"{len(good)} of {len(cells.groups)} budgets have a best cell inside their sizes"
        words += f": a law in C needs at least {LEAST_BUDGETS}"
        first = [reason for reason in reasons if reason]
        raise Refused(f"{words}; {first[0]}" if first else words)
    ln_C = np.array([cells.groups[i][0] for i in good])
    found = ln_N[0, good], ln_L[0, good]
    if not isinstance(parametric, Refused):
        world = worlds.of_surface(parametric, cost, (cells.ln_N, cells.ln_D), random)
    elif not isinstance(isoflop, Refused):
        world = isoflop.world
    elif all(len(at) == 1 for _, at in cells.groups):
        return _table_of_optima(ln_C, found, cost, samples, random)
    else:
        raise Refused(f"its errors cannot be simulated without the parametric law ({parametric}) or IsoFLOP minima")
    again = best_cells(cells.groups, cells.ln_N, world.simulated, optima)
    return Frontier.of(ln_C, found, (again[0][:, good], again[1][:, good]), world)


def _table_of_optima(
    ln_C: Any, optima: tuple[Any, Any], cost: Cost, samples: int, random: np.random.Generator
) -> Frontier:
    """One cell a budget, taken as its optimum: noise is the scatter of ln N and log loss around their laws."""
    design = np.vander(ln_C - ln_C.mean(), 2)
    ln_N, ln_L = optima
    fitted_N = np.polyval(np.polyfit(ln_C, ln_N, 1), ln_C)
    law = fit_loss_law(ln_C, ln_L[None], has_constant(ln_C, ln_L))
    fitted_L = np.array([law.ln_loss(c)[0] for c in ln_C])
    noise_N, noise_L = Noise.around(ln_N - fitted_N, design), Noise.around(ln_L - fitted_L, design)
    world = worlds.of_optima(ln_C, fitted_N, fitted_L, fitted_L, noise_L, cost, random, samples)
    simulated = fitted_N + noise_N.draw(random, samples, len(ln_C)), world.simulated
    return Frontier.of(ln_C, optima, simulated, world)


def _points(cells: Cells, at: Any) -> list[list[float]]:
    """[N, D, loss] of a budget's cells, by size."""
    points = np.exp(np.stack([cells.ln_N[at], cells.ln_D[at], cells.y[at]], -1))
    return points[np.argsort(points[:, 0], kind="stable")].tolist()
