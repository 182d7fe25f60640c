"""The figures: real pictures of the numbers, the same for the same fit, with axes that can be read."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from pretrain.study.report.fit_file import Fit, read_fit
from pretrain.study.report.page import page
from pretrain.study.report.plots import Picture, file_name, log_ticks, range_of
from pretrain.study.report.plots_frontier import frontier, optima
from pretrain.study.report.plots_repeated import repeated_data
from pretrain.study.report.plots_surface import law_of, loss_surface, predicted_loss, residuals
from pretrain.study.report.references import REFERENCES, comparable
from tests.pretrain.study import fits


def planted(folder, **changes) -> Fit:
    content = fits.fit()
    for part, value in changes.items():
        content["objectives"]["masked"][part] = value
    return read_fit(str(fits.write(folder, content)))


def pixels(picture) -> np.ndarray:
    assert isinstance(picture, Picture)
    with Image.open(io.BytesIO(picture.png)) as opened:
        opened.load()
        return np.asarray(opened.convert("RGB"))


def test_the_same_fit_gives_the_same_bytes_and_another_number_another_picture(tmp_path):
    first = residuals(planted(tmp_path).first, "N").png
    assert first == residuals(planted(tmp_path).first, "N").png
    other = planted(tmp_path)
    other.first.parts["parametric"]["E"] = fits.estimate(2.5, 0.1)
    assert first != residuals(other.first, "N").png


def repeated(folder, **changes) -> Fit:
    """A fit with cells of 1 to 64 epochs whose losses follow the law with R* = 15 exactly."""
    content = fits.fit(two=False)
    masked = content["objectives"]["masked"]
    masked["data_constrained"] = {key: fits.estimate(value, 0.1) for key, value in fits.MASKED.items()}
    masked["data_constrained"] |= {
        "form": "muennighoff",
        "R_star": {"value": 15.0, "low": 12.0, "high": 20.0},
        "cells": 4,
    } | changes
    for row, epochs in zip(masked["rows"], (1.0, 4.0, 16.0, 64.0)):
        row |= {"unique_tokens": row["D"] / epochs, "epochs": epochs}
        useful = row["unique_tokens"] * (1 + 15.0 * (1 - math.exp(-(epochs - 1) / 15.0)))
        row["loss"] = fits.loss_of(fits.MASKED, row["N"], useful)
    return read_fit(str(fits.write(folder, content)))


def test_what_repeats_are_worth_is_drawn_told_and_refused(tmp_path):
    fit = repeated(tmp_path)
    picture = repeated_data(fit.first)
    worth = 1 + 15.0 * (1 - math.exp(-63 / 15.0))
    assert f"64.0 epochs are worth {worth:.1f} epochs of fresh data" in picture.alt and pixels(picture).std() > 5
    words = page(fit, {}, "no rules", None, "H800", 0.4)
    assert "after" in words and "repetitions (R*)" in words and ">4</data>" in words
    assert ">epochs</th>" in words and '<data value="64.0">64.0</data>' in words
    assert "of 21 cells" in residuals(fit.first, "N").alt  # cells with repeated data belong to no other law
    unbounded = repeated(tmp_path, R_star={"value": 15.0, "low": 12.0, "high": None}, note="R* has no upper end")
    assert repeated_data(unbounded.first).png != picture.png
    assert "R* has no upper end." in page(unbounded, {}, "no rules", None, "H800", 0.4)
    refused = repeated(tmp_path, refused="no cell saw its tokens twice")
    assert repeated_data(refused.first).reason == "no cell saw its tokens twice"
    assert repeated_data(planted(tmp_path).first) is None


def test_the_residuals_that_are_drawn_are_those_of_the_law(tmp_path):
    fit = planted(tmp_path)
    law = law_of(fit.first)
    worst = max(abs(r.loss / fits.loss_of(fits.MASKED, r.N, r.D) - 1) for r in fit.first.rows)
    N, D = (np.array([getattr(r, key) for r in fit.first.rows]) for key in ("N", "D"))
    assert np.allclose(predicted_loss(law, N, D), fits.loss_of(fits.MASKED, N, D), rtol=1e-12)
    assert f"at most {100 * worst:.2g} %" in residuals(fit.first, "N").alt


def test_a_ladder_without_budgets_and_a_law_without_bounds_are_drawn(tmp_path):
    fit = planted(tmp_path, isoflop={"refused": "no budget has three sizes"})
    for prediction in fit.raw["objectives"]["masked"]["predictions"]:
        prediction["loss"] |= {"low": None, "high": None}
        prediction["N_opt"] |= {"low": 0.0, "high": None}
    for row in fit.raw["objectives"]["masked"]["rows"]:
        row["budget"] = None
    fit = read_fit(str(fits.write(tmp_path, fit.raw)))
    for picture in (loss_surface(fit.first, "N"), optima(fit.first, fit), frontier(fit)):
        assert pixels(picture).std() > 5


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (9e17, 7e21, [1e18, 1e19, 1e20, 1e21]),
        (7e6, 1.6e9, [1e7, 3e7, 1e8, 3e8, 1e9]),
        (2.1, 5.2, [2.5, 3.0, 3.5, 4.0, 4.5, 5.0]),
        (1e3, 1e21, [1e3, 1e6, 1e9, 1e12, 1e15, 1e18, 1e21]),
        (3.37, 3.43, [3.37, 3.38, 3.39, 3.40, 3.41, 3.42, 3.43]),
    ],
)
def test_ticks_are_few_round_and_inside(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_ticks_are_few_and_leave_no_large_part_of_any_axis_bare():
    draw = np.random.default_rng(0)
    for low, ratio, most in zip(
        10 ** draw.uniform(-3, 22, 500), 10 ** draw.uniform(0.01, 12, 500), draw.integers(5, 10, 500)
    ):
        found = log_ticks(low, low * ratio, int(most))
        assert 3 <= len(found) <= most + 1 and found == sorted(found), (low, ratio, found)
        assert low * (1 - 1e-9) <= found[0] and found[-1] <= low * ratio * (1 + 1e-9)
        bare = np.diff(np.log([low, *found, low * ratio])).max() / math.log(ratio)
        assert bare < 0.6, (low, ratio, most, found)


def test_an_axis_holds_all_values_with_room_even_for_one():
    low, high = range_of([3.0, None, 3.0])
    assert low < 3.0 < high
    low, high = range_of([1e6, 1e9, 0.0, math.inf])
    assert 5e5 < low < 1e6 and 1e9 < high < 2e9


def test_published_lines_are_drawn_only_where_they_count_alike_and_are_near():
    quokka, chinchilla = REFERENCES
    assert comparable("total", 1e18, 1e22) == ([quokka, chinchilla], [])
    kept, left = comparable("non_embedding", 1e18, 1e22)
    assert kept == [quokka] and "counts all parameters, this study non-embedding" in left[0]
    kept, left = comparable("total", 1e12, 1e14)
    assert kept == [] and len(left) == 2 and "factor of 1000 away" in left[0]


def test_the_published_lines_are_what_their_sources_print():
    quokka, chinchilla = REFERENCES
    for C in (3e18, 1e20, 1e21):  # C = 6 N D, printed with three digits
        assert 6 * quokka.N(C) * quokka.D(C) == pytest.approx(C, rel=0.01)
    for N, C, D in (
        (400e6, 1.92e19, 8.0e9),
        (1e9, 1.21e20, 20.2e9),
        (67e9, 5.76e23, 1.5e12),
    ):  # table 3 of arXiv 2203.15556
        assert chinchilla.N(C) == pytest.approx(N, rel=0.05) and chinchilla.D(C) == pytest.approx(D, rel=0.1)


def test_a_name_from_outside_makes_a_plain_file_name():
    assert file_name("isoflop", "../../etc/<x>") == "isoflop-_etc_x_"
