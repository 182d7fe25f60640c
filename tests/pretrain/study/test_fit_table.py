"""Whatever can be wrong with a table of cells is one line that names the place and what to do, and nothing is fitted."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from bench.laws import Design
from data.errors import InputError
from pretrain.study.fitting.fit import fit_table
from pretrain.study.fitting.laws import published
from pretrain.study.fitting.table import cells_of, read_table
from tests.pretrain.study.planted import grid, table, write

QUOKKA = published("quokka")
GOOD = grid(published("quokka"), Design(3, 3), 0.002)


def changed(at=4, **values):
    rows = [dict(row) for row in GOOD]
    rows[at].update(values)
    return rows


def text(tmp_path, content):
    file = tmp_path / "cells.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def refusal(path):
    with pytest.raises(InputError) as caught:
        read_table(str(path))
    message = str(caught.value)
    assert "\n" not in message and message.startswith("study fit: ") and len(message) < 300
    return message


WRONG_CELLS = {
    "NaN loss": (changed(loss="nan"), ("line 6", "loss is nan", "excluded")),
    "infinite loss": (changed(loss="inf"), ("line 6", "loss is inf")),
    "no loss": (changed(loss=""), ("line 6", "loss is empty")),
    "zero": (changed(D=0), ("line 6", "D is 0", "above 0")),
    "negative": (changed(loss=-3.1), ("line 6", "loss is -3.1")),
    "text in a number": (changed(N="84M"), ("line 6", "'84M'", "84e6")),
    "underscore": (changed(N="84_000_000"), ("line 6", "not a number")),
    "duplicate": ([*GOOD, dict(GOOD[2])], ("line 11", "on line 4 already", "repeat")),
    "duplicate of one seed": ([{**row, "seed": 1} for row in [*GOOD, GOOD[2]]], ("line 11", "already")),
    "one size": ([{"N": 1e8, "D": d, "loss": 3.0} for d in (1e9, 2e9, 3e9, 4e9)], ("one size", "N = 1e+08")),
    "N in millions": ([{**row, "N": row["N"] / 1e6} for row in GOOD], ("N looks like millions", "raw counts")),
    "D in billions": ([{**row, "D": row["D"] / 1e9} for row in GOOD], ("D looks like", "billions")),
    "one row in millions": (changed(N=GOOD[4]["N"] / 1e6), ("line 6", "units are mixed up")),
    "C of one row in another unit": (changed(C=GOOD[4]["C"] / 1e9), ("line 6", "another unit")),
    "C in exaFLOPs": ([{**row, "C": row["C"] / 1e18} for row in GOOD], ("C is about", "FLOPs")),
    "N in thousands": ([{**row, "N": row["N"] / 1e3} for row in GOOD], ("1e+03 times 6 N D", "N looks like thousands")),
    "N of billions in millions": (
        [{"N": n, "D": d, "loss": 3.0} for n in (1028, 1233, 2121) for d in (1e10, 2e10)],
        ("N is 1028", "millions"),
    ),
    "unknown status": ([{**row, "status": "ok"} for row in GOOD], ("line 2", "'ok'", "done, excluded, missing")),
    "too few": (GOOD[:2], ("2 cells are done", "at least 3")),
    "C in some rows": (changed(C=""), ("line 6", "C is empty", "every row or in none")),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_CELLS)
def test_a_wrong_cell_is_named_with_its_line(what, tmp_path):
    rows, words = WRONG_CELLS[what]
    message = refusal(write(tmp_path / "cells.csv", rows))
    assert all(word in message for word in words), message


WRONG_FILES = {
    "empty": ("", ("is empty", "N, D, loss")),
    "blank": ("\n \n", ("is empty",)),
    "header alone": ("N,D,loss\n", ("no rows",)),
    "missing column": ("n,D,loss\n1e8,1e9,3\n", ("no column 'N'", "is 'n' meant?")),
    "another name": ("params,tokens,loss\n1e8,1e9,3\n", ("no column 'N'", "'params'")),
    "nearly the name": ("N,D,los\n1e8,1e9,3\n", ("no column 'loss'", "'los'")),
    "no such thing": ("a,b,c\n1,2,3\n", ("no column 'N'", "it has a, b, c")),
    "semicolons": ("N;D;loss\n1e8;1e9;3,1\n", ("semicolons", "commas")),
    "tabs": ("N\tD\tloss\n1e8\t1e9\t3\n", ("tabs",)),
    "decimal comma": ("N,D,loss\n1e8,1e9,3,1\n", ("line 2", "decimal comma")),
    "quoted decimal comma": ('N,D,loss\n1e8,1e9,"3,1"\n', ("line 2", "'3,1'", "point")),
    "column twice": ("N,D,loss,N\n1e8,1e9,3,1e8\n", ("'N' twice",)),
    "short row": ("N,D,loss\n1e8,1e9\n", ("line 2", "2 fields")),
    "no text": (b"PK\x03\x04\xff\xfe\x00", ("is not text", "CSV")),
    "nulls": (b"N,D\x00,loss\n", ("is not text",)),
    "open quote": ('N,D,loss\n"1e8,1e9,3\n', ("is not CSV",)),
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_a_file_that_is_no_such_table_says_what_is_needed(what, tmp_path):
    content, words = WRONG_FILES[what]
    message = refusal(text(tmp_path, content))
    assert all(word in message for word in words), message


def test_places_without_a_table(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.csv")
    assert "run `study run` first" in refusal(tmp_path)


def test_the_same_cell_twice_is_a_repeat_when_its_seed_differs(tmp_path):
    rows = [{**row, "seed": seed} for seed in (1, 2) for row in GOOD]
    assert len(table(tmp_path, rows).frame) == 18


def test_rows_that_are_not_done_are_listed_with_their_reason_and_may_hold_anything(tmp_path):
    rows = [{**row, "cell": f"c{i}", "status": "done", "reason": ""} for i, row in enumerate(GOOD)]
    rows[3] |= {"status": "excluded", "loss": "nan", "reason": "diverged at step 40"}
    rows[5] |= {"status": "missing", "loss": ""}
    found = table(tmp_path, rows)
    assert len(found.frame) == 7 and found.rows == 9
    assert [(row["cell"], row["loss"], row["reason"]) for row in found.excluded] == [
        ("c3", None, "diverged at step 40"),
        ("c5", None, "not run yet"),
    ]


def test_c_that_is_not_given_is_6nd_and_that_is_said(tmp_path):
    found = table(tmp_path, [{name: row[name] for name in ("N", "D", "loss")} for row in GOOD])
    assert found.frame["C"].to_numpy() == pytest.approx([6 * row["N"] * row["D"] for row in GOOD])
    assert found.flops == "6ND" and "C = 6 N D" in found.notes[0]


def test_a_study_s_folder_says_how_it_counts(tmp_path):
    write(tmp_path / "results.csv", [{**row, "objective": o} for o in ("autoregressive", "masked") for row in GOOD])
    (tmp_path / "plan.json").write_text(json.dumps({"count": "total", "flops": "palm"}))
    found = read_table(str(tmp_path))
    assert (found.count, found.flops, found.study) == ("total", "palm", tmp_path)
    assert found.objectives() == ["masked", "autoregressive"]
    (tmp_path / "plan.json").write_text("{")
    assert "plan.json" in refusal(tmp_path)


def test_budgets_are_the_column_or_compute_within_five_per_cent(tmp_path):
    rows = [{**row, "C": row["C"] * (1 + 0.02 * (-1) ** i)} for i, row in enumerate(GOOD)]
    groups = cells_of("all", table(tmp_path, rows).frame).groups
    assert [len(cells) for _, cells in groups] == [3, 3, 3]
    assert [np.exp(ln_C) for ln_C, _ in groups] == pytest.approx(np.geomspace(3e18, 1e21, 3), rel=0.02)
    # The column is believed where it is filled, also for cells whose C lie far apart.
    named = [
        {**row, "budget": 4e18 if i < 3 else "", "C": row["C"] * (1.3 if i == 0 else 1)} for i, row in enumerate(GOOD)
    ]
    groups = cells_of("all", table(tmp_path, named).frame).groups
    assert [len(cells) for _, cells in groups] == [3, 3, 3] and np.exp(groups[0][0]) == pytest.approx(4e18)
    rest = cells_of("all", table(tmp_path, rows).frame).without(1)
    assert len(rest.y) == 6 and [len(cells) for _, cells in rest.groups] == [3, 3]


def test_the_mark_that_spreadsheets_put_before_utf_8_is_no_part_of_a_name(tmp_path):
    file = write(tmp_path / "cells.csv", GOOD)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_table(str(file)).frame) == 9


def test_a_budget_in_another_unit_is_no_budget(tmp_path):
    rows = [{**row, "budget": row["C"] / 1e18} for row in grid(QUOKKA, Design(4, 5), 0.002)]
    with pytest.raises(InputError, match="budget is .* and C is .*: give both in FLOPs"):
        table(tmp_path, rows)


@pytest.mark.parametrize("given", ["unique_tokens", "epochs"])
def test_unique_tokens_and_epochs_follow_from_each_other(given, tmp_path):
    rows = [
        {**row, "unique_tokens": min(row["D"], 3e9), "epochs": max(row["D"] / 3e9, 1)}
        for row in grid(QUOKKA, Design(4, 5), 0.002)
    ]
    both = table(tmp_path, rows).frame
    other = "epochs" if given == "unique_tokens" else "unique_tokens"
    one = table(tmp_path, [{key: value for key, value in row.items() if key != other} for row in rows]).frame
    assert np.allclose(one["epochs"], both["epochs"]) and np.allclose(one["unique_tokens"], both["unique_tokens"])
    assert (one["epochs"] > 1.1).any()
    rows[0] |= {"unique_tokens": rows[0]["D"] / 4, "epochs": 2}
    with pytest.raises(InputError, match="are not 2 epochs"):
        table(tmp_path, rows)


def test_the_same_cell_at_other_epochs_is_another_cell(tmp_path):
    rows = grid(QUOKKA, Design(4, 5), 0.002)
    rows = [{**row, "epochs": epochs} for row in rows for epochs in (1, 4)]
    assert len(table(tmp_path, rows).frame) == 40


def test_tokens_in_millions_are_seen_without_c_too(tmp_path):
    rows = [
        {"N": row["N"], "D": 200 * row["N"] / 1e6, "loss": row["loss"]} for row in grid(QUOKKA, Design(4, 5), 0.002)
    ]
    with pytest.raises(InputError, match="D looks like millions"):
        table(tmp_path, rows)


def test_one_objective_of_a_single_size_leaves_the_others_their_fits(tmp_path):
    rows = [{**row, "objective": "masked"} for row in grid(QUOKKA, Design(4, 5), 0.002)]
    rows += [
        {**rows[0], "objective": "autoregressive"},
        {**rows[0], "objective": "autoregressive", "D": 2 * rows[0]["D"], "C": 2 * rows[0]["C"]},
    ]
    found = fit_table(table(tmp_path, rows), 100, holdout=False)
    assert (
        "E" in found["objectives"]["masked"]["parametric"]
        and "refused" in found["objectives"]["autoregressive"]["parametric"]
    )


def test_budgets_do_not_grow_by_chains():
    frame = pd.DataFrame({"C": np.geomspace(1e18, 2e18, 40), "budget": np.nan, "N": 1e8, "D": 1e9, "loss": 3.0})
    spans = [np.ptp(cells_of("all", frame).ln_C[at]) for _, at in cells_of("all", frame).groups]
    assert max(spans) <= np.log(1.1) + 1e-9 and sum(span > 0 for span in spans) > 3


def test_rows_that_are_not_those_of_the_plan_are_not_fitted(tmp_path):
    rows = [{"cell": f"c{i}", **row} for i, row in enumerate(grid(QUOKKA, Design(4, 5), 0.002))]
    write(tmp_path / "results.csv", rows)
    cells = [{"id": row["cell"], "N": row["N"], "D": row["D"], "C": row["C"]} for row in rows]
    (tmp_path / "plan.json").write_text(json.dumps({"count": "total", "cells": cells}))
    assert read_table(str(tmp_path)).count == "total"
    cells[3]["N"] *= 2
    (tmp_path / "plan.json").write_text(json.dumps({"count": "total", "cells": cells}))
    with pytest.raises(InputError, match="cell c3 is not as plan.json has it"):
        read_table(str(tmp_path))
