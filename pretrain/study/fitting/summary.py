"""fit.json in a page of text: numbers with their intervals, refusals with their reasons, predictions with how far they reach."""

from __future__ import annotations

import math
from typing import Any, Optional

LAW = (("N_coefficient", "N_exponent", "N_opt"), ("D_coefficient", "D_exponent", "D_opt"))


def summary(fit: dict[str, Any]) -> str:
    """Lines for a terminal."""
    given = fit["input"]
    lines = [
        f"{given['path']}: {given['used']} of {given['rows']} cells; N counts {given['count']}, C in {given['flops']}"
    ]
    lines += [f"  note: {note}" for note in given["notes"]]
    lines += [f"  excluded: {row['cell'] or 'a cell'}: {row['reason']}" for row in given["excluded"][:20]]
    if len(given["excluded"]) > 20:
        lines.append(f"  excluded: {len(given['excluded']) - 20} more")
    for name, part in fit["objectives"].items():
        lines += ["", name if name != "all" else "all cells", *_objective(part)]
    if fit["gap"]:
        lines += ["", *_gap(fit["gap"])]
    level, samples = fit["bootstrap"]["level"], fit["bootstrap"]["samples"]
    return "\n".join(
        [*lines, "", f"(low to high): {level:.0%} intervals, {samples} refits, seed {fit['bootstrap']['seed']}"]
    )


def number(value: Optional[dict[str, Any]], digits: int = 4) -> str:
    """ "0.514 (0.49 to 0.54)"."""
    if value is None or value["value"] is None:
        return "none"
    ends = [_short(value[end], digits) if value[end] is not None else "no end" for end in ("low", "high")]
    return f"{_short(value['value'], digits)} ({ends[0]} to {ends[1]})"


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}g}" if math.isfinite(value) else "no end"


def _objective(part: dict[str, Any]) -> list[str]:
    lines = []
    law = part["parametric"]
    if "refused" in law:
        lines.append(f"  parametric   refused: {law['refused']}")
    else:
        lines.append("  parametric   L = E + A / N^alpha + B / D^beta")
        lines += [f"    {key:8s} {number(law[key])}" for key in ("E", "A", "B", "alpha", "beta")]
        lines += [f"    {line}" for line in _laws(law)]
        lines.append(f"    residuals {law['rms_log_residual']:.2%} rms, noise of a cell {law['noise']:.2%}")
        lines += [f"    note: {note}" for note in law.get("notes", [])]
    lines += _isoflop(part["isoflop"])
    envelope = part["envelope"]
    if "refused" in envelope:
        lines.append(f"  envelope     refused: {envelope['refused']}")
    else:
        lines += [
            f"  envelope     best cells of {len(envelope['points'])} budgets",
            *(f"    {line}" for line in _laws(envelope)),
        ]
    lines += _frontier(part["frontier"])
    if "data_constrained" in part:
        lines += _repeated(part["data_constrained"])
    lines += _holdout(part["leave_one_budget_out"])
    budgets = {budget["C"] for budget in part["isoflop"]["budgets"]}
    return lines + _predictions([p for p in part["predictions"] if p["C"] not in budgets])


def _laws(part: dict[str, Any]) -> list[str]:
    return [f"{name} = c C^e:  e {number(part[exponent])}  c {number(part[c], 3)}" for c, exponent, name in LAW]


def _isoflop(part: dict[str, Any]) -> list[str]:
    lines = (
        [f"  isoflop      refused: {part['refused']}"] if "refused" in part else ["  isoflop      parabolas in ln N"]
    )
    none = all("refused" in budget and "a parabola needs" in budget["refused"] for budget in part["budgets"])
    for budget in [] if none else part["budgets"]:  # then the line above has said it
        at = f"    C {budget['C']:.3g}  "
        if "refused" in budget:
            lines.append(f"{at}refused: {budget['refused']}")
        else:
            lines.append(
                f"{at}N_opt {number(budget['N_opt'], 3)}  D_opt {number(budget['D_opt'], 3)}  loss {number(budget['loss_opt'])}"
            )
    return lines + ([] if "refused" in part else [f"    {line}" for line in _laws(part)])


def _frontier(part: dict[str, Any]) -> list[str]:
    if "refused" in part:
        return [f"  frontier     refused: {part['refused']}"]
    numbers = "  ".join(f"{key} {number(part[key])}" for key in ("E", "k", "g") if key in part)
    return [f"  frontier     {part['law']} (through {part['through']}): {numbers}"] + (
        [f"    note: {part['note']}"] if "note" in part else []
    )


def _repeated(part: dict[str, Any]) -> list[str]:
    if "refused" in part:
        return [f"  repeats      refused: {part['refused']}"]
    lines = [
        f"  repeats      R* {number(part['R_star'], 3)} ({part['repeated_cells']} of {part['cells']} cells repeat their data)"
    ]
    return lines + ([f"    note: {part['note']}"] if "note" in part else [])


def _holdout(part: dict[str, Any]) -> list[str]:
    if "refused" in part:
        return [f"  left out     refused: {part['refused']}"]
    words = {"parametric": "optima, parametric", "isoflop": "optima, isoflop", "cells": "all cells, parametric"}
    rms = ", ".join(f"{words[name]} {error:.2%}" for name, error in part["rms_relative_error"].items())
    return [f"  left out     a budget left out is foreseen within (rms): {rms}"]


def _predictions(predictions: list[dict[str, Any]]) -> list[str]:
    lines = ["  predictions"] if predictions else []
    for p in predictions:
        reach = "inside" if p["extrapolation"] <= 1.0001 else f"{p['extrapolation']:.3g}x beyond the largest budget"
        numbers = f"N {number(p['N_opt'], 3)}  D {number(p['D_opt'], 3)}  loss {number(p['loss'])}"
        lines.append(f"    C {p['C']:<9.3g} {p['approach']:10s} {numbers}  {reach}")
    return lines


def _gap(gap: dict[str, Any]) -> list[str]:
    if "refused" in gap:
        return [f"gap          refused: {gap['refused']}"]
    words = f"{gap['to']} needs {number(gap['factor'], 3)} times the compute of {gap['from']}"
    lines = [f"gap          {words} ({gap['approach']}; {gap['note']})"]
    seen = gap["seen"]
    if seen["at_least"]:
        lines.append(f"    by the best cells alone: more than {seen['at_least']:.3g} times")
    if seen["at_most"]:
        lines.append(f"    by the best cells alone: less than {seen['at_most']:.3g} times")
    for at in gap["at"]:
        reach = "" if at["extrapolation"] <= 1.0001 else f"  {at['extrapolation']:.3g}x beyond the budgets"
        lines.append(f"    loss {at['loss']:.4g}: {number(at['factor'], 3)}{reach}")
    return lines
