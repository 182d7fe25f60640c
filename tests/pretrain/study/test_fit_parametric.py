"""The parametric law: recovered exactly without noise, against an independent solver with it, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from bench.laws import Design
from pretrain.study.fitting.laws import Cost, Refused, published
from pretrain.study.fitting.parametric import DELTA, Space, fit_parametric, minimise, objective, starts, terms
from pretrain.study.fitting.solver import huber, solve
from tests.pretrain.study.planted import grid


def columns(rows):
    return [np.log([row[name] for row in rows]) for name in ("N", "D", "loss")]


@pytest.mark.parametrize("name", ["quokka", "chinchilla", "chinchilla_again"])
def test_a_law_without_noise_is_recovered_to_many_digits(name):
    law = published(name)
    found = fit_parametric(*columns(grid(law, Design(4, 5))), 100, np.random.default_rng(0))
    assert found.law.E == pytest.approx(law.E, rel=1e-6)
    assert (found.law.alpha, found.law.beta) == (pytest.approx(law.alpha, rel=1e-6), pytest.approx(law.beta, rel=1e-6))
    assert (found.law.ln_A, found.law.ln_B) == (pytest.approx(law.ln_A, rel=1e-6), pytest.approx(law.ln_B, rel=1e-6))


def test_quokka_s_coefficients_come_back_from_noisy_cells_within_their_rounding():
    """FACTS: printed coefficients are rounded, 4 % is allowed; here the noise of 240 cells is part of it too."""
    rows = [row for seed in range(8) for row in grid(published("quokka"), Design(5, 6, span=4), 0.0007, seed)]
    found = fit_parametric(*columns(rows), 100, np.random.default_rng(0)).law
    assert found.E == pytest.approx(2.413, rel=0.01)
    assert (found.alpha, found.beta) == (pytest.approx(0.379, rel=0.04), pytest.approx(0.378, rel=0.04))
    assert found.allocation(Cost())[0] == pytest.approx(0.4993, abs=0.01)


@pytest.mark.parametrize("delta", [DELTA, None])
def test_the_gradient_of_the_objective_is_its_difference_quotient(delta):
    ln_N, ln_D, y = columns(grid(published("quokka"), Design(3, 4), 0.004))
    space = Space.of(ln_N, ln_D, y)
    cells = ln_N - space.middle_N, ln_D - space.middle_D, y, delta
    x = space.point(published("chinchilla_again"))
    _, gradient = objective(x, *cells)
    for i, step in enumerate(1e-7 * np.eye(5)):
        numeric = (objective(x + step, *cells)[0] - objective(x - step, *cells)[0]) / 2e-7
        assert gradient[i] == pytest.approx(numeric, rel=1e-5)
    scale = len(y) * (delta or 1.0) ** 2
    assert objective(x, *cells)[0] * scale == pytest.approx(
        huber(terms(x[None], *cells[:2])[0][0] - y, delta), rel=1e-12
    )


def test_the_jacobian_is_the_difference_quotient():
    ln_N, ln_D, y = columns(grid(published("quokka"), Design(3, 4), 0.01))
    space = Space.of(ln_N, ln_D, y)
    u, v = ln_N - space.middle_N, ln_D - space.middle_D
    x = space.point(published("quokka"))[None]
    value, jacobian = terms(x, u, v)
    assert value[0] == pytest.approx(published("quokka").ln_loss(ln_N, ln_D), rel=1e-12)
    for i in range(5):
        step = np.zeros((1, 5))
        step[0, i] = 1e-6
        numeric = (terms(x + step, u, v)[0] - terms(x - step, u, v)[0]) / 2e-6
        assert jacobian[0, :, i] == pytest.approx(numeric[0], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_minimum_is_that_of_an_independent_solver(seed):
    """Nelder-Mead on the formula itself, restarted until it stands still: no gradient, no logsumexp, none of our starts."""
    from scipy.optimize import minimize

    rows = grid(published("chinchilla_again"), Design(4, 5), 0.004, seed)
    N, D, loss = (np.array([row[name] for row in rows]) for name in ("N", "D", "loss"))

    def objective(p):
        E, at_N, at_D, alpha, beta = p
        if min(p) <= 0:
            return np.inf
        predicted = E + at_N * (N / 1e9) ** -alpha + at_D * (D / 1e10) ** -beta
        size = np.abs(np.log(predicted) - np.log(loss))
        return float(np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum() * 1e6)

    at = np.array([1.8, 0.4, 0.4, 0.4, 0.4])
    for _ in range(12):
        at = minimize(objective, at, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-9, "fatol": 1e-9}).x
    ln_N, ln_D, y = columns(rows)
    space = Space.of(ln_N, ln_D, y)
    law = space.surface(minimise(ln_N, ln_D, y, space))
    ours = [
        law.E,
        np.exp(law.ln_A - law.alpha * np.log(1e9)),
        np.exp(law.ln_B - law.beta * np.log(1e10)),
        law.alpha,
        law.beta,
    ]
    assert objective(ours) <= objective(at) * (1 + 1e-5)
    assert ours == pytest.approx(at, rel=2e-2)


def test_one_ruined_cell_does_not_move_the_law_as_least_squares_moves():
    rows = grid(published("quokka"), Design(5, 6), 0.002, 3)
    rows[7]["loss"] *= 1.2
    ln_N, ln_D, y = columns(rows)
    space = Space.of(ln_N, ln_D, y)
    robust = minimise(ln_N, ln_D, y, space)
    squares = minimise(ln_N, ln_D, y, space, delta=None)
    true = space.point(published("quokka"))
    assert np.abs(robust - true)[3:].max() < 0.03 < np.abs(squares - true)[3:].max()


def test_every_start_of_the_grid_is_inside_the_box_and_the_batch_solver_never_goes_up():
    ln_N, ln_D, y = columns(grid(published("quokka"), Design(3, 4), 0.004, 1))
    space = Space.of(ln_N, ln_D, y)
    begin = starts(ln_N, ln_D, y, space)
    assert (begin >= space.low).all() and (begin <= space.high).all() and len(begin) == 36
    model = lambda x: terms(x, ln_N - space.middle_N, ln_D - space.middle_D)  # noqa: E731
    before = huber(model(begin)[0] - y, DELTA)
    x, after = solve(model, y, begin, space.low, space.high, DELTA, iterations=40)
    assert (after <= before).all() and after.min() < 0.05 * np.median(before)
    assert after == pytest.approx(huber(model(x)[0] - y, DELTA), rel=1e-12)


def test_numbers_that_the_cells_do_not_show_get_wide_intervals_that_hold_the_truth():
    """Half a decade of compute, 1 % noise: refits around a law that does without E never find the E that is there."""
    held = 0
    for seed in range(3):
        rows = grid(published("quokka"), Design(3, 4, 3e18, 9e18, span=2), 0.01, seed)
        found = fit_parametric(*columns(rows), 200, np.random.default_rng(0)).report(Cost())
        E, alpha = found["E"], found["alpha"]
        assert E["low"] < 0.8 and E["high"] > 2.4 and alpha["high"] - alpha["low"] > 0.3
        held += (E["low"] <= 2.413 <= E["high"]) + (alpha["low"] <= 0.379 <= alpha["high"])
        assert any("E is not identified" in note for note in found.get("notes", [])) == (E["low"] == 0)
    assert held >= 5


def product(sizes, tokens):
    return [{"N": n, "D": d, "loss": 3.0 + n / 1e9} for n in sizes for d in tokens]


IMPOSSIBLE = {
    "5 cells for the law's 5 numbers": grid(published("quokka"), Design(1, 5)),
    "collinear": [{"N": n, "D": 20 * n, "loss": 3 - 0.1 * i} for i, n in enumerate(np.geomspace(1e7, 1e9, 8))],
    "2 distinct values of N": product((1e8, 2e8), (1e9, 2e9, 4e9, 8e9)),
    "2 distinct values of D": product((1e8, 2e8, 4e8, 8e8), (1e9, 2e9)),
}


@pytest.mark.parametrize("reason", IMPOSSIBLE)
def test_cells_that_cannot_bear_the_law_are_refused_with_the_reason(reason):
    with pytest.raises(Refused, match=reason):
        fit_parametric(*columns(IMPOSSIBLE[reason]), 100, np.random.default_rng(0))


def test_losses_that_are_noise_alone_are_refused():
    random = np.random.default_rng(5)
    rows = grid(published("quokka"), Design(4, 5))
    for row in rows:
        row["loss"] = 3.0 * np.exp(0.02 * random.standard_normal())
    with pytest.raises(Refused, match="not separable from noise"):
        fit_parametric(*columns(rows), 100, np.random.default_rng(0))
