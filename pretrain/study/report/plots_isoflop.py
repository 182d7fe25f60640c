"""IsoFLOP curves: the losses of each budget over model size, their parabolas and where those are least."""

from __future__ import annotations

import math

import numpy as np

from pretrain.study.report.fit_file import Objective, number
from pretrain.study.report.numbers import count
from pretrain.study.report.plots import (
    FAINT,
    INK,
    Drawn,
    NoPicture,
    Picture,
    error_bars,
    figure,
    file_name,
    flops_label,
    log_axis,
    ordered,
    png,
    range_of,
    size_label,
)


def isoflop_curves(objective: Objective, count_of: str) -> Drawn:
    """Loss over N, one colour a budget: cells with two standard errors, the parabola, its minimum with the 95 % interval.

    count_of: what N counts, in words. A budget whose minimum was refused shows its cells and no curve.
    """
    name, title = file_name("isoflop", objective.name), f"IsoFLOP curves, {objective.name}"
    budgets = [budget for budget in objective.profiles() if budget["points"]]
    if not budgets:
        return NoPicture(name, title, objective.refused("isoflop") or "no budget has cells")
    made, (axes,) = figure(width=8.4)
    sizes = [p[0] for b in budgets for p in b["points"]]
    low, high = range_of(sizes)
    errors = {_key(row.N, row.D): row for row in objective.rows}
    minima = []
    for colour, budget in zip(ordered(len(budgets)), budgets):
        points = sorted(budget["points"])
        x, y = [p[0] for p in points], [p[2] for p in points]
        rows = [errors.get(_key(p[0], p[1])) for p in points]
        spread = [2 * (row.loss_se or 0.0) if row else 0.0 for row in rows]
        refused = str(budget.get("refused") or "")
        label = flops_label(budget["C"]) + (" (no minimum)" if refused else "")
        axes.errorbar(
            x,
            y,
            spread,
            color=colour,
            marker="o",
            markersize=5,
            linestyle=":" if refused else "none",
            linewidth=1,
            label=label,
            capsize=2,
            markerfacecolor="white" if refused else colour,
        )
        best, best_loss = number(budget.get("N_opt")), number(budget.get("loss_opt"))
        if refused or not best or not best_loss:
            continue
        grid = np.linspace(math.log(min(x)), math.log(max(x)), 100)
        c0, c1, c2 = (_value(c) for c in budget["parabola"])
        axes.plot(np.exp(grid), c0 + c1 * grid + c2 * grid**2, color=colour, linewidth=1.5)
        axes.errorbar(
            [best.value],
            [best_loss.value],
            xerr=_inside(error_bars([best]), best.value, low, high),
            color=INK,
            marker="D",
            markersize=6,
            markerfacecolor=colour,
            linestyle="none",
            capsize=3,
            zorder=5,
        )
        minima.append((best, best_loss))
    if minima:
        sure = any(best.low is not None or best.high is not None for best, _ in minima)
        meant = "minimum, 95 % interval" if sure else "minimum (no interval)"
        minima.sort(key=lambda m: m[1].value, reverse=True)
        axes.plot([b.value for b, _ in minima], [y.value for _, y in minima], color=FAINT, linewidth=1, linestyle=":")
        axes.plot([], [], color=INK, marker="D", linestyle="none", markerfacecolor="white", label=meant)
    log_axis(axes, "x", low, high, size_label)
    axes.set_xlabel(f"model size N ({count_of})")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(
        title="compute (FLOPs)",
        fontsize=8,
        title_fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
    )
    found = [f"{count(b.value)} parameters at a loss of {y.value:.4g}" for b, y in minima]
    alt = f"Validation loss over model size for {len(budgets)} compute budgets of the {objective.name} objective. " + (
        f"The parabolas are least at {', '.join(found)}." if found else "No budget has a minimum inside its sizes."
    )
    caption = (
        "Points: cells, with two standard errors of the validation loss where they are known. Lines: a parabola in ln N for each "
        "budget. Diamonds: its minimum with the 95 % interval of N. Hollow points, dotted: budgets without a usable minimum."
    )
    if reason := objective.refused("isoflop"):
        caption += f" Laws in C through the minima were refused: {reason}."
    return Picture(name, title, alt, caption, png(made))


def _key(N: float, D: float) -> tuple[str, str]:
    """A cell by its sizes, which may have been through a logarithm and back."""
    return f"{N:.6e}", f"{D:.6e}"


def _value(coefficient: object) -> float:
    found = number(coefficient)
    return found.value if found else math.nan


def _inside(bars: list[list[float]], value: float, low: float, high: float) -> list[list[float]]:
    """Error bars cut at the axis."""
    return [[min(bars[0][0], value - low)], [min(bars[1][0], high - value)]]
