"""Approaches 1 and 2: their optima against numpy's polynomials and enumeration, their laws, and every refusal."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.stats import f as f_distribution

from bench.laws import Design
from pretrain.study.fitting.envelope import best_cells
from pretrain.study.fitting.frontier import allowed, fit_loss_law, has_constant, power_law
from pretrain.study.fitting.isoflop import Parabola, minima
from pretrain.study.fitting.laws import Cost, Refused, published
from tests.pretrain.study.planted import grid

QUOKKA = published("quokka")


def budget(rows, C):
    return [row for row in rows if row["C"] == pytest.approx(C)]


def parabola_of(N, first=0):
    return Parabola.of(np.log(1e19), np.arange(first, first + len(N)), np.log(N))


def test_a_parabola_and_its_minimum_are_those_of_polyfit():
    rows = grid(QUOKKA, Design(3, 7), 0.003, 4)
    for C in np.geomspace(3e18, 1e21, 3):
        cells = budget(rows, C)
        x, loss = np.log([r["N"] for r in cells]), np.array([r["loss"] for r in cells])
        parabola = Parabola.of(np.log(C), np.arange(len(cells)), x)
        coefficients, residuals = parabola.fit(loss[None])
        c2, c1, c0 = np.polyfit(x, loss, 2)
        assert parabola.in_ln_N(coefficients[0]) == pytest.approx([c0, c1, c2], rel=1e-6)
        assert residuals[0] == pytest.approx(loss - np.polyval([c2, c1, c0], x), abs=1e-9)
        ln_N, least = parabola.vertex(coefficients)
        assert (ln_N[0], least[0]) == (
            pytest.approx(-c1 / (2 * c2), rel=1e-9),
            pytest.approx(c0 - c1**2 / (4 * c2), rel=1e-9),
        )


def test_a_true_parabola_gives_its_minimum_with_repeats_too():
    N = np.array([1e8, 2e8, 2e8, 3e8, 5e8, 5e8])
    y = np.log(3.0 + 0.04 * (np.log(N) - np.log(2.6e8)) ** 2)
    found = minima([parabola_of(N)], y[None])
    assert np.exp(found.ln_N[0, 0]) == pytest.approx(2.6e8, rel=1e-9)
    assert np.exp(found.ln_L[0, 0]) == pytest.approx(3.0, rel=1e-12)


def slope(at):
    N = np.geomspace(1e8, 8e8, 6)
    return parabola_of(N), np.log(3.0 + 0.03 * (np.log(N) - np.log(at)) ** 2)


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        (2e9, "the parabola still falls towards larger N at C = 1e[+]19: add larger sizes"),
        (3e7, "the parabola still falls towards smaller N at C = 1e[+]19: add smaller sizes"),
    ],
)
def test_a_budget_without_an_interior_minimum_says_which_sizes_are_missing(at, reason):
    parabola, y = slope(at)
    found = minima([parabola], y[None])
    assert np.isnan(found.ln_N[0, 0])
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reasons[0])


def test_a_curvature_that_noise_could_make_is_refused_and_more_cells_let_it_through():
    N = np.geomspace(1e8, 8e8, 5)
    truth = 3.0 + 0.02 * (np.log(N) - np.log(2.8e8)) ** 2
    noise = 0.006 * np.array([1, -1, 1, -1, 1.0])
    found = minima([parabola_of(N)], np.log(truth * (1 + noise))[None])
    assert "not separable from noise" in found.reasons[0] and np.isnan(found.ln_N[0, 0])
    often = np.tile(N, 40)
    y = np.log(np.tile(truth, 40) * (1 + np.random.default_rng(0).permutation(np.tile(noise, 40))))
    assert not minima([parabola_of(often)], y[None]).reasons[0]
    hill = 3.0 - 0.02 * (np.log(N) - np.log(2.8e8)) ** 2
    down = minima([parabola_of(N)], np.log(hill * (1 + noise / 3))[None])
    assert "opens downward" in down.reasons[0]


def test_losses_that_bend_the_wrong_way_but_fall_to_one_side_say_which_sizes_are_missing():
    """Losses of a real pilot whose smallest size was the best: a parabola through them opens downward."""
    parabola = parabola_of(np.array([12640, 25248, 55536, 100672, 221664.0]))
    loss = np.array([4.464, 4.843, 5.088, 5.128, 5.251])
    assert (
        "falls towards smaller N at C = 1e+19: add smaller sizes" in minima([parabola], np.log(loss)[None]).reasons[0]
    )
    mirrored = parabola_of(np.exp(-np.log([12640, 25248, 55536, 100672, 221664.0]))[::-1])
    assert "add larger sizes" in minima([mirrored], np.log(loss[::-1])[None]).reasons[0]


def test_the_noise_is_pooled_over_the_budgets():
    """One budget of four sizes has one degree of freedom; beside others its minimum counts."""
    rows = grid(QUOKKA, Design(4, 4), 0.003, 1)
    cells = [[i for i, row in enumerate(rows) if row["C"] == pytest.approx(C)] for C in np.geomspace(3e18, 1e21, 4)]
    x, y = np.log([row["N"] for row in rows]), np.log([row["loss"] for row in rows])
    all_four = [Parabola.of(0.0, np.array(at), x[at]) for at in cells]
    assert not np.isnan(minima(all_four, y[None]).ln_N).any()
    alone = minima(all_four[:1], y[None])
    assert alone.noise >= 0 and (np.isnan(alone.ln_N[0, 0]) or alone.noise < 1e-3)


def test_too_few_sizes_and_no_noise_to_judge_by_are_refused():
    with pytest.raises(Refused, match="2 sizes at C = 1e[+]19"):
        parabola_of(np.array([1e8, 1e8, 3e8]))
    N = np.array([1e8, 2e8, 4e8])
    y = np.log(3.0 + 0.05 * (np.log(N) - np.log(2e8)) ** 2)
    with pytest.raises(Refused, match="nothing to tell the noise by"):
        minima([parabola_of(N)], y[None])
    assert not minima([parabola_of(N)], y[None], known_noise=0.003).reasons[0]


def test_many_studies_at_once_are_the_studies_one_by_one():
    rows = grid(QUOKKA, Design(3, 5))
    x, y = np.log([row["N"] for row in rows]), np.log([row["loss"] for row in rows])
    parabolas = [Parabola.of(0.0, np.arange(5 * i, 5 * i + 5), x[5 * i : 5 * i + 5]) for i in range(3)]
    studies = y + 0.006 * np.random.default_rng(0).standard_normal((40, 15))
    together = minima(parabolas, studies)
    assert np.isnan(together.ln_N).any() and not np.isnan(together.ln_N).all()
    for i, study in enumerate(studies):
        alone = minima(parabolas, study[None])
        np.testing.assert_allclose(alone.ln_N[0], together.ln_N[i], rtol=1e-9)


def test_the_best_cell_is_the_best_size_over_its_repeats_and_never_one_at_the_edge():
    N = np.log([1e8, 1e8, 2e8, 2e8, 4e8, 1e8, 2e8, 4e8, 7e7])
    loss = np.array([3.2, 3.3, 3.00, 3.2, 3.15, 3.3, 3.2, 3.1, 2.9])
    groups = [(np.log(1e19), np.arange(5)), (np.log(1e20), np.arange(5, 8)), (np.log(1e21), np.arange(8, 9))]
    ln_N, ln_L, reasons = best_cells(groups, N, np.log(loss)[None])
    assert np.exp(ln_N[0, 0]) == pytest.approx(2e8) and np.exp(ln_L[0, 0]) == pytest.approx(np.sqrt(3.0 * 3.2))
    assert np.isnan(ln_N[0, 1]) and "the largest size is the best at C = 1e+20: add larger sizes" in reasons[1]
    assert np.isnan(ln_N[0, 2]) and "one size" in reasons[2] and reasons[0] == ""
    smallest = best_cells(groups[:1], N, np.log(loss[::-1])[None, :5])
    assert (
        np.isnan(smallest[0][0, 0])
        and "the smallest size is the best at C = 1e+19: add smaller sizes" in smallest[2][0]
    )


def test_a_power_law_is_that_of_polyfit_and_a_hole_is_left_out():
    random = np.random.default_rng(0)
    x, y = np.log(np.geomspace(1e18, 1e21, 6)), random.standard_normal((4, 6))
    exponent, constant = power_law(x, y)
    for i in range(4):
        assert (exponent[i], constant[i]) == (
            pytest.approx(np.polyfit(x, y[i], 1)[0]),
            pytest.approx(np.polyfit(x, y[i], 1)[1]),
        )
    holed = y.copy()
    holed[0, 2], holed[1, :4] = np.nan, np.nan
    exponent, _ = power_law(x, holed)
    rest = [0, 1, 3, 4, 5]
    assert exponent[0] == pytest.approx(np.polyfit(x[rest], y[0, rest], 1)[0]) and np.isnan(exponent[1])


def test_the_law_of_the_loss_finds_its_constant_where_there_is_one():
    ln_C = np.log(np.geomspace(1e18, 1e22, 6))
    with_E = np.log(2.0 + 900 * np.exp(ln_C) ** -0.15)
    law = fit_loss_law(ln_C, with_E[None], True)
    assert (law.E[0], np.exp(law.ln_k[0]), law.g[0]) == (
        pytest.approx(2.0, rel=1e-5),
        pytest.approx(900, rel=1e-3),
        pytest.approx(0.15, rel=1e-4),
    )
    assert has_constant(ln_C, with_E)
    without = np.log(50 * np.exp(ln_C) ** -0.06) + 1e-3 * np.random.default_rng(3).standard_normal(6)
    assert not has_constant(ln_C, without)
    assert fit_loss_law(ln_C, without[None], False).g[0] == pytest.approx(-np.polyfit(ln_C, without, 1)[0])
    assert float(law.ln_compute(law.ln_loss(ln_C[2]).item() and np.exp(with_E[2]))[0]) == pytest.approx(
        ln_C[2], rel=1e-5
    )


def test_isoflop_minima_of_a_symmetric_law_are_its_optima():
    """Quokka's exponents are nearly equal, so that a centred grid hardly biases the parabola."""
    for C in (3e18, 1e21):
        cells = budget(grid(QUOKKA, Design(2, 9, span=2)), C)
        x, y = np.log([r["N"] for r in cells]), np.log([r["loss"] for r in cells])
        found = minima([Parabola.of(np.log(C), np.arange(9), x)], y[None])
        assert found.ln_N[0, 0] == pytest.approx(QUOKKA.optimum(np.log(C), Cost())[0], abs=0.01)


