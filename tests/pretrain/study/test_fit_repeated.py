"""Repeated data: R* is recovered, its absence is refused, and cells that repeat never bend the law of fresh data."""

from __future__ import annotations

import numpy as np
import pytest

from bench.laws import Design
from pretrain.study.fitting.data_constrained import fit_repeated, repeated
from pretrain.study.fitting.fit import fit_table
from pretrain.study.fitting.laws import Refused, published
from tests.pretrain.study.planted import grid, table

LAW, R_STAR = published("chinchilla"), 15.4  # R* of Muennighoff et al.


def study(noise, seed, half=R_STAR):
    """Fresh cells, and those of three sizes that see 2, 8 and 40 times 0.3, 1 and 3 billion tokens."""
    random = np.random.default_rng(seed)
    rows = [
        {**row, "unique_tokens": row["D"], "epochs": 1.0} for row in grid(LAW, Design(4, 5, 1e18, 1e20), noise, seed)
    ]
    for U in (3e8, 1e9, 3e9):
        for epochs in (2.0, 8.0, 40.0):
            for N in (5e7, 2e8, 8e8):
                worth = U + U * half * (1 - np.exp(-(epochs - 1) / half))
                loss = LAW.E + np.exp(LAW.ln_A) / N**LAW.alpha + np.exp(LAW.ln_B) / worth**LAW.beta
                loss *= np.exp(noise * random.standard_normal())
                rows.append({"N": N, "D": U * epochs, "loss": loss, "unique_tokens": U, "epochs": epochs})
                rows[-1]["C"] = 6 * N * U * epochs
    return rows


def columns(rows):
    return (
        np.log([r["N"] for r in rows]),
        *(np.array([r[n] for r in rows]) for n in ("unique_tokens", "epochs")),
        np.log([r["loss"] for r in rows]),
    )


def test_r_star_is_recovered_exactly_without_noise_and_within_its_interval_with_it():
    exact = fit_repeated(*columns(study(0.0, 0)), 100, np.random.default_rng(0))
    assert exact["R_star"]["value"] == pytest.approx(R_STAR, rel=1e-4) and exact["E"]["value"] == pytest.approx(
        1.69, rel=1e-4
    )
    held = 0
    for seed in range(3):
        found = fit_repeated(*columns(study(0.004, seed)), 100, np.random.default_rng(seed))
        held += found["R_star"]["low"] <= R_STAR <= found["R_star"]["high"]
        assert found["R_star"]["high"] / found["R_star"]["low"] < 3
    assert held >= 2 and found["repeated_cells"] == 27


def test_repeats_that_are_worth_as_much_as_fresh_tokens_leave_r_star_without_an_upper_end():
    found = fit_repeated(*columns(study(0.004, 1, half=1e9)), 200, np.random.default_rng(0))
    assert found["R_star"]["high"] is None and found["R_star"]["low"] > 100 and "no upper end" in found["note"]


def test_what_cannot_bear_r_star_is_refused():
    rows = study(0.003, 0)
    fresh = [row for row in rows if row["epochs"] == 1]
    with pytest.raises(Refused, match="no cell saw its tokens twice"):
        fit_repeated(*columns(fresh), 100, np.random.default_rng(0))
    with pytest.raises(Refused, match="2 cells saw their tokens again"):
        fit_repeated(*columns([*fresh, *rows[-2:]]), 100, np.random.default_rng(0))
    assert repeated(np.array([np.nan, 0.4, 1.0, 1.5])).tolist() == [False, False, False, True]


def test_cells_that_repeat_their_data_are_in_their_own_part_alone(tmp_path):
    rows = study(0.003, 2)
    whole = fit_table(table(tmp_path, rows), 100, holdout=False)
    fresh = fit_table(table(tmp_path, [row for row in rows if row["epochs"] == 1]), 100, holdout=False)
    for part in ("parametric", "isoflop", "envelope"):
        assert whole[part] == fresh[part]
    part = whole["objectives"]["all"]
    assert part["data_constrained"]["form"] == "muennighoff" and "data_constrained" not in fresh["objectives"]["all"]
    assert len(part["rows"]) == len(rows) and "27 cells with repeated data" in whole["input"]["notes"][-1]


def test_a_study_whose_every_cell_repeats_its_data_has_the_law_of_repeats_and_refuses_the_rest(tmp_path):
    rows = [row for row in study(0.003, 3) if row["epochs"] > 1]
    found = fit_table(table(tmp_path, rows), 100)
    assert all("refused" in found[part] for part in ("parametric", "isoflop", "envelope", "frontier"))
    assert found["predictions"] == [] and "R_star" in found["objectives"]["all"]["data_constrained"]
