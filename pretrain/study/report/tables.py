"""The report's tables: HTML of what fit.json holds, every estimate with its interval, every refused part with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, Optional

from pretrain.study.report.fit_file import APPROACHES, LEFT_OUT, Fit, Objective, Row, number
from pretrain.study.report.numbers import count, data, flops, html, percent, show, significant

LAW = ("N_exponent", "N_coefficient", "D_exponent", "D_coefficient")
_LAW_NAMES = {
    "N_exponent": "exponent of C in the optimal N",
    "N_coefficient": "coefficient of the optimal N",
    "D_exponent": "exponent of C in the optimal D",
    "D_coefficient": "coefficient of the optimal D",
}
_UNLISTED = {"refused", "form", "law", "note", "notes", "budgets", "huber_delta", "rms_log_residual", *LAW}
_SPELT = {
    "noise": "noise of one cell, in ln(loss)",
    "R_star": "R*, repetitions after which a token is worth 1/e of a fresh one",
    "repeated_cells": "cells with repeated data",
}


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """head and rows: HTML. The first column names its row."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    below = f'<p class="note">{note}</p>' if note else ""
    return (
        f'<div class="table"><table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
        f"{below}</div>"
    )


def refused(title: str, reason: str) -> str:
    """What stands in the place of a figure or table that cannot be had."""
    return f'<div class="refused" role="note"><strong>{escape(title)}: refused.</strong> {html(reason)}</div>'


def losses(objective: Objective) -> str:
    """Losses with standard errors: sizes down, budgets (for a ladder, tokens) across; a list where few sizes meet many budgets."""
    by_budget = all(row.budget for row in objective.rows)
    across = sorted({_column(row, by_budget) for row in objective.rows})
    down = sorted({_rounded(row.N) for row in objective.rows})
    cells: dict[tuple[float, float], list[Row]] = {}
    for row in objective.rows:
        cells.setdefault((_rounded(row.N), _column(row, by_budget)), []).append(row)
    repeats = any((row.epochs or 1.0) > 1.0 for row in objective.rows)
    if repeats or len(cells) < len(across) * len(down) / 2 or len(across) > 8:
        return _listed(objective)
    named = flops if by_budget else (lambda D: html(count(D)))
    unit = "FLOPs" if by_budget else "tokens"
    rows = [
        [html(count(N)), *("<br>".join(_loss(row) for row in cells.get((N, C), [])) or "–" for C in across)]
        for N in down
    ]
    head = ["N", *(f"{named(C)} {unit}" for C in across)]
    return table(
        "Validation loss, nats per token, by size and " + ("budget" if by_budget else "tokens"),
        head,
        rows,
        _errors(objective),
    )


def _listed(objective: Objective) -> str:
    repeats = any((row.epochs or 1.0) > 1.0 for row in objective.rows)
    rows = []
    for r in sorted(objective.rows, key=lambda r: (r.C, r.N, r.D)):
        epochs = [data(r.epochs, significant(r.epochs, 3)) if r.epochs else "–"] if repeats else []
        rows.append(
            [escape(r.cell) or "cell", data(r.N, count(r.N)), data(r.D, count(r.D)), *epochs, flops(r.C), _loss(r)]
        )
    head = ["cell", "N", "D (tokens)", *(["epochs"] if repeats else []), "C (FLOPs)", "loss (nats per token)"]
    return table("Validation loss of every cell", head, rows, _errors(objective))


def _errors(objective: Objective) -> str:
    if any(row.loss_se for row in objective.rows):
        return "± one standard error of the validation set's loss; the spread between seeds is not in it."
    return "The file gives no standard errors of the losses."


def _loss(row: Row) -> str:
    shown = data(row.loss, f"{row.loss:.4f}")
    return f"{shown} ± {row.loss_se:.4f}" if row.loss_se else shown


def _column(row: Row, by_budget: bool) -> float:
    return _rounded(row.budget if by_budget and row.budget else row.D)


def _rounded(value: float) -> float:
    """Values that differ by rounding alone are one row or column."""
    return float(f"{value:.3g}")


def optimum_laws(objective: Objective) -> str:
    """Exponents and coefficients of N_opt(C) and D_opt(C) by approach."""
    rows = []
    for approach, name in APPROACHES.items():
        if reason := objective.refused(approach):
            rows.append([name, f'<span class="reason">refused: {html(reason)}</span>', "", "", ""])
        else:
            rows.append([name, *(_estimate(objective.part(approach).get(key)) for key in LAW)])
    head = ["approach", *(_LAW_NAMES[key] for key in LAW)]
    return table(
        "The optimum as a power law of compute",
        head,
        rows,
        "Value and 95 % interval; N and D = coefficient × C<sup>exponent</sup>.",
    )


def _estimate(value: Any) -> str:
    if isinstance(value, dict) and value.get("refused"):
        return f'<span class="reason">refused: {html(str(value["refused"]))}</span>'
    if isinstance(value, int):
        return data(value, str(value))
    return show(number(value))


def numbers_of(objective: Objective, part: str, title: str) -> str:
    """Every number of one part (E, A, B, ... ; k, g; those of the data-constrained form), or why it was refused."""
    if reason := objective.refused(part):
        return refused(title, reason)
    content = objective.part(part)
    rows = [
        [_SPELT.get(key, escape(key)), _estimate(value)]
        for key, value in content.items()
        if key not in _UNLISTED and _is_estimate(value)
    ]
    law = content.get("law") or content.get("form")
    note = [html(f"{'Law' if content.get('law') else 'Form'}: {law}.")] if law else []
    note += [f"{html(str(content['note']))}."] if content.get("note") else []
    rms = number(content.get("rms_log_residual"))
    note += (
        [f"Root mean square of the residuals of ln(loss): {data(rms.value, significant(rms.value, 2))}."] if rms else []
    )
    return table(title, ["parameter", "value (95 % interval)"], rows, " ".join(note)) if rows else ""


