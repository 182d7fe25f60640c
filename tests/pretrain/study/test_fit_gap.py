"""What follows of a compute gap from the budgets that were seen, by no law but that more compute gives a lower loss."""

from __future__ import annotations

import pytest

from pretrain.study.fitting.bootstrap import Estimate
from pretrain.study.fitting.gap import Side, bounds


def side(budgets: list[float], losses: list[float], half: float) -> Side:
    ranges = [(loss - half, loss + half) for loss in losses]
    return Side("x", lambda loss: Estimate(0.0, []), losses, ranges, budgets)


@pytest.mark.parametrize("half", [0.0, 0.1, 0.3, 2.0])
def test_the_bounds_hold_for_every_pair_of_falling_curves_through_the_intervals(half):
    """one: loss 4 - ln C / ln 10 (C = 1, 10, 100); other: the same with 30 times the compute."""
    one, other = side([1, 10, 100], [4, 3, 2], half), side([1, 10, 100], [5.477, 4.477, 3.477], half)
    found = bounds(one, other)
    known = [c2 / c1 for c1, a in zip((1, 10, 100), (4, 3, 2)) for c2, b in zip((1, 10, 100), (5.477, 4.477, 3.477))
             if b - half > a + half]  # fmt: skip
    assert found["at_least"] == (max(known) if known else None)
    assert found["at_least"] is None or found["at_least"] < 30
    below = [c2 / c1 for c1, a in zip((1, 10, 100), (4, 3, 2)) for c2, b in zip((1, 10, 100), (5.477, 4.477, 3.477))
             if b + half < a - half]  # fmt: skip
    assert found["at_most"] == (min(below) if below else None)
    assert found["at_most"] is None or found["at_most"] > 30


def test_what_is_a_bound_one_way_is_its_inverse_the_other_way():
    one, other = side([1, 10, 100], [4, 3, 2], 0.1), side([1, 10, 100], [5.477, 4.477, 3.477], 0.1)
    there, back = bounds(one, other), bounds(other, one)
    assert there["at_least"] == 10 and there["at_most"] == 100
    assert (back["at_least"], back["at_most"]) == (1 / 100, 1 / 10)
