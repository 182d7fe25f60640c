"""What repeated data are worth: effective against real epochs, by the fitted law and by each cell."""

from __future__ import annotations

from typing import Optional

import numpy as np

from pretrain.study.fitting.laws import effective_tokens
from pretrain.study.report.fit_file import Number, Objective
from pretrain.study.report.numbers import significant
from pretrain.study.report.plots import (
    APPROACH_STYLE,
    FAINT,
    Drawn,
    NoPicture,
    Picture,
    figure,
    file_name,
    log_axis,
    png,
    range_of,
)


def repeated_data(objective: Objective) -> Optional[Drawn]:
    """D' / U over epochs (Muennighoff et al., arXiv 2305.16264, equation 5); None where no data were repeated.

    A cell's point is the D' at which the law's loss for its N would be the measured one.
    """
    if "data_constrained" not in objective.parts:
        return None
    name, title = file_name("repeated", objective.name), f"What repeated data are worth, {objective.name}"
    found = [objective.number("data_constrained", key) for key in ("E", "A", "B", "alpha", "beta", "R_star")]
    if any(n is None for n in found):
        return NoPicture(
            name, title, objective.refused("data_constrained") or "the law has no value for all of its numbers"
        )
    E, A, B, alpha, beta, half = (n for n in found if n is not None)
    points = []
    for row in objective.rows:
        rest = row.loss - E.value - A.value * row.N ** (-alpha.value)
        if row.unique_tokens and rest > 0:
            points.append((row.D / row.unique_tokens, (B.value / rest) ** (1 / beta.value) / row.unique_tokens))
    epochs = [e for e, _ in points] or [1.0, 16.0]
    low, high = range_of([*epochs, 1.0])
    x = np.geomspace(low, high, 200)
    made, (axes,) = figure(width=8.4, height=4.4)
    axes.plot(x, x, color=FAINT, linewidth=1, linestyle="--", label="repeated tokens worth as much as fresh ones")
    style = APPROACH_STYLE["parametric"]
    axes.fill_between(x, _worth(x, half, "low"), _worth(x, half, "high"), color=style["color"], alpha=0.16, linewidth=0)
    axes.plot(
        x, _worth(x, half, "value"), color=style["color"], linewidth=1.8, label=f"the fitted law, R* = {half.value:.3g}"
    )
    if points:
        axes.scatter(
            [e for e, _ in points],
            [worth for _, worth in points],
            s=16,
            color="#0072B2",
            alpha=0.6,
            linewidths=0,
            label="cells",
        )
    bottom, top = range_of([*(worth for _, worth in points), low, *_worth(x, half, "value")])
    log_axis(axes, "x", low, high, lambda e: f"{e:g}")
    log_axis(axes, "y", bottom, min(top, 2 * high), lambda e: f"{e:g}")
    axes.set_xlabel("epochs D / U")
    axes.set_ylabel("effective epochs D' / U")
    axes.legend(fontsize=8, frameon=False)
    most = max(epochs)
    worth = float(effective_tokens(1.0, most, half.value))
    alt = (
        f"Effective over real epochs of the {objective.name} objective: {significant(most, 3)} epochs are worth "
        f"{significant(worth, 3)} epochs of fresh data by the fitted law."
    )
    caption = (
        "Band: the 95 % interval of R* alone. Points: the fresh tokens with which the law would reach the cell's loss, so they "
        "carry all of its noise, magnified where the loss is nearly flat in D."
    )
    return Picture(name, title, alt, caption, png(made))


def _worth(epochs: np.ndarray, half: Number, end: str) -> np.ndarray:
    """D' / U at the value or an end of R*; without an upper end repeats are worth as much as fresh tokens."""
    value = getattr(half, end)
    if value is None:
        return epochs if end == "high" else np.minimum(epochs, 1.0)
    return np.asarray(effective_tokens(1.0, epochs, max(value, 1e-9)))
