"""The formulas of the laws against brute force, and the published figures they must reproduce."""

from __future__ import annotations

import numpy as np
import pytest

from data.errors import InputError
from pretrain.study.fitting.laws import (
    PUBLISHED,
    Cost,
    effective_parameters,
    effective_tokens,
    fit_cost,
    published,
    quokka_repeated_loss,
)
from tests.pretrain.study.planted import loss_of


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize("cost", [Cost(), Cost(np.log(30.0), 0.93)], ids=["6ND", "small models pay more"])
def test_the_optimum_is_where_no_other_size_of_that_budget_is_better(name, cost):
    law = published(name)
    for C in (1e18, 3e20, 1e23):
        ln_N, ln_D, loss = law.optimum(np.log(C), cost)
        sizes = np.exp(ln_N) * np.exp(np.linspace(-1, 1, 20001))
        tokens = C / (np.exp(cost.ln_factor) * sizes**cost.power)
        losses = law.E + np.exp(law.ln_A) / sizes**law.alpha + np.exp(law.ln_B) / tokens**law.beta
        best = losses.argmin()
        assert np.log(sizes[best]) == pytest.approx(ln_N, abs=2e-4)
        assert np.log(tokens[best]) == pytest.approx(ln_D, abs=2e-4)
        assert loss == pytest.approx(losses[best], rel=1e-9)


def test_the_loss_at_the_optimum_is_a_power_law_above_e_and_its_inverse_gives_the_budget():
    law, cost = published("chinchilla_again"), Cost(np.log(9.0), 0.97)
    E, ln_k, g = law.frontier(cost)
    for C in (1e17, 1e20, 1e24):
        loss = law.optimum(np.log(C), cost)[2]
        assert loss == pytest.approx(E + np.exp(ln_k) * C**-g, rel=1e-12)
        assert float(law.ln_compute(loss, cost)) == pytest.approx(np.log(C), rel=1e-9)
    assert float(law.ln_compute(law.E * 0.999, cost)) == np.inf


def test_log_losses_are_those_of_the_formula():
    law = published("quokka")
    N, D = np.array([1e7, 1e9, 1e11]), np.array([1e9, 2e10, 1e13])
    expected = [loss_of(law, n, d) for n, d in zip(N, D)]
    assert np.exp(law.ln_loss(np.log(N), np.log(D))) == pytest.approx(expected, rel=1e-12)


def test_the_cost_of_rows_is_found_and_says_how_far_it_is_off():
    ln_N = np.log(np.geomspace(1e6, 1e9, 9))
    ln_D = np.log(np.geomspace(1e10, 1e8, 9))
    cost, error = fit_cost(ln_N, ln_D, np.log(6) + ln_N + ln_D)
    assert (cost.power, error) == (1.0, pytest.approx(0, abs=1e-9)) and cost.ln_factor == pytest.approx(np.log(6))
    cost, error = fit_cost(ln_N, ln_D, np.log(40) + 0.9 * ln_N + ln_D)
    assert (np.exp(cost.ln_factor), cost.power) == (pytest.approx(40), pytest.approx(0.9))
    bent = np.log(6 * np.exp(ln_N) + 2e7) + ln_D
    assert 0.05 < fit_cost(ln_N, ln_D, bent)[1] < 2


def test_quokka_s_published_lines_are_consistent_with_6nd_and_with_its_row_of_10_b():
    """N = 0.0216 C^0.514, D = 7.7 C^0.486, and 10 B, 825 B at C = 4.96e22: all rounded to two or three digits."""
    assert 6 * 0.0216 * 7.7 == pytest.approx(1.0, rel=0.01) and 0.514 + 0.486 == pytest.approx(1.0)
    assert 0.0216 * 4.96e22**0.514 == pytest.approx(10e9, rel=0.01)
    assert 7.7 * 4.96e22**0.486 == pytest.approx(825e9, rel=0.01)
    assert 6 * 10e9 * 825e9 == pytest.approx(4.96e22, rel=0.01)


def test_quokka_s_parametric_law_is_another_approach_than_its_isoflop_line():
    """Its exponent is 0.015 off the IsoFLOP line, its optima up to 15 % at 50 times its largest budget: not more."""
    law = published("quokka")
    exponent, _ = law.allocation(Cost())
    assert exponent == pytest.approx(0.514, abs=0.016)
    for C, tolerance in ((3e18, 0.02), (1e20, 0.06), (1e21, 0.09), (4.96e22, 0.16)):
        ln_N, ln_D, _ = law.optimum(np.log(C), Cost())
        assert np.exp(ln_N) == pytest.approx(0.0216 * C**0.514, rel=tolerance)
        assert np.exp(ln_D) == pytest.approx(7.7 * C**0.486, rel=tolerance)


def test_repeated_tokens_are_worth_what_the_geometric_sum_of_the_paper_says():
    """Each repetition is worth (1 - delta) of the one before; R* = (1 - delta) / delta, to first order in delta."""
    delta = 0.002
    for epochs in (1, 2, 10, 400):
        by_hand = sum((1 - delta) ** k for k in range(1, epochs))
        assert effective_tokens(1e9, epochs, (1 - delta) / delta) == pytest.approx(1e9 * (1 + by_hand), rel=2e-3)
    assert effective_tokens(1e9, 1e9, 15.0) == pytest.approx(16e9)
    assert effective_tokens(1e9, 0.5, 15.0) == pytest.approx(0.5e9)
    assert effective_parameters(5e8, 1e9, 5.0) == pytest.approx(5e8)
    assert effective_parameters(2e9, 1e9, 5.0) == pytest.approx(1e9 * (1 + 5 * (1 - np.exp(-0.2))))


def test_quokka_s_law_of_repeats_as_printed_with_its_oddity():
    N, U = 1e9, 1e10
    once = 1535.23 / N**0.42 + 54.21 / U**0.13
    assert quokka_repeated_loss(N, U, 1.0) == pytest.approx(once, rel=1e-12)
    scale = 254.35 * U**0.39 / N**0.55
    effective = U * 4**1.49 * np.exp(-((3 / scale) ** 0.40))
    assert quokka_repeated_loss(N, U, 4.0) == pytest.approx(1535.23 / N**0.42 + 54.21 / effective**0.13, rel=1e-12)
    assert effective > 4 * U  # four epochs above four times the data: a fixture of the formula, not a truth
    many = quokka_repeated_loss(N, U, np.geomspace(1, 1e7, 200))
    assert 0 < many.argmin() < 199  # repeats hurt in the end


def test_an_unknown_published_law_is_named_with_those_there_are():
    with pytest.raises(InputError, match="quokka"):
        published("kaplan")
