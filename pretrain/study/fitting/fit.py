"""All fits of a table of cells, as the dictionary that fit.json holds. A part the evidence does not bear is {"refused": reason}."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import numpy as np

from pretrain.study.fitting.approaches import attempt, envelope_laws_of, isoflop_laws_of, parabolas_of
from pretrain.study.fitting.bootstrap import LEVEL
from pretrain.study.fitting.data_constrained import fit_repeated, repeated
from pretrain.study.fitting.frontier import LEAST_BUDGETS, Frontier, fit_loss_law, has_constant
from pretrain.study.fitting.gap import Side, compute_gap
from pretrain.study.fitting.holdout import leave_one_budget_out
from pretrain.study.fitting.isoflop import minima
from pretrain.study.fitting.laws import Cost, Refused, fit_cost
from pretrain.study.fitting.parametric import Parametric, fit_parametric
from pretrain.study.fitting.table import Cells, Table, cells_of

METHOD = (
    "errors of refits: residuals corrected for leverage, random signs, Student's spread, warm-started from the full fit; "
    "approaches 1 and 2 in studies simulated from those refits; the wider tail to both sides"
)
BEYOND = (3.0, 10.0, 30.0, 100.0)
SHARED = ("parametric", "isoflop", "envelope", "frontier", "predictions", "leave_one_budget_out")


@dataclass
class Objective:
    """One objective's fits; a Refused stands where there is none."""

    cells: Cells  # that saw their tokens once
    cost: Cost
    parametric: Union[Parametric, Refused]
    isoflop: Union[Frontier, Refused]
    envelope: Union[Frontier, Refused]
    part: dict[str, Any] = field(default_factory=dict)

    def approaches(self) -> list[tuple[str, Union[Parametric, Frontier]]]:
        """Those that gave laws in C, with their names."""
        named = (("parametric", self.parametric), ("isoflop", self.isoflop), ("envelope", self.envelope))
        return [(name, found) for name, found in named if not isinstance(found, Refused)]

    def optimum(self, found: Union[Parametric, Frontier], ln_C: float) -> Any:
        return found.optimum(ln_C, self.cost) if isinstance(found, Parametric) else found.optimum(ln_C)


def fit_table(
    table: Table, samples: int = 1000, seed: int = 0, predict: tuple[float, ...] = (), holdout: bool = True
) -> dict[str, Any]:
    """fit.json as a dictionary. The same table, samples and seed give the same numbers.

    predict: further budgets in FLOPs. holdout: whether to leave one budget out at a time, which refits everything for each.
    """
    notes = list(table.notes)
    fitted: dict[str, Objective] = {}
    for name in table.objectives():
        frame = table.frame[table.frame["objective"] == name]
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        fitted[name] = _objective(name, frame, samples, random, predict, notes, holdout, table.optima)
    first = next(iter(fitted.values())).part
    names = {row["objective"] for row in table.excluded} - set(fitted)
    notes += [f"{name}: no cell is done" for name in sorted(names - {"all"})]
    return {
        "input": {
            "path": str(table.path),
            "digest": table.digest,
            "rows": table.rows,
            "used": len(table.frame),
            "count": table.count,
            "flops": table.flops,
            "excluded": table.excluded,
            "notes": notes,
        },
        "bootstrap": {"samples": samples, "seed": seed, "level": LEVEL, "method": METHOD},
        "objectives": {name: found.part for name, found in fitted.items()},
        "gap": _gap(fitted),
        **{name: first[name] for name in SHARED},
    }


def _objective(
    name: str,
    frame: Any,
    samples: int,
    random: np.random.Generator,
    predict: tuple[float, ...],
    notes: list[str],
    holdout: bool,
    optima: bool,
) -> Objective:
    everything = cells_of(name, frame)
    epochs = everything.frame["epochs"].to_numpy(float)
    fresh = cells_of(name, everything.frame[~repeated(epochs)])
    of = "" if name == "all" else f"{name}: "
    if len(fresh.y) < len(everything.y):
        notes.append(f"{of}{len(everything.y) - len(fresh.y)} cells with repeated data are in data_constrained alone")
    cost = Cost()
    if len(fresh.y):
        cost, error = fit_cost(fresh.ln_N, fresh.ln_D, fresh.ln_C)
        if abs(cost.power - 1) > 0.01:
            notes.append(of + _cost_note(cost, error))
    off = [np.abs(fresh.ln_C[cells] - ln_C).max() for ln_C, cells in fresh.groups]
    if off and max(off) > 0.1:
        notes.append(f"{of}what cells really spent is up to {np.expm1(max(off)):.0%} off their budget")
    parametric = attempt(lambda: fit_parametric(fresh.ln_N, fresh.ln_D, fresh.y, samples, random))
    isoflop, budgets = isoflop_laws_of(fresh, cost, parametric, samples, random)
    envelope = attempt(lambda: envelope_laws_of(fresh, cost, parametric, isoflop, samples, random, optima))
    found = Objective(fresh, cost, parametric, isoflop, envelope)
    part = found.part
    part["rows"] = everything.rows()
    part["parametric"] = _refused(parametric) if isinstance(parametric, Refused) else parametric.report(cost)
    part["isoflop"] = {"budgets": budgets} | (_refused(isoflop) if isinstance(isoflop, Refused) else isoflop.laws())
    if isinstance(envelope, Refused):
        part["envelope"] = _refused(envelope)
    else:
        ln_D = cost.ln_tokens(envelope.ln_C, envelope.ln_N)
        points = np.exp(np.stack([envelope.ln_C, envelope.ln_N, ln_D, envelope.ln_L], -1)).tolist()
        part["envelope"] = {"points": points} | envelope.laws()
    part["frontier"] = _frontier(found)
    if len(everything.y) > len(fresh.y):
        unique = everything.frame["unique_tokens"].to_numpy(float)
        seen = np.where(np.isnan(epochs), 1.0, epochs)
        unique = np.where(np.isnan(unique), np.exp(everything.ln_D) / seen, unique)
        seen = np.exp(everything.ln_D) / unique
        result = attempt(lambda: fit_repeated(everything.ln_N, unique, seen, everything.y, samples, random))
        part["data_constrained"] = _refused(result) if isinstance(result, Refused) else result
    part["leave_one_budget_out"] = _holdout(found) if holdout else {"refused": "not asked for"}
    part["predictions"] = _predictions(found, predict)
    return found


