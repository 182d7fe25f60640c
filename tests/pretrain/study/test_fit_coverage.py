"""Nominal 95 % intervals hold the planted truth: few trials every day, a hundred in `make parity`, all designs in bench/laws.py."""

from __future__ import annotations

import pytest
from scipy.stats import binom

from bench.laws import Design, coverage, trial


def least(trials: int, share: float) -> int:
    """Hits below which a true coverage of `share` is not to be believed (one in ten thousand)."""
    return int(binom.ppf(1e-4, trials, share))


def check(case, trials: int, samples: int, share: float) -> dict[str, tuple[int, int, float]]:
    found = coverage(case, [trial(case, 1000 + seed, samples) for seed in range(trials)])
    for key, (hits, given, _) in found.items():
        assert hits >= least(given, share), f"{key}: {hits} of {given}"
    return found


def test_intervals_of_a_small_study_hold_the_truth():
    found = check(("quokka", Design(3, 4, high=1e20), 0.004), 12, 150, 0.95)
    assert found["E"][1] == 12 and found["1:N exp"][1] > 5 and found["2:N exp"][1] > 5
    assert found["N 100x"][2] > 1.5 * found["N 1x"][2]


@pytest.mark.parity
@pytest.mark.parametrize(
    "case",
    [("quokka", Design(5, 6), 0.004), ("chinchilla_again", Design(3, 4, high=1e20), 0.004)],
    ids=["5 x 6", "3 x 4"],
)
def test_at_least_ninety_of_a_hundred_intervals_hold_the_truth(case):
    found = coverage(case, [trial(case, 5000 + seed, 400) for seed in range(100)])
    for key, (hits, given, _) in found.items():
        assert hits >= 0.9 * given, f"{key}: {hits} of {given}"
