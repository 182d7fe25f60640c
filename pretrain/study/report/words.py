"""The report's first paragraph: what was found, how sure it is and what was refused, each number with its interval."""

from __future__ import annotations

from html import escape

from pretrain.study.report.fit_file import APPROACHES, LEFT_OUT, Fit, Number, Objective, number
from pretrain.study.report.numbers import data, flops, html, percent, show
from pretrain.study.report.references import parameters

SHOWN = 3  # budgets without a minimum that the summary names


def summary(fit: Fit) -> list[str]:
    """Sentences, as HTML."""
    said = [_fitted(fit)]
    for objective in fit.objectives.values():
        said += _objective(objective)
    said += _gap(fit)
    return said


def _fitted(fit: Fit) -> str:
    given, left = fit.raw["input"], fit.raw["input"].get("excluded") or []
    each = ", ".join(f"{len(o.rows)} {escape(name)}" for name, o in fit.objectives.items())
    cells = f" ({each})" if len(fit.objectives) > 1 else ""
    out = f"; {len(left)} {'was' if len(left) == 1 else 'were'} left out, with reasons below" if left else ""
    budgets = sorted({C for o in fit.objectives.values() for C in o.budgets()})
    over = (
        f" at {len(budgets)} budgets from {flops(budgets[0])} to {flops(budgets[-1])} FLOPs" if len(budgets) > 1 else ""
    )
    return (
        f"{given.get('used', sum(len(o.rows) for o in fit.objectives.values()))} cells were fitted{cells}{over}{out}. "
        f"N counts {escape(parameters(fit.count))}; C is in the convention “{escape(fit.flops)}”."
    )


def _objective(objective: Objective) -> list[str]:
    name = f"<strong>{escape('all cells' if objective.name == 'all' else objective.name)}</strong>"
    exponents = {a: n for a in APPROACHES if (n := objective.number(a, "N_exponent"))}
    said = []
    if exponents:
        each = "; ".join(f"C to the power {show(n)} by the {APPROACHES[a]}" for a, n in exponents.items())
        said.append(f"{name}: the compute-optimal size grows as {each}. {_growth(exponents)}")
    else:
        said.append(f"{name}: this study does not say how the optimal size grows with compute.")
    for approach, words in APPROACHES.items():
        if reason := objective.refused(approach):
            said.append(f"{name}: the {words} gave no answer: {html(reason)}.")
    dropped = [b for b in objective.profiles() if b.get("refused")]
    if dropped:
        each = "; ".join(f"{flops(b['C'])} FLOPs ({html(str(b['refused']))})" for b in dropped[:SHOWN])
        more = f"; and {len(dropped) - SHOWN} more, listed below" if len(dropped) > SHOWN else ""
        said.append(f"{name}: without a usable minimum: {each}{more}.")
    if worth := objective.number("data_constrained", "R_star"):
        said.append(f"{name}: a repeated token is worth 1/e of a fresh one after {show(worth)} repetitions (R*).")
    said += _floor(objective, name) + _next(objective, name) + _holdout(objective, name)
    return said


def _growth(exponents: dict[str, Number]) -> str:
    """Whether one half, where size and tokens grow alike, is inside the intervals, and whether the approaches agree."""
    inside = [a for a, n in exponents.items() if n.holds(0.5)]
    if len(inside) == len(exponents):
        half = "One half, size and tokens growing alike, is inside " + (
            "every interval" if len(exponents) > 1 else "the interval"
        )
    elif inside:
        others = [a for a in exponents if a not in inside]
        named = (" and ".join(f"the {APPROACHES[a]}" for a in some) for some in (inside, others))
        half = "One half, size and tokens growing alike, is inside the interval of {}, outside that of {}".format(
            *named
        )
    else:
        half = "One half, size and tokens growing alike, is outside " + (
            "every interval" if len(exponents) > 1 else "the interval"
        )
    if len(exponents) < 2:
        return f"{half}."
    lows = [n.low for n in exponents.values() if n.low is not None]
    highs = [n.high for n in exponents.values() if n.high is not None]
    alike = not lows or not highs or max(lows) <= min(highs)
    return f"{half}; the intervals of the approaches {'overlap' if alike else 'do not overlap: at least one of them is off here'}."


def _floor(objective: Objective, name: str) -> list[str]:
    E = objective.number("parametric", "E")
    if not E:
        return []
    least = min(row.loss for row in objective.fresh)
    wide = E.low is None or E.high is None or E.high - E.low > E.value
    if wide and (E.low, E.high) != (None, None) or E.high is not None and E.high >= least:
        return [f"{name}: the loss that no compute removes, {show(E)}, is not pinned down by these cells."]
    return [f"{name}: the loss that no compute removes is put at {show(E)} nats per token by the parametric law."]


def _next(objective: Objective, name: str) -> list[str]:
    """The first step beyond the cells, by the approach that the recommendation prefers."""
    for approach, words in APPROACHES.items():
        beyond = [p for p in objective.predicted(approach) if p.extrapolation > 1.0001 and p.N_opt and p.D_opt]
        if beyond:
            p = beyond[0]
            loss = f", at a loss of {show(p.loss)}" if p.loss else ""
            return [
                f"{name}: at {flops(p.C)} FLOPs, {p.extrapolation:.3g} times the largest budget, the {words} put the "
                f"optimum at {show(p.N_opt, 'count')} parameters and {show(p.D_opt, 'count')} tokens{loss}."
            ]
    return []


def _holdout(objective: Objective, name: str) -> list[str]:
    if objective.refused("leave_one_budget_out"):
        return []
    found = objective.part("leave_one_budget_out").get("rms_relative_error") or {}
    each = [
        f"{LEFT_OUT.get(a, escape(a))} {data(n.value, percent(n.value))}" for a, v in found.items() if (n := number(v))
    ]
    return (
        [f"{name}: predicting each budget's losses from the others was off by (root mean square): {', '.join(each)}."]
        if each
        else []
    )


def _gap(fit: Fit) -> list[str]:
    content = fit.raw.get("gap")
    if not content:
        return []
    if content.get("refused"):
        return [f"The compute gap between the objectives was refused: {html(str(content['refused']))}."]
    factor = number(content.get("factor"))
    if not factor:
        return []
    source, target = escape(str(content["from"])), escape(str(content["to"]))
    least = (content.get("seen") or {}).get("at_least")
    seen = ""
    if least and float(least) >= 1:
        seen = f" By the best cells that were seen, and no law: more than {data(float(least), f'{float(least):.3g}')} times."
    if factor.low is None and factor.high is None:
        unknown = f"How many times the compute of {source} {target} needs for the same loss is not known"
        return [f"{unknown}: the fits give no interval.{seen}"]
    unsure = " The interval includes 1: these cells do not show which of the two needs more."
    no_gap = (seen or unsure) if factor.holds(1.0) else ""
    beyond = max((float(p.get("extrapolation") or 1.0) for p in content.get("at", [])), default=1.0)
    outside = f" Part of it is extrapolated, up to {beyond:.3g} times the fitted compute." if beyond > 1.0001 else ""
    return [f"{target} needs {show(factor)} times the compute of {source} for the same loss.{no_gap}{outside}"]
