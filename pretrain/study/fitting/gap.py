"""How much more compute one objective needs than another for the same loss (SMDM, arXiv 2410.18514: masked diffusion about 16x)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from pretrain.study.fitting.bootstrap import Estimate
from pretrain.study.fitting.laws import Refused

POINTS = 5


@dataclass(frozen=True)
class Side:
    """One objective of a gap. compute: loss -> ln C that reaches it; losses: optimal ones at its budgets (FLOPs), ranges: what
    its best cells there scatter within."""

    name: str
    compute: Callable[[float], Estimate]
    losses: list[float]
    ranges: list[tuple[float, float]]
    budgets: list[float]

    def beyond(self, ln_C: float) -> float:
        """How many times above the largest or below the least budget; 1 between them."""
        low, high = np.log(min(self.budgets)), np.log(max(self.budgets))
        return float(np.exp(max(ln_C - high, low - ln_C, 0.0)))


def compute_gap(one: Side, other: Side) -> dict[str, Any]:
    """C of `other` / C of `one` at equal loss, with intervals.

    Where both were seen at the same losses the factor is interpolated; elsewhere `extrapolation` says how many times beyond its
    budgets the further of the two is read. `seen`: what follows from the budgets alone (see bounds). Refused where there is no
    loss that both reach.
    """
    low, high = max(min(one.losses), min(other.losses)), min(max(one.losses), max(other.losses))
    common = low < high
    levels = np.linspace(high, low, POINTS) if common else [0.5 * (low + high)]
    at: list[dict[str, Any]] = []
    for level in levels:
        first, second = one.compute(float(level)), other.compute(float(level))
        if not (np.isfinite(first.value) and np.isfinite(second.value)):
            continue
        point = {"loss": float(level), "C_from": first.number(), "C_to": second.number()}
        point |= {"factor": second.minus(first).number()}
        at.append(point | {"extrapolation": max(one.beyond(first.value), other.beyond(second.value))})
    if not at:
        raise Refused(f"there is no loss that both {one.name} and {other.name} reach by their fits")
    middle = at[len(at) // 2]
    note = "interpolated: both were seen at these losses" if common else "extrapolated: no loss was seen of both"
    return {
        "from": one.name,
        "to": other.name,
        "at": at,
        "factor": middle["factor"],
        "at_loss": middle["loss"],
        "note": note,
        "seen": bounds(one, other),
    }


def bounds(one: Side, other: Side) -> dict[str, Optional[float]]:
    """{"at_least", "at_most"} of the factor by the best cells that were seen, by no law but that more compute gives a lower loss;
    None where nothing is known. They are bounds if the sizes of each budget reach its optimum.

    If the best of `other` at C' is still above that of `one` at C, by more than both scatter, it needs more than C' / C times as
    much for that loss; if it is below, less.
    """
    pairs = [
        (i, j, other.budgets[j] / one.budgets[i]) for i in range(len(one.budgets)) for j in range(len(other.budgets))
    ]
    more = [ratio for i, j, ratio in pairs if other.ranges[j][0] > one.ranges[i][1]]
    less = [ratio for i, j, ratio in pairs if other.ranges[j][1] < one.ranges[i][0]]
    return {"at_least": max(more, default=None), "at_most": min(less, default=None)}