def _is_estimate(value: Any) -> bool:
    return number(value) is not None or (isinstance(value, dict) and bool(value.get("refused")))


def minima(objective: Objective) -> str:
    """The parabola's minimum of each budget, or why it has none."""
    rows = []
    for budget in objective.profiles():
        name = flops(budget["C"])
        if budget.get("refused"):
            rows.append([name, f'<span class="reason">refused: {html(str(budget["refused"]))}</span>', "", "", ""])
            continue
        N, D = number(budget.get("N_opt")), number(budget.get("D_opt"))
        ratio = significant(D.value / N.value, 3) if N and D else "–"
        rows.append([name, show(N, "count"), show(D, "count"), ratio, show(number(budget.get("loss_opt")))])
    if not rows:
        return ""
    head = ["compute (FLOPs)", "N", "D (tokens)", "tokens per parameter", "loss"]
    return table("Least loss of each budget by its parabola", head, rows)


def holdout(objective: Objective) -> str:
    """Each budget predicted from the others."""
    title = "Leaving one budget out"
    if reason := objective.refused("leave_one_budget_out"):
        return refused(title, reason)
    part, rows = objective.part("leave_one_budget_out"), []
    for approach, name in APPROACHES.items():
        entries = part.get(approach)
        if isinstance(entries, dict):
            rows.append([name, f'<span class="reason">refused: {html(str(entries.get("refused")))}</span>', "", "", ""])
            continue
        for entry in entries or []:
            if entry.get("refused"):
                rows.append(
                    [
                        name,
                        flops(entry["C"]),
                        f'<span class="reason">refused: {html(str(entry["refused"]))}</span>',
                        "",
                        "",
                    ]
                )
                continue
            off = number(entry.get("relative_error"))
            shown = data(off.value, f"{100 * off.value:+.2f} %") if off else "–"
            rows.append(
                [name, flops(entry["C"]), _estimate(entry.get("predicted")), _estimate(entry.get("measured")), shown]
            )
    for entry in part.get("cells") or []:
        words = f"the losses of its {entry['cells']} cells, by the parametric law"
        shown = data(entry["rms_relative_error"], percent(entry["rms_relative_error"]))
        rows.append([words, flops(entry["C"]), "", "", f"{shown} rms"])
    if not rows:
        return ""
    rms = {a: n for a, v in (part.get("rms_relative_error") or {}).items() if (n := number(v))}
    note = "; ".join(f"{LEFT_OUT.get(a, escape(a))}: {data(n.value, percent(n.value))}" for a, n in rms.items())
    head = ["approach", "budget left out (FLOPs)", "predicted loss", "measured", "error"]
    return table(title, head, rows, f"Root mean square error: {note}." if note else "")


def predictions(objective: Objective) -> str:
    """Every predicted optimum with how far it extrapolates."""
    if not objective.predictions:
        return refused("Predictions", objective.refused("predictions") or "no approach could predict")
    rows = [
        [
            flops(p.C),
            _times(p.extrapolation),
            APPROACHES.get(p.approach, escape(p.approach)),
        ]
        + [show(p.N_opt, "count"), show(p.D_opt, "count"), show(p.loss)]
        for p in sorted(objective.predictions, key=lambda p: p.C)
    ]
    head = ["compute (FLOPs)", "extrapolation", "approach", "N", "D (tokens)", "loss"]
    return table(
        "Predicted optima", head, rows, "Extrapolation: compute over the largest that was fitted; 95 % intervals."
    )


def _times(factor: float) -> str:
    return f"{factor:.3g}×" if factor > 1.0001 else "none"


def excluded(fit: Fit) -> str:
    """The cells that were not fitted, with their reasons."""
    cells = fit.raw["input"].get("excluded") or []
    if not cells:
        return "<p>No cell was left out.</p>"
    rows = []
    for cell in cells:
        sizes = [_given(cell.get(key)) for key in ("N", "D")]
        rows.append([escape(str(cell.get("cell") or "cell")), escape(str(cell.get("objective") or "–")), *sizes])
        rows[-1] += [
            _flops(cell.get("C")),
            _given_loss(cell.get("loss")),
            html(str(cell.get("reason") or "no reason given")),
        ]
    return table(
        "Cells that were not fitted", ["cell", "objective", "N", "D (tokens)", "C (FLOPs)", "loss", "reason"], rows
    )


def _given(value: Any) -> str:
    found = _float(value)
    return data(found, count(found)) if found else "–"


def _given_loss(value: Any) -> str:
    found = _float(value)
    return data(found, f"{found:.4f}") if found is not None else "–"


def _flops(value: Any) -> str:
    found = _float(value)
    return flops(found) if found else "–"


def _float(value: Any) -> Optional[float]:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def gap(fit: Fit) -> str:
    """The compute factor between two objectives by loss."""
    content = fit.raw.get("gap")
    if not content or content.get("refused"):
        return ""
    source, target = escape(str(content.get("from"))), escape(str(content.get("to")))
    rows = [
        [data(float(p["loss"]), significant(float(p["loss"]), 4)), _from(p.get("C_from")), _estimate(p.get("factor"))]
        + [_times(float(p.get("extrapolation") or 1.0))]
        for p in content.get("at", [])
    ]
    head = ["loss (nats per token)", f"compute of {source} (FLOPs)", f"{target} needs, times as much", "extrapolation"]
    return table("Compute for equal loss", head, rows)


def _from(value: Any) -> str:
    found = number(value)
    return flops(found.value) if found else "–"
