"""What `study fit` found, as the report reads it: numbers with intervals, and parts that were refused with their reason."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from data.errors import InputError
from pretrain.study.fitting.digest import digest_of

APPROACHES = {
    "isoflop": "IsoFLOP parabolas",
    "parametric": "parametric law",
    "envelope": "envelope of the best cells",
}
# What leaving a budget out is scored by: the loss at its optimum by these approaches, and the losses of all its cells.
LEFT_OUT = {
    "isoflop": "optima by IsoFLOP parabolas",
    "parametric": "optima by the parametric law",
    "cells": "all cells by the parametric law",
}


@dataclass(frozen=True)
class Number:
    """An estimate and its 95 % interval; an end that is None is not bounded (or not known)."""

    value: float
    low: Optional[float] = None
    high: Optional[float] = None

    def holds(self, truth: float) -> bool:
        """Whether the interval contains `truth`; an end that is not bounded excludes nothing."""
        return (self.low is None or self.low <= truth) and (self.high is None or truth <= self.high)


@dataclass(frozen=True)
class Row:
    """One cell that was fitted. N in parameters, D in tokens, C in FLOPs, loss in nats per token; what is not known is None."""

    cell: str
    N: float
    D: float
    C: float
    loss: float
    loss_se: Optional[float] = None
    budget: Optional[float] = None
    unique_tokens: Optional[float] = None
    epochs: Optional[float] = None


@dataclass(frozen=True)
class Prediction:
    """The optimum that one approach sees at C FLOPs; C is `extrapolation` times the largest that was fitted."""

    C: float
    extrapolation: float
    approach: str
    N_opt: Optional[Number]
    D_opt: Optional[Number]
    loss: Optional[Number]


@dataclass
class Objective:
    """All fits of one objective; a part is a dictionary of fit.json, or {"refused": reason}."""

    name: str
    rows: list[Row]
    parts: dict[str, dict[str, Any]]
    predictions: list[Prediction]

    def part(self, name: str) -> dict[str, Any]:
        """The part, or {} where it was refused."""
        return {} if self.refused(name) else self.parts[name]

    def refused(self, name: str) -> str:
        """Why there is no such part; "" if there is."""
        part = self.parts.get(name)
        return "it is not in the fit" if not part else str(part.get("refused") or "")

    def number(self, part: str, key: str) -> Optional[Number]:
        return number(self.part(part).get(key))

    @property
    def fresh(self) -> list[Row]:
        """The cells that saw their tokens once: what all laws but that of repeated data are fitted to (all, where none did)."""
        return [row for row in self.rows if (row.epochs or 1.0) <= 1.0 + 1e-6] or self.rows

    def budgets(self) -> list[float]:
        """The budgets of the cells, rising, in FLOPs; those of the IsoFLOP part where it has them."""
        found = [b["C"] for b in self.profiles()] or [r.budget for r in self.rows if r.budget]
        return sorted(set(found))

    def profiles(self) -> list[dict[str, Any]]:
        """The IsoFLOP profiles by compute: they are there also where too few have a minimum for laws in C."""
        found = self.parts.get("isoflop", {}).get("budgets") or []
        return sorted(found, key=lambda b: b["C"])

    def predicted(self, approach: str) -> list[Prediction]:
        return sorted((p for p in self.predictions if p.approach == approach), key=lambda p: p.C)


@dataclass
class Fit:
    """fit.json as a whole."""

    path: Path
    raw: dict[str, Any]
    objectives: dict[str, Objective]
    study: Optional[Path] = None  # the study's folder, where there is one
    plan: dict[str, Any] = field(default_factory=dict)  # its plan.json

    @property
    def name(self) -> str:
        return self.study.resolve().name if self.study else self.path.resolve().stem

    @property
    def count(self) -> str:
        return str(self.raw["input"].get("count") or self.plan.get("count") or "not said")

    @property
    def flops(self) -> str:
        return str(self.raw["input"].get("flops") or self.plan.get("flops") or "not said")

    @property
    def first(self) -> Objective:
        """The objective that the recommendation is for: masked diffusion where the study has it."""
        return self.objectives.get("masked") or next(iter(self.objectives.values()))


def number(value: Any) -> Optional[Number]:
    """A number of fit.json, with or without an interval; None for a refused or missing one."""
    if isinstance(value, dict):
        middle = _finite(value.get("value"))
        return None if middle is None else Number(middle, _finite(value.get("low")), _finite(value.get("high")))
    middle = _finite(value)
    return None if middle is None else Number(middle)


def _finite(value: Any) -> Optional[float]:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def read_fit(path: str) -> Fit:
    """A study's folder that holds fit.json, or such a file. InputError with one line for anything else, and for a study whose
    results have changed since."""
    place = Path(path)
    file = place / "fit.json" if place.is_dir() else place
    if not file.is_file():
        raise InputError(
            f"study report: there is no {file}: run `python -m pretrain study fit {path}` first, or name a fit.json"
        )
    study = file.parent if place.is_dir() or (file.parent / "plan.json").is_file() else None
    raw = _json(file)
    try:
        objectives = {
            str(name): _objective(str(name), content, file) for name, content in dict(raw["objectives"]).items()
        }
        dict(raw["input"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"study report: {file} is not what `study fit` writes ({type(error).__name__}: {error}): fit again"
        ) from None
    if study and (digest := raw["input"].get("digest")):  # it is a fit of a study's results
        results = file.parent / "results.csv"
        if digest_of(results) not in ("", digest):
            raise InputError(
                f"study report: {results} has other cells than when {file.name} was made: run `python -m pretrain study fit "
                f"{study}{'' if file.name == 'fit.json' else f' --json {file}'}` again"
            )
    if not objectives:
        raise InputError(f"study report: {file} holds no objective: there was nothing to fit")
    plan = _json(study / "plan.json") if study and (study / "plan.json").is_file() else {}
    return Fit(file, raw, objectives, study, plan)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"study report: {file} cannot be read as JSON ({error}): run `study fit` again") from None
    if not isinstance(found, dict):
        raise InputError(f"study report: {file} holds no JSON object: run `study fit` again")
    return found


def _objective(name: str, content: dict[str, Any], file: Path) -> Objective:
    rows = [_row(row) for row in content["rows"]]
    if not rows or any(min(r.N, r.D, r.C, r.loss) <= 0 for r in rows):
        raise ValueError(f"objective {name}: rows need N, D, C and loss above 0")
    raw = content.get("predictions") or []
    predictions = [_prediction(p) for p in raw] if isinstance(raw, list) else []
    parts = {
        key: part if isinstance(part, dict) else {"list": part} for key, part in content.items() if part is not None
    }
    return Objective(name, rows, parts, predictions)


def _row(row: dict[str, Any]) -> Row:
    optional = {key: _finite(_blank(row.get(key))) for key in ("loss_se", "budget", "unique_tokens", "epochs")}
    N, D, C, loss = (float(row[key]) for key in ("N", "D", "C", "loss"))
    if not all(math.isfinite(value) for value in (N, D, C, loss)):
        raise ValueError(f"row {row.get('cell')}: a value is not finite")
    return Row(str(row.get("cell") or ""), N, D, C, loss, **optional)


def _blank(value: Any) -> Any:
    return None if value == "" else value


def _prediction(p: dict[str, Any]) -> Prediction:
    found = {key: number(p.get(key)) for key in ("N_opt", "D_opt", "loss")}
    return Prediction(float(p["C"]), float(p["extrapolation"]), str(p["approach"]), **found)
