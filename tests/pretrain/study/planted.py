"""Tables of planted cells, as files and as `study fit` reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench.laws import Design
from pretrain.study.fitting.laws import Cost, Surface
from pretrain.study.fitting.table import Table, read_table

COST = Cost()


def grid(law: Surface, design: Design, noise: float = 0.0, seed: int = 0, cost: Cost = COST) -> list[dict[str, Any]]:
    """Cells of IsoFLOP budgets around the law's optima, with log-normal noise."""
    random = np.random.default_rng(seed)
    rows = []
    for C in np.geomspace(design.low, design.high, design.budgets):
        best = float(np.exp(law.optimum(np.log(C), cost)[0])) * design.off
        for N in best * np.geomspace(1 / design.span, design.span, design.sizes):
            D = float(np.exp(cost.ln_tokens(np.log(C), np.log(N))))
            rows.append(
                {"N": float(N), "D": D, "C": float(C), "loss": loss_of(law, N, D, noise * random.standard_normal())}
            )
    return rows


def loss_of(law: Surface, N: float, D: float, error: float = 0.0) -> float:
    """By the formula itself, with a relative error."""
    A, B = np.exp(law.ln_A), np.exp(law.ln_B)
    return float((law.E + A / N**law.alpha + B / D**law.beta) * np.exp(error))


def write(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    file.write_text("\n".join(lines) + "\n")
    return file


def table(folder: Path, rows: Iterable[dict[str, Any]]) -> Table:
    return read_table(str(write(folder / "cells.csv", rows)))