def _cost_note(cost: Cost, error: float) -> str:
    """How the cost was taken, and from which size on that must be wrong: no training costs less than 6 N D."""
    words = (
        f"C / (N D) is taken as {np.exp(cost.ln_factor):.3g} N^{cost.power - 1:.3f}, within {error:.1%} at these sizes"
    )
    if cost.power >= 1:
        return f"{words}; beyond them it is an extrapolation too"
    limit = np.exp((cost.ln_factor - np.log(6.0)) / (1 - cost.power))
    return f"{words}; beyond N = {limit:.2g} it would be below 6 N D, so that predictions there give too many tokens"


def _refused(reason: Refused) -> dict[str, str]:
    return {"refused": str(reason)}


def _frontier(found: Objective) -> dict[str, Any]:
    for approach, laws in (("isoflop", found.isoflop), ("envelope", found.envelope)):
        if isinstance(laws, Frontier):
            return laws.loss_law() | {"through": approach}
    return {"refused": "neither parabolas nor best cells gave the optima of three budgets"}


def _holdout(found: Objective) -> dict[str, Any]:
    centres = [ln_C for ln_C, _ in found.cells.groups]
    optima: dict[int, float] = {}
    if isinstance(found.isoflop, Frontier):
        optima = {centres.index(float(c)): float(L) for c, L in zip(found.isoflop.ln_C, found.isoflop.ln_L)}
    deviation = None if isinstance(found.parametric, Refused) else found.parametric.noise.deviation

    def predict(rest: Cells, ln_C: float) -> float:
        again = minima(parabolas_of(rest)[0], rest.y[None], deviation)
        good = ~np.isnan(again.ln_N[0])
        if good.sum() < LEAST_BUDGETS:
            raise Refused("too few budgets are left")
        at = np.array([p.ln_C for p in parabolas_of(rest)[0]])[good]
        law = fit_loss_law(at, again.ln_L[:, good], has_constant(at, again.ln_L[0, good]))
        return float(law.ln_loss(ln_C)[0])

    parametric = not isinstance(found.parametric, Refused)
    result = attempt(lambda: leave_one_budget_out(found.cells, found.cost, parametric, optima, predict))
    return _refused(result) if isinstance(result, Refused) else result


def _predictions(found: Objective, more: tuple[float, ...]) -> list[dict[str, Any]]:
    if not found.cells.groups:
        return []
    budgets = [float(np.exp(ln_C)) for ln_C, cells in found.cells.groups]
    largest = max(budgets)
    wanted = [*budgets, *(largest * factor for factor in BEYOND), *more]
    predictions = []
    for C in sorted(set(wanted)):
        for approach, laws in found.approaches():
            estimates = found.optimum(laws, float(np.log(C)))
            numbers = dict(zip(("N_opt", "D_opt", "loss"), (e.number() for e in estimates)))
            predictions.append({"C": C, "extrapolation": C / largest, "approach": approach, **numbers})
    return predictions


def _gap(fitted: dict[str, Objective]) -> Optional[dict[str, Any]]:
    """From autoregressive to masked where there are both, else between the first two objectives; None for one objective."""
    if len(fitted) < 2:
        return None
    names = ["autoregressive", "masked"] if {"autoregressive", "masked"} <= set(fitted) else list(fitted)[:2]
    for approach in (
        "parametric",
        "isoflop",
        "envelope",
    ):  # the same for both: a gap between two ways of fitting is none
        sides = [_side(name, fitted[name], getattr(fitted[name], approach)) for name in names]
        one, other = sides
        if one is not None and other is not None:
            result = attempt(lambda one=one, other=other: compute_gap(one, other))  # type: ignore[misc]
            return _refused(result) if isinstance(result, Refused) else result | {"approach": approach}
    return {"refused": f"no approach gave laws of both {names[0]} and {names[1]}"}


def _side(name: str, found: Objective, laws: Union[Parametric, Frontier, Refused]) -> Optional[Side]:
    if isinstance(laws, Refused):
        return None
    budgets = [float(np.exp(ln_C)) for ln_C, _ in found.cells.groups]
    losses = [float(np.exp(found.optimum(laws, float(np.log(C)))[2].value)) for C in budgets]
    # What was measured: the best cell of each budget, give or take two deviations of a cell.
    half = None if isinstance(found.parametric, Refused) else 2 * found.parametric.noise.deviation
    best = [float(np.exp(found.cells.y[at].min())) for _, at in found.cells.groups]
    ranges = [(loss * (1 - half), loss * (1 + half)) if half is not None else (-np.inf, np.inf) for loss in best]
    return Side(name, lambda loss: laws.ln_compute(loss, found.cost), losses, ranges, budgets)