def test_a_budget_of_one_size_has_no_optimum_unless_it_is_said_to_be_one():
    groups, N, y = [(41.0, np.array([0])), (42.0, np.array([1]))], np.array([18.0, 19.0]), np.array([[1.2, 1.1]])
    ln_N, _, reasons = best_cells(groups, N, y)
    assert np.isnan(ln_N).all() and all("one size" in reason for reason in reasons)
    assert best_cells(groups, N, y, optima=True)[0].tolist() == [[18.0, 19.0]]


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-3])
def test_laws_that_optima_allow_are_as_near_to_the_best_one_as_the_noise_is_small(noise):
    """Their E are those whose best fit, by an optimiser of its own, leaves no more than the cut; at the ends just that much."""
    ln_C = np.log(np.geomspace(6e18, 1e21, 8))
    ln_L = np.log(1.7 + 400.0 * np.exp(-0.15 * ln_C)) + noise * np.random.default_rng(3).standard_normal(8)

    def rest(E: float) -> float:
        begin = np.polyfit(ln_C - ln_C.mean(), np.log(np.exp(ln_L) - E), 1)[::-1]
        law = lambda x: np.log(E + np.exp(x[0] + x[1] * (ln_C - ln_C.mean()))) - ln_L  # noqa: E731
        return 2 * float(least_squares(law, begin, xtol=1e-15, ftol=1e-15, gtol=1e-15).cost)

    found = allowed(ln_C, ln_L, True)
    least = min(rest(E) for E in np.unique(found.E))
    cut = least * (1 + f_distribution.ppf(0.95, 1, 5) / 5)
    ends = float(found.E.min()), float(found.E.max())
    if noise == 0:
        assert ends == pytest.approx((1.7, 1.7), abs=1e-4)
        return
    best = float(fit_loss_law(ln_C, ln_L[None], True).E[0])
    assert ends[0] <= best <= ends[1] and ends[1] - ends[0] < 300 * noise
    width = ends[1] - ends[0]
    for end, out in zip(ends, (-1, 1)):
        assert rest(end) <= 1.02 * cut and rest(end + 0.25 * out * width) > cut
