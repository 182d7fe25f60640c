"""The solver of many small problems, by itself: Huber's minimum, the box, and problems that do not touch each other."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from pretrain.study.fitting.solver import huber, solve


def location(x):
    """The model y = x."""
    return np.repeat(x, 9, axis=1), np.ones((len(x), 9, 1))


def test_the_minimum_of_hubers_loss_is_found_though_the_start_is_far_off():
    y = np.array([1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 7.0, 8.0, 9.0])
    found, value = solve(
        location, y, np.array([[30.0], [-5.0]]), np.array([-99.0]), np.array([99.0]), 0.1, iterations=200
    )
    best = minimize_scalar(
        lambda c: float(huber(c - y, 0.1)), bounds=(0, 10), method="bounded", options={"xatol": 1e-10}
    )
    assert found[:, 0] == pytest.approx(best.x, abs=1e-5) and value == pytest.approx(best.fun, rel=1e-9)
    squares, _ = solve(location, y, np.array([[30.0]]), np.array([-99.0]), np.array([99.0]), None)
    assert squares[0, 0] == pytest.approx(y.mean()) and abs(y.mean() - best.x) > 1


def test_a_box_is_never_left_and_its_edge_is_taken_where_the_minimum_lies_beyond():
    y = np.linspace(0, 1, 9)
    found, _ = solve(location, y, np.array([[0.9]]), np.array([0.7]), np.array([0.95]))
    assert found[0, 0] == pytest.approx(0.7)


def test_problems_side_by_side_are_the_problems_one_by_one():
    random = np.random.default_rng(0)
    y = random.standard_normal((5, 9))
    start = random.standard_normal((5, 1))
    box = np.array([-9.0]), np.array([9.0])
    together, values = solve(location, y, start, *box, 0.3)
    for i in range(5):
        alone, value = solve(location, y[i], start[i : i + 1], *box, 0.3)
        assert together[i] == pytest.approx(alone[0], abs=1e-5) and values[i] == pytest.approx(value[0], rel=1e-6)
