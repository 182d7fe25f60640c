"""Simulated studies whose truth is known: planted laws, designs, and every number that a fit of them gives beside the true one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd

from pretrain.study.fitting.laws import PUBLISHED, Cost, Surface, effective_tokens
from pretrain.study.fitting.table import NUMERIC, TEXT, Table

R_STAR = 15.4  # of tokens, in repetitions (Muennighoff et al., arXiv 2305.16264)
TIMES = (1, 10, 100)  # predictions at so many times the largest budget
PREFIXES = (("", "parametric"), ("2:", "isoflop"), ("1:", "envelope"))
PAIR = ("autoregressive", "masked")
Pairs = dict[str, tuple[dict[str, Any], float]]  # key -> (the number as fit.json has it, the true value)


def slowed(law: Surface, factor: float) -> Surface:
    """The law of a training that needs `factor` times the compute for each loss: N and D are worth 1 / sqrt(factor) each."""
    shift = 0.5 * np.log(factor)
    return Surface(law.E, law.ln_A + law.alpha * shift, law.ln_B + law.beta * shift, law.alpha, law.beta)


LAWS = PUBLISHED | {"chinchilla slowed 16x": slowed(PUBLISHED["chinchilla"], 16)}


@dataclass(frozen=True)
class Design:
    """budgets x sizes; C from low to high, sizes from optimum / span to optimum * span; `off`: the grid's centre is off by this
    factor. One size: the cells are optima that somebody else found, `span` the scatter of their sizes."""

    budgets: int
    sizes: int
    low: float = 3e18
    high: float = 1e21
    span: float = 3.0
    off: float = 1.0

    def __str__(self) -> str:
        off = f", off {self.off:g}x" if self.off != 1 else ""
        return f"{self.budgets} x {self.sizes}, C x{self.high / self.low:.0f}, span {self.span:g}{off}"


@dataclass(frozen=True)
class Repeats:
    """Cells that saw their tokens again: each of `sizes` on each of `unique` tokens for each of `epochs`."""

    unique: tuple[float, ...] = (3e8, 1e9, 3e9)
    epochs: tuple[float, ...] = (2.0, 8.0, 40.0)
    sizes: tuple[float, ...] = (5e7, 2e8, 8e8)
    half: float = R_STAR


@dataclass(frozen=True)
class Case:
    """One objective of a simulated study. law: a key of LAWS; noise: of log loss, one deviation."""

    law: str
    design: Design
    noise: float
    cost: Cost = Cost()
    repeats: Optional[Repeats] = None

    @property
    def surface(self) -> Surface:
        return LAWS[self.law]

    @property
    def label(self) -> str:
        cost = f", C ~ N^{self.cost.power:g} D" if self.cost.power != 1 else ""
        return f"{self.law}, {self.design}{cost}, noise {self.noise:.1%}"


Study = tuple[Case, ...]  # one objective, or two: autoregressive and masked


def names_of(study: Study) -> tuple[str, ...]:
    return PAIR if len(study) == 2 else ("all",)


def gap_label(study: Study) -> str:
    one, other = study
    design = other.design
    cells = f"{design.budgets} x {design.sizes}, C x{design.high / design.low:.0f}"
    return f"{one.law} {one.noise:.1%} to {other.law} {other.noise:.1%}, {cells}"


def simulated(study: Study, seed: int) -> Table:
    """What `study fit` would read: the laws' losses on the designs' cells, with log-normal noise."""
    random = np.random.default_rng(seed)
    rows = [row | {"objective": name} for name, case in zip(names_of(study), study) for row in _cells(case, random)]
    frame = pd.DataFrame(rows)
    for name in NUMERIC:
        frame[name] = frame.get(name, np.nan)
    frame = frame.assign(**dict.fromkeys([name for name in TEXT if name != "objective"], ""))
    optima = all(case.design.sizes == 1 for case in study)
    return Table(Path("planted.csv"), None, frame, [], len(frame), "as given", "6ND", optima=optima)


def _cells(case: Case, random: np.random.Generator) -> Iterator[dict[str, float]]:
    law, design, cost = case.surface, case.design, case.cost

    def loss_of(ln_N: float, ln_worth: float) -> float:
        return float(np.exp(law.ln_loss(np.array([ln_N]), np.array([ln_worth]))[0] + case.noise * random.normal()))

    for ln_C in np.linspace(np.log(design.low), np.log(design.high), design.budgets):
        best = float(law.optimum(ln_C, cost)[0]) + np.log(design.off)
        grid = np.linspace(-1, 1, design.sizes) * np.log(design.span)
        if design.sizes == 1:
            grid = random.normal(size=1) * np.log(design.span)
        for ln_N in best + grid:
            ln_D = cost.ln_tokens(ln_C, ln_N)
            at = best if design.sizes == 1 else ln_N  # an optimum's loss, whatever error its size was read with
            yield {"N": np.exp(ln_N), "D": np.exp(ln_D), "C": np.exp(ln_C)} | {
                "loss": loss_of(at, cost.ln_tokens(ln_C, at))
            }
    again = case.repeats
    for U, epochs, N in [(u, e, n) for u in again.unique for e in again.epochs for n in again.sizes] if again else ():
        loss = loss_of(np.log(N), np.log(effective_tokens(U, epochs, again.half)))  # type: ignore[union-attr]
        C = np.exp(cost.ln_factor) * N**cost.power * U * epochs
        yield {"N": N, "D": U * epochs, "C": C, "loss": loss, "unique_tokens": U, "epochs": epochs}


def truths(case: Case) -> dict[str, float]:
    """Every number of the law that a fit of one objective may give, by the key of `found`: of optima, approach 1 alone."""
    law, cost = case.surface, case.cost
    own = {"E": law.E, "A": np.exp(law.ln_A), "B": np.exp(law.ln_B), "alpha": law.alpha, "beta": law.beta}
    exponent, ln_coefficient = law.allocation(cost)
    true = dict(own)
    for part, _ in PREFIXES:
        true |= {f"{part}N exp": exponent, f"{part}N coef": np.exp(ln_coefficient)}
        true |= {f"{part}D exp": 1 - cost.power * exponent}
        true |= {f"{part}D coef": np.exp(-cost.ln_factor - cost.power * ln_coefficient)}
        for times in TIMES:
            true |= _optimum(case, case.design.high * times, part, f"{times}x")
    true |= _optimum(case, case.design.low, "2:", "low") | _optimum(case, case.design.high, "2:", "high")
    E, ln_k, g = law.frontier(cost)
    true |= {"f:E": E, "f:k": np.exp(ln_k), "f:g": g}
    if case.repeats:
        true |= {"r:" + key: value for key, value in own.items()} | {"r:R*": case.repeats.half}
    return {key: float(value) for key, value in true.items() if case.design.sizes > 1 or key[:2] in ("1:", "f:")}


def _optimum(case: Case, C: float, part: str, at: str) -> dict[str, float]:
    ln_N, ln_D, loss = case.surface.optimum(np.log(C), case.cost)
    return {f"{part}N {at}": np.exp(ln_N), f"{part}D {at}": np.exp(ln_D), f"{part}loss {at}": loss}


def found(part: dict[str, Any], case: Case) -> Pairs:
    """The numbers of one objective's part of fit.json, each with its truth. A refused one is absent."""
    numbers: dict[str, Any] = {}
    for prefix, name in PREFIXES:
        one = part[name]
        if "refused" in one:
            continue
        for letter in "ND":
            numbers |= {f"{prefix}{letter} exp": one[f"{letter}_exponent"]}
            numbers |= {f"{prefix}{letter} coef": one[f"{letter}_coefficient"]}
        if name == "parametric":
            numbers |= {key: one[key] for key in ("E", "A", "B", "alpha", "beta")}
        for at, entry in (("low", 0), ("high", -1)) if name == "isoflop" else ():
            budget = one["budgets"][entry]
            if "refused" not in budget:
                numbers |= {f"2:{key} {at}": budget[f"{key}_opt"] for key in ("N", "D", "loss")}
        for p in part["predictions"]:
            times = round(p["C"] / case.design.high)
            if p["approach"] == name and times in TIMES and abs(p["C"] / case.design.high / times - 1) < 1e-6:
                three = zip(("N", "D", "loss"), (p["N_opt"], p["D_opt"], p["loss"]))
                numbers |= {f"{prefix}{key} {times}x": number for key, number in three}
    if part["frontier"].get("law", "").startswith("L = E"):
        numbers |= {"f:" + key: part["frontier"][key] for key in ("E", "k", "g")}
    repeated = part.get("data_constrained", {"refused": ""})
    if "refused" not in repeated:
        numbers |= {"r:" + key: repeated[key] for key in ("E", "A", "B", "alpha", "beta")}
        numbers |= {"r:R*": repeated["R_star"]}
    true = truths(case)
    return {key: (number, true[key]) for key, number in numbers.items()}


GAP = ("factor", "C_from", "C_to", "factor at the highest loss", "factor at the lowest loss")


def found_gap(gap: dict[str, Any], study: Study) -> Pairs:
    """The numbers of a gap, each with its truth at the loss it is given for. The ends: only where losses were seen of both."""
    if "refused" in gap:
        return {}
    levels = gap["at"]
    middle = next(at for at in levels if at["loss"] == gap["at_loss"])
    pairs = {"factor": _compute(middle, gap["factor"], study)[2]}
    pairs |= dict(zip(("C_from", "C_to"), _compute(middle, gap["factor"], study)))
    if len(levels) > 1:
        for name, at in zip(GAP[3:], (levels[0], levels[-1])):
            pairs[name] = _compute(at, at["factor"], study)[2]
    return pairs


def _compute(at: dict[str, Any], factor: dict[str, Any], study: Study) -> list[tuple[dict[str, Any], float]]:
    """C_from, C_to and the factor at one loss, each with its truth."""
    one, other = (float(case.surface.ln_compute(at["loss"], case.cost)) for case in study)
    return [(at["C_from"], np.exp(one)), (at["C_to"], np.exp(other)), (factor, np.exp(other - one))]
