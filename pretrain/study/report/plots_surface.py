"""The loss surface of the parametric law over sizes and tokens, and how far each cell lies from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from pretrain.study.fitting.laws import Surface
from pretrain.study.report.fit_file import Objective, Row
from pretrain.study.report.plots import (
    INK,
    Drawn,
    NoPicture,
    Picture,
    figure,
    file_name,
    flops_label,
    log_axis,
    loss_label,
    png,
    range_of,
    size_label,
)


def law_of(objective: Objective) -> Optional[Surface]:
    """L = E + A / N^alpha + B / D^beta with the fitted values; None where the law was refused."""
    found = [objective.number("parametric", key) for key in ("E", "A", "B", "alpha", "beta")]
    values = [n.value for n in found if n is not None]
    return Surface.of(*values) if len(values) == len(found) and min(values[1:]) > 0 else None


def predicted_loss(law: Surface, N: Any, D: Any) -> Any:
    """Nats per token for N parameters and D tokens."""
    return np.exp(law.ln_loss(np.log(N), np.log(D)))


def loss_surface(objective: Objective, count_of: str) -> Drawn:
    """Contours of the law's loss over N and D, the cells, lines of equal compute, and the law's optimum for each compute."""
    name, title = file_name("surface", objective.name), f"Loss surface, {objective.name}"
    law = law_of(objective)
    if law is None:
        return NoPicture(
            name, title, objective.refused("parametric") or "the law has no value for one of E, A, B, alpha, beta"
        )
    rows = objective.fresh
    optima = [p for p in objective.predicted("parametric") if p.N_opt and p.D_opt and p.extrapolation <= 10.5]
    sizes = range_of([r.N for r in rows] + [p.N_opt.value for p in optima if p.N_opt])
    tokens = range_of([r.D for r in rows] + [p.D_opt.value for p in optima if p.D_opt])
    made, (axes,) = figure(width=8.4, height=5.6)
    log_axis(
        axes, "x", *sizes, size_label
    )  # before the contours' labels, which are placed on the page and not on the axes
    log_axis(axes, "y", *tokens, size_label)
    N, D = np.meshgrid(np.geomspace(*sizes, 160), np.geomspace(*tokens, 160))
    surface = predicted_loss(law, N, D)
    low, high = float(surface.min()), float(surface.max())
    norm = LogNorm(low, high)
    axes.contourf(N, D, surface, levels=np.geomspace(low, high, 60), norm=norm, cmap="viridis_r")
    levels = [level for level in MaxNLocator(10).tick_values(low, high) if low < level < high]
    lines = axes.contour(N, D, surface, levels=levels, colors="white", linewidths=0.8)
    axes.clabel(lines, fmt=loss_label, fontsize=8, inline=True, manual=_label_places(law, levels, sizes, tokens))
    x, cost = _cost(rows)
    along = np.geomspace(*sizes, 60)
    for C in objective.budgets():
        line = C / (along * np.exp(np.interp(np.log(along), x, cost)))
        axes.plot(along, line, color=INK, linewidth=0.8, linestyle=":")
        _name_line(axes, C, along, line, tokens)
    axes.scatter(
        [r.N for r in rows],
        [r.D for r in rows],
        c=[r.loss for r in rows],
        norm=norm,
        cmap="viridis_r",
        edgecolors="white",
        s=44,
        linewidths=1.2,
        zorder=4,
        label="cells, coloured by measured loss",
    )
    if optima:
        path = sorted((p.C, p.N_opt.value, p.D_opt.value) for p in optima if p.N_opt and p.D_opt)
        axes.plot(
            [n for _, n, _ in path],
            [d for _, _, d in path],
            color="#D55E00",
            linewidth=2,
            zorder=5,
            label="the law's optimum for each compute",
        )
    axes.plot([], [], color=INK, linewidth=0.8, linestyle=":", label="equal compute (FLOPs)")
    axes.grid(False)
    axes.set_xlabel(f"model size N ({count_of})")
    axes.set_ylabel("training tokens D")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3, frameon=False)
    beyond = max((p.extrapolation for p in optima), default=1.0)
    alt = (
        f"Contours of the fitted loss over model size and tokens with the {len(rows)} cells of the {objective.name} objective; "
        f"losses run from {low:.3g} to {high:.3g} nats per token and fall with both."
    )
    caption = (
        "White lines: equal loss (nats per token) by the parametric law. Dotted: equal compute. Orange: the law's optimum"
        + (
            f", drawn up to {beyond:.3g} times the largest budget: what lies away from the cells is extrapolation."
            if beyond > 1
            else "."
        )
    )
    return Picture(name, title, alt, caption, png(made))


def _cost(rows: Sequence[Row]) -> tuple[Any, Any]:
    """(ln N of the sizes, ln of the FLOPs for a parameter and token there): ln 6 under C = 6 N D; small models pay for more."""
    x, place = np.unique(np.log([r.N for r in rows]), return_inverse=True)
    each = np.log([r.C / (r.N * r.D) for r in rows])
    return x, np.bincount(place, each) / np.bincount(place)


def _label_places(
    law: Any, levels: Sequence[float], sizes: tuple[float, float], tokens: tuple[float, float]
) -> list[Any]:
    """Where the contours cross a path right of the optimum, along which the loss only falls: one (N, D) a level that it meets."""
    corners = np.array([(0.02, 0.05), (0.4, 0.05), (0.96, 0.6), (0.96, 0.97)])  # shares of the axes' lengths
    along = np.linspace(0, len(corners) - 1, 400)
    x, y = (np.interp(along, range(len(corners)), corners[:, k]) for k in (0, 1))
    N, D = sizes[0] * (sizes[1] / sizes[0]) ** x, tokens[0] * (tokens[1] / tokens[0]) ** y
    losses = predicted_loss(law, N, D)
    at = [int(np.argmin(np.abs(losses - level))) for level in levels if losses.min() < level < losses.max()]
    return [(N[i], D[i]) for i in at]


def _name_line(axes: Any, C: float, N: Any, D: Any, tokens: tuple[float, float]) -> None:
    """The compute at the upper end of its line, inside the axes."""
    inside = [i for i in range(len(N)) if tokens[0] * 1.02 < D[i] < tokens[1] / 1.12]
    if inside:
        at = inside[min(2, len(inside) - 1)]
        axes.annotate(
            flops_label(C),
            (N[at], D[at]),
            textcoords="offset points",
            xytext=(4, 3),
            fontsize=8,
            color=INK,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )


def residuals(objective: Objective, count_of: str) -> Drawn:
    """How far the measured loss of every cell lies from the law's, over N and over D, with two standard errors."""
    name, title = file_name("residuals", objective.name), f"Residuals of the parametric law, {objective.name}"
    law = law_of(objective)
    if law is None:
        return NoPicture(
            name, title, objective.refused("parametric") or "the law has no value for one of E, A, B, alpha, beta"
        )
    rows = objective.fresh
    off = [100 * (r.loss / float(predicted_loss(law, [r.N], [r.D])[0]) - 1) for r in rows]
    bars = [200 * (r.loss_se or 0.0) / r.loss for r in rows]
    made, (left, right) = figure(2, width=8.4, height=3.6, share_y=True)
    for axes, x, label in (
        (left, [r.N for r in rows], f"model size N ({count_of})"),
        (right, [r.D for r in rows], "training tokens D"),
    ):
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.errorbar(
            x, off, bars, color="#0072B2", marker="o", markersize=4.5, linestyle="none", capsize=2, elinewidth=0.8
        )
        log_axis(axes, "x", *range_of(x), size_label, most=5)
        axes.set_xlabel(label)
    reach = 1.15 * max(0.02, *(abs(o) + b for o, b in zip(off, bars)))
    left.set_ylim(-reach, reach)
    left.set_ylabel("measured above predicted (%)")
    rms = math.sqrt(sum(o * o for o in off) / len(off))
    worst = max(range(len(off)), key=lambda i: abs(off[i]))
    alt = (
        f"How far the measured losses of {len(rows)} cells lie from the parametric law: {rms:.2g} % in the root mean square, "
        f"at most {abs(off[worst]):.2g} %."
    )
    named = f" ({rows[worst].cell})" if rows[worst].cell else ""
    caption = (
        f"Root mean square {rms:.2g} %, largest {off[worst]:+.2g} %{named}. Bars: two standard errors of the validation loss. "
        "A trend or a bow means that the law's form does not hold in this range, whatever its intervals say."
    )
    return Picture(name, title, alt, caption, png(made))
