"""What compute buys: the loss at the optimum and the optimal size and tokens against FLOPs; bands widen beyond the cells."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from pretrain.study.report.fit_file import APPROACHES, Fit, Number, Objective, Prediction, number
from pretrain.study.report.numbers import count
from pretrain.study.report.plots import (
    APPROACH_STYLE,
    FAINT,
    OBJECTIVE_STYLE,
    Drawn,
    NoPicture,
    Picture,
    band,
    error_bars,
    figure,
    file_name,
    flops_label,
    log_axis,
    loss_label,
    png,
    range_of,
    shade_sampled,
    size_label,
)
from pretrain.study.report.references import comparable, parameters


def frontier(fit: Fit) -> Drawn:
    """Loss at the optimum against compute: every objective with its band, its cells, and the least loss of each budget."""
    name, title = "frontier", "Loss at the optimum against compute"
    drawn = [
        (o, approach, style)
        for o, style in zip(fit.objectives.values(), itertools.cycle(OBJECTIVE_STYLE))
        if (approach := _drawn_by(o, "loss"))
    ]
    if not drawn:
        reasons = "; ".join(
            f"{o.name}: {o.refused('frontier') or o.refused('parametric')}" for o in fit.objectives.values()
        )
        return NoPicture(name, title, f"no approach predicts a loss ({reasons})")
    cells = [(r.C, r.loss) for o, _, _ in drawn for r in o.fresh]
    curves = {o.name: _with("loss", o.predicted(approach)) for o, approach, _ in drawn}
    others = {o.name: _with("loss", o.predicted("parametric")) for o, approach, _ in drawn if approach != "parametric"}
    shown = [*curves.values(), *others.values()]
    low, high = range_of([p.C for curve in shown for p in curve] + [C for C, _ in cells], 0.03)
    losses = [loss for _, loss in cells] + [n for curve in shown for p in curve for n in _ends(p.loss, 2.0)]
    bottom, top = range_of(losses)
    made, (axes,) = figure(width=8.4)
    sampled = [C for C, _ in cells]
    shade_sampled(axes, min(sampled), max(sampled))
    for objective, approach, style in drawn:
        curve = curves[objective.name]
        color = style["color"]
        axes.scatter(
            [r.C for r in objective.fresh],
            [r.loss for r in objective.fresh],
            s=12,
            color=color,
            alpha=0.35,
            linewidths=0,
        )
        x, numbers = [p.C for p in curve], [p.loss for p in curve if p.loss]
        axes.plot(
            x,
            [n.value for n in numbers],
            color=color,
            linestyle=style["linestyle"],
            linewidth=1.8,
            label=f"{objective.name}, {APPROACHES.get(approach, approach)}",
        )
        band(axes, x, numbers, color, bottom, top)
        if other := others.get(objective.name):
            values = [p.loss.value for p in other if p.loss]
            label = f"{objective.name}, {APPROACHES['parametric']}"
            axes.plot([p.C for p in other], values, color=color, linestyle=(0, (1, 1)), linewidth=1, label=label)
        minima = [(b["C"], n) for b in objective.profiles() if (n := number(b.get("loss_opt")))]
        if minima:
            axes.errorbar(
                [C for C, _ in minima],
                [n.value for _, n in minima],
                error_bars([n for _, n in minima]),
                color=color,
                marker=style["marker"],
                markersize=6,
                linestyle="none",
                capsize=3,
                label=f"{objective.name}, minima of the parabolas",
            )
    log_axis(axes, "x", low, high, flops_label)
    log_axis(axes, "y", bottom, top, loss_label)
    axes.set_xlabel("training compute C (FLOPs)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(fontsize=8, frameon=False)
    last = [(o.name, curves[o.name][-1]) for o, _, _ in drawn]
    ends = [f"{name} {p.loss.value:.3g} at {p.C:.2g} FLOPs" for name, p in last if p.loss]
    alt = (
        "Loss at the compute-optimal size against compute; predicted at the right end, in nats per token: "
        f"{', '.join(ends)}."
    )
    caption = (
        "Bands: 95 % intervals; right of the grey range they are extrapolations. Where two laws of one objective part, the choice "
        "of the form matters more than the noise. Small dots: all cells. Markers: least loss of each budget by its parabola."
    )
    return Picture(name, title, alt, caption, png(made))


def optima(objective: Objective, fit: Fit) -> Drawn:
    """N_opt and D_opt against compute by every approach that gave one, beside the published laws that count alike."""
    name, title = file_name("optima", objective.name), f"Optimal size and tokens against compute, {objective.name}"
    curves = {a: [p for p in objective.predicted(a) if p.N_opt and p.D_opt] for a in APPROACHES}
    curves = {a: found for a, found in curves.items() if found}
    if not curves:
        reasons = "; ".join(f"{APPROACHES[a]}: {objective.refused(a)}" for a in APPROACHES if objective.refused(a))
        return NoPicture(name, title, f"no approach has an optimum ({reasons or 'there are no predictions'})")
    low, high = range_of([p.C for found in curves.values() for p in found], 0.03)
    references, left = comparable(fit.count, low, high)
    made, panels = figure(2, width=9.6, height=4.8)
    for axes, key, label in (
        (panels[0], "N_opt", f"optimal model size N ({parameters(fit.count)})"),
        (panels[1], "D_opt", "optimal training tokens D"),
    ):
        shade_sampled(axes, *_sampled(objective))
        numbers = {a: [getattr(p, key) for p in found] for a, found in curves.items()}
        bottom, top = range_of([end for found in numbers.values() for n in found for end in _ends(n, 10.0)])
        for approach, found in curves.items():
            style = APPROACH_STYLE[approach]
            x = [p.C for p in found]
            axes.plot(
                x,
                [n.value for n in numbers[approach]],
                color=style["color"],
                linestyle=style["linestyle"],
                linewidth=1.8,
                label=APPROACHES[approach],
            )
            band(axes, x, numbers[approach], style["color"], bottom, top)
        _minima(axes, objective, key)
        for reference, shape in zip(references, (":", (0, (1, 3)))):
            _published(axes, reference.N if key == "N_opt" else reference.D, low, high, reference.name, shape)
        log_axis(axes, "x", low, high, flops_label, most=6)
        log_axis(axes, "y", bottom, top, size_label)
        axes.set_xlabel("training compute C (FLOPs)")
        axes.set_ylabel(label)
    handles, labels = panels[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncol=3, fontsize=8, frameon=False)
    last = [
        f"{APPROACHES[a]} {count(found[-1].N_opt.value)} parameters" for a, found in curves.items() if found[-1].N_opt
    ]
    alt = (
        f"Compute-optimal size and tokens against compute for the {objective.name} objective; at the right end: "
        f"{', '.join(last)}."
    )
    sources = "; ".join(f"{r.name}, {r.source}" for r in references)
    notes = (
        [f"Published lines: {sources}. Their C is 6 N D; this study's convention is {fit.flops}."] if sources else []
    )
    outside = [r for r in references if low < r.low or high > r.high]
    notes += [
        f"Outside {r.low:.0e} to {r.high:.0e} FLOPs the line of {r.name} is its formula, not its data." for r in outside
    ]
    caption = " ".join(
        ["Bands: 95 % intervals, extrapolated right of the grey range.", *notes, *(f"{line}." for line in left)]
    )
    return Picture(name, title, alt, caption, png(made))


def gap(fit: Fit) -> Optional[Drawn]:
    """How many times the compute one objective needs to reach the other's loss; None where there is one objective."""
    content = fit.raw.get("gap")
    if not content:
        return None
    name, title = "gap", "Compute gap between the objectives"
    if content.get("refused"):
        return NoPicture(name, title, str(content["refused"]))
    points = [
        (float(p["loss"]), n, float(p.get("extrapolation") or 1.0))
        for p in content.get("at", [])
        if (n := number(p.get("factor")))
    ]
    if not points:
        return NoPicture(name, title, "no loss is reached by both objectives")
    if len(points) == 1 and points[0][1].low is None and points[0][1].high is None:
        return NoPicture(name, title, "no loss was seen of both objectives, and what the fits say has no interval")
    points.sort(key=lambda p: p[0])
    made, (axes,) = figure(width=8.4, height=4.0)
    ends = [end for _, n, _ in points for end in _ends(n, 10.0)]
    bottom, top = range_of([*ends, 1.0])
    x = [loss for loss, _, _ in points]
    axes.plot(x, [n.value for _, n, _ in points], color="#0072B2", linewidth=1.5)
    band(axes, x, [n for _, n, _ in points], "#0072B2", bottom, top)
    for inside in (True, False):
        some = [(loss, n.value) for loss, n, beyond in points if (beyond <= 1.0001) == inside]
        if some:
            label = "inside the losses of both" if inside else "one side extrapolated"
            axes.plot(
                *zip(*some),
                color="#0072B2",
                marker="o",
                linestyle="none",
                markerfacecolor="#0072B2" if inside else "white",
                label=label,
            )
    axes.axhline(1.0, color=FAINT, linewidth=1, linestyle="--", label="equal compute")
    log_axis(axes, "y", bottom, top, lambda v: f"{v:g}×")
    axes.set_xlabel("validation loss (nats per token), lower is better to the right")
    axes.invert_xaxis()
    axes.set_ylabel(f"compute of {content['to']}\nover compute of {content['from']}")
    axes.legend(fontsize=8, frameon=False)
    found = ", ".join(f"{n.value:.3g} times at {loss:.3g}" for loss, n, _ in reversed(points))
    alt = f"Compute that {content['to']} needs over what {content['from']} needs for the same loss: {found} nats per token."
    caption = "Band: 95 % interval. A masked model's loss is a bound on its likelihood: part of a gap may be the bound's slack."
    return Picture(name, title, alt, caption, png(made))


