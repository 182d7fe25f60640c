"""Whether the numbers of a table can be what their columns say: units, cells that occur twice, sizes that differ."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from data.errors import InputError

WORDS = {3: "thousands", 6: "millions", 9: "billions", 12: "trillions"}


def check_units(done: pd.DataFrame, where: str, given_C: bool) -> None:
    """InputError where N, D or C cannot be raw counts. A cell's FLOPs are 6 N D times at most about 30 (tiny models pay for the
    head and attention), so a factor of 1000 is a unit."""
    _one_column(done, "N", 1000, where)
    _one_column(done, "D", 100, where)
    per_parameter = done["D"] / done["N"]
    for wrong, name in ((per_parameter > 1e6, "N"), (per_parameter < 1e-2, "D")):
        if wrong.any():
            row = done[wrong].iloc[0]
            looks = f"{name} looks like millions or billions" if wrong.all() else "units are mixed up"
            raise InputError(
                f"{where} line {row['line']}: N is {row['N']:g} and D is {row['D']:g}: {looks}; give raw counts, as 84e6"
            )
    if not given_C:
        return
    ratio = (done["C"] / (6.0 * done["N"] * done["D"])).to_numpy(float)
    middle = float(np.median(ratio))
    if 1 / 30 < middle < 300:
        wrong = np.flatnonzero((ratio > 100 * middle) | (ratio < middle / 100))
        if len(wrong):
            line = done["line"].iloc[int(wrong[0])]
            raise InputError(
                f"{where} line {line}: C is {ratio[wrong[0]]:.3g} times 6 N D, in the other rows about {middle:.3g} times: "
                "its N, D or C is in another unit"
            )
        return
    power = 3 * round(math.log10(middle) / 3)
    if middle > 1:
        small = "N" if done["N"].median() < 1e6 or done["N"].median() * 10**power < done["D"].median() * 100 else "D"
        unit = WORDS.get(power, "another unit")
        raise InputError(
            f"{where}: C is about {middle:.2g} times 6 N D: {small} looks like {unit}; give raw counts and FLOPs"
        )
    raise InputError(
        f"{where}: C is about {middle:.2g} times 6 N D, less than any training costs: C looks like "
        f"{WORDS.get(-power, 'units of another size')} of FLOPs, or N and D are too large; give raw counts and FLOPs"
    )


def _one_column(done: pd.DataFrame, name: str, least: float, where: str) -> None:
    """No language model has fewer than `least` parameters or tokens; a column below that is in millions or billions."""
    values = done[name].to_numpy(float)
    small = np.flatnonzero(values < least)
    if not len(small):
        return
    if values.max() < 1e5:
        unit = "millions or billions" if values.max() >= 1 else "billions or trillions"
        if name == "N" and values.max() >= 20:
            unit = "millions"
        example = values[small[0]]
        raise InputError(f"{where}: {name} looks like {unit} (its first is {example:g}); give raw counts, as 84e6")
    at = int(small[0])
    raise InputError(
        f"{where} line {done['line'].iloc[at]}: {name} is {values[at]:g} beside {values.max():.3g} in other rows: units are mixed "
        "up; give raw counts, as 84e6"
    )


def check_cells(done: pd.DataFrame, where: str) -> None:
    """InputError for a cell that occurs twice without a repeat or seed that differs, and for an objective of one size."""
    keys = ["objective", "N", "D", "unique_tokens"] + [name for name in ("repeat", "seed") if name in done]
    again = done[done.duplicated(keys, keep="first")]
    if len(again):
        second = again.iloc[0]
        same = (done["objective"] == second["objective"]) & (done["N"] == second["N"]) & (done["D"] == second["D"])
        first = done[same].iloc[0]
        raise InputError(
            f"{where} line {second['line']}: the cell N = {second['N']:g}, D = {second['D']:g} is on line {first['line']} already; "
            "remove one, or add a column `repeat` or `seed` that tells them apart"
        )
    if (done.groupby("objective")["N"].nunique() == 1).all():  # of one objective alone: its parts are refused
        of = "of each objective " if done["objective"].nunique() > 1 else ""
        raise InputError(
            f"{where}: all cells {of}have N = {done['N'].iloc[0]:g}: one size says nothing of sizes; add others"
        )
