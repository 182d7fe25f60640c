"""fit.json as `study fit` writes it, made from a planted law: cells with noise, parabolas fitted to them, the law's own optima."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

MASKED = {"E": 2.413, "A": 798.6, "B": 4604.9, "alpha": 0.379, "beta": 0.378}  # Quokka's
AUTOREGRESSIVE = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.336, "beta": 0.283}  # Chinchilla's
BUDGETS = (1e18, 4e18, 1.6e19, 6.4e19)


def estimate(value: float, width: float) -> dict[str, float]:
    """A number with an interval of `width` of its value to both sides."""
    return {"value": value, "low": value - width * abs(value), "high": value + width * abs(value)}


def loss_of(law: dict[str, float], N: Any, D: Any) -> Any:
    """Hoffmann et al., arXiv 2203.15556, equation 2."""
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]


def optimum(law: dict[str, float], C: float) -> tuple[float, float, float]:
    """(N, D, loss) of least loss at C = 6 N D (equation 4 there)."""
    a = law["beta"] / (law["alpha"] + law["beta"])
    g = (law["alpha"] * law["A"] / (law["beta"] * law["B"])) ** (1 / (law["alpha"] + law["beta"]))
    N, D = g * (C / 6) ** a, (C / 6) ** (1 - a) / g
    return N, D, float(loss_of(law, N, D))


def objective(law: dict[str, float], name: str, seed: int = 0, budgets=BUDGETS, sizes: int = 6) -> dict[str, Any]:
    """One objective's part of fit.json."""
    draw = np.random.default_rng(seed)
    rows, profiles = [], []
    for C in budgets:
        best = optimum(law, C)[0]
        points = []
        for N in best * np.geomspace(1 / 4, 4, sizes):
            D = C / (6 * N)
            loss = float(loss_of(law, N, D) * np.exp(draw.normal(0, 0.003)))
            points.append([float(N), float(D), loss])
            cell = f"{name}-{N / 1e6:.0f}M-{C:.0e}"
            rows.append({"cell": cell, "N": N, "D": D, "C": C, "loss": loss, "loss_se": 0.003 * loss, "budget": C})
            rows[-1] |= {"unique_tokens": None, "epochs": None}
        c2, c1, c0 = np.polyfit(np.log([p[0] for p in points]), [p[2] for p in points], 2)
        N_opt = float(np.exp(-c1 / (2 * c2)))
        profiles.append(
            {"C": C, "points": points, "parabola": [float(c0), float(c1), float(c2)], "N_opt": estimate(N_opt, 0.12)}
            | {"D_opt": estimate(C / (6 * N_opt), 0.12), "loss_opt": estimate(float(c0 - c1**2 / (4 * c2)), 0.004)}
        )
    logs = np.log(budgets)
    n_exponent, n_constant = np.polyfit(logs, np.log([p["N_opt"]["value"] for p in profiles]), 1)
    d_exponent, d_constant = np.polyfit(logs, np.log([p["D_opt"]["value"] for p in profiles]), 1)
    a = law["beta"] / (law["alpha"] + law["beta"])
    true_N, true_D, _ = optimum(law, 1.0)
    predictions = []
    for C in (*budgets, *(factor * budgets[-1] for factor in (3, 10, 30, 100))):
        N, D, loss = optimum(law, C)
        wide = 0.1 + 0.12 * max(0.0, float(np.log(C / budgets[-1])))
        for approach, shift in (("parametric", 1.0), ("isoflop", 1.08), ("envelope", 0.9)):
            predictions.append(
                {"C": C, "extrapolation": C / budgets[-1], "approach": approach, "N_opt": estimate(N * shift, wide)}
                | {"D_opt": estimate(D / shift, wide), "loss": estimate(loss, 0.05 * wide)}
            )
    law_of_optima = {
        "N_exponent": estimate(float(n_exponent), 0.08),
        "N_coefficient": estimate(np.exp(n_constant), 0.6),
    }
    law_of_optima |= {
        "D_exponent": estimate(float(d_exponent), 0.08),
        "D_coefficient": estimate(np.exp(d_constant), 0.6),
    }
    best_cells = [min((p for p in rows if p["budget"] == C), key=lambda p: p["loss"]) for C in budgets]
    left_out = [
        {"C": C, "predicted": optimum(law, C)[2] * 1.004, "measured": p["loss_opt"]["value"], "relative_error": 0.004}
        for C, p in zip(budgets, profiles)
    ]
    return {
        "rows": rows,
        "parametric": {key: estimate(value, 0.15) for key, value in law.items()}
        | {"N_exponent": estimate(a, 0.05), "N_coefficient": estimate(true_N, 0.5)}
        | {"D_exponent": estimate(1 - a, 0.05), "D_coefficient": estimate(true_D, 0.5)}
        | {"rms_log_residual": 0.003, "huber_delta": 0.001},
        "isoflop": {"budgets": profiles} | law_of_optima,
        "envelope": {"points": [[p["C"], p["N"], p["D"], p["loss"]] for p in best_cells]} | law_of_optima,
        "frontier": {"law": "L = E + k C^-g", "E": estimate(law["E"], 0.1), "k": estimate(400.0, 0.5)}
        | {"g": estimate(0.15, 0.2)},
        "leave_one_budget_out": {
            "parametric": left_out,
            "isoflop": left_out,
            "rms_relative_error": {"parametric": 0.004, "isoflop": 0.004},
        },
        "predictions": predictions,
    }


def fit(two: bool = True) -> dict[str, Any]:
    """A whole fit.json: masked, and autoregressive beside it unless `two` is False."""
    objectives = {"masked": objective(MASKED, "masked")}
    if two:
        objectives["autoregressive"] = objective(AUTOREGRESSIVE, "autoregressive", 1)
    excluded = {"cell": "masked-302M-1e18", "objective": "masked", "N": 302e6, "D": 5.5e8, "C": 1e18, "loss": None}
    excluded |= {"reason": "diverged: the loss was above the unigram entropy"}
    used = sum(len(o["rows"]) for o in objectives.values())
    levels = [
        {"loss": loss, "C_from": 4e18, "factor": estimate(16, 0.3), "extrapolation": ratio} for loss, ratio in GAP
    ]
    return {
        "input": {"path": "runs/planted", "rows": used + 1, "used": used, "count": "non_embedding", "flops": "6n"}
        | {"excluded": [excluded], "notes": ["C was not in the file: C = 6 N D"]},
        "bootstrap": {"samples": 1000, "seed": 0, "level": 0.95, "method": "residuals, refitted"},
        "objectives": objectives,
        "gap": {"from": "autoregressive", "to": "masked", "at": levels, "factor": estimate(16, 0.25)} if two else None,
        **{key: objectives["masked"][key] for key in ("parametric", "isoflop", "envelope", "frontier", "predictions")},
        "leave_one_budget_out": objectives["masked"]["leave_one_budget_out"],
    }


GAP = ((3.6, 1.0), (3.4, 1.0), (3.2, 1.7))


def refuse(part: Any, reason: str = "no interior minimum: the loss still falls towards larger N") -> dict[str, str]:
    """What stands in place of a part that cannot be had."""
    return {"refused": reason}


def write(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fit.json").write_text(json.dumps(content))
    return folder / "fit.json"