def _drawn_by(objective: Objective, key: str) -> str:
    """The first approach that predicts `key` at two budgets or more; "" if none does."""
    return next((a for a in APPROACHES if len(_with(key, objective.predicted(a))) > 1), "")


def _with(key: str, predictions: Sequence[Prediction]) -> list[Prediction]:
    return [p for p in predictions if getattr(p, key)]


def _ends(found: Optional[Number], most: float) -> list[float]:
    """The value and its interval, cut at a factor of `most` so that one wild band does not flatten all others."""
    if found is None:
        return []
    low = found.low if found.low and found.low > 0 else found.value / most
    high = found.high if found.high else found.value * most
    return [max(low, found.value / most), found.value, min(high, found.value * most)]


def _sampled(objective: Objective) -> tuple[float, float]:
    return min(r.C for r in objective.fresh), max(r.C for r in objective.fresh)


def _minima(axes: Any, objective: Objective, key: str) -> None:
    """The parabolas' minima that the IsoFLOP law was fitted to."""
    found = [(b["C"], n) for b in objective.profiles() if not b.get("refused") and (n := number(b.get(key)))]
    if found:
        style = APPROACH_STYLE["isoflop"]
        axes.errorbar(
            [C for C, _ in found],
            [n.value for _, n in found],
            error_bars([n for _, n in found]),
            color=style["color"],
            marker="o",
            markersize=5,
            linestyle="none",
            capsize=3,
            label="minima of the parabolas",
        )


def _published(axes: Any, law: Any, low: float, high: float, name: str, shape: Any) -> None:
    C = np.geomspace(low, high, 50)
    axes.plot(C, law(C), color=FAINT, linestyle=shape, linewidth=1.6, label=name)
