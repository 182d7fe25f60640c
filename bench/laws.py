"""Do the intervals of `study fit` hold the truth? Planted laws, simulated studies, and how many intervals contain what was planted.

    python bench/laws.py [--trials 100] [--samples 500] [--jobs 2] [--only quokka] [--out FILE.json]

Every row is one law, one design (budgets x sizes, sizes up to `span` to each side of the optimum) and one noise of log loss. A
cell of the table: in how many of the trials the nominal 95 % interval held the truth; after the slash, for how many trials the
number was given where not for all (a refusal is no coverage and no miss). `!` marks fewer than 90 in 100.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before numpy is there: the trials are the parallel part
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from bench.tables import Table as Printed  # noqa: E402
from pretrain.study.fitting.fit import fit_table  # noqa: E402
from pretrain.study.fitting.laws import Cost, Surface, published  # noqa: E402
from pretrain.study.fitting.table import NUMERIC, TEXT, Table  # noqa: E402

COST = Cost()
LEAST = 0.9  # of the trials


@dataclass(frozen=True)
class Design:
    """budgets x sizes; C from low to high, sizes from optimum / span to optimum * span; `off`: the grid's centre is off by this
    factor."""

    budgets: int
    sizes: int
    low: float = 3e18
    high: float = 1e21
    span: float = 3.0
    off: float = 1.0

    def __str__(self) -> str:
        off = f", off {self.off:g}x" if self.off != 1 else ""
        return f"{self.budgets} x {self.sizes}, C x{self.high / self.low:.0f}, span {self.span:g}{off}"


CASES: list[tuple[str, Design, float]] = [
    ("quokka", Design(5, 6), 0.003),
    ("quokka", Design(5, 6), 0.005),
    ("quokka", Design(3, 4, high=1e20), 0.003),
    ("quokka", Design(3, 4, high=1e20), 0.005),
    ("chinchilla_again", Design(5, 6), 0.004),
    ("chinchilla_again", Design(3, 4, high=1e20), 0.004),
    ("chinchilla", Design(5, 6, span=4.0), 0.004),
    ("chinchilla", Design(4, 5, high=1e20, off=1.5), 0.004),
]


def label_of(case: tuple[str, Design, float]) -> str:
    return f"{case[0]}, {case[1]}, noise {case[2]:.1%}"


def cells(law: Surface, design: Design, noise: float, seed: int) -> Table:
    """A simulated study: the law's losses on the design's cells, with log-normal noise."""
    random = np.random.default_rng(seed)
    rows = []
    for C in np.geomspace(design.low, design.high, design.budgets):
        best = float(np.exp(law.optimum(np.log(C), COST)[0])) * design.off
        for N in best * np.geomspace(1 / design.span, design.span, design.sizes):
            rows.append({"N": N, "D": C / (6 * N), "C": C})
    frame = pd.DataFrame(rows)
    ln_loss = law.ln_loss(np.log(frame["N"].to_numpy()), np.log(frame["D"].to_numpy()))
    frame["loss"] = np.exp(ln_loss + noise * random.standard_normal(len(frame)))
    for name in NUMERIC:
        frame[name] = frame.get(name, np.nan)
    frame = frame.assign(**dict.fromkeys(TEXT, "") | {"objective": "all"})
    return Table(Path("planted.csv"), None, frame, [], len(frame), "as given", "6ND")


def truths(law: Surface, design: Design) -> dict[str, float]:
    """Every number of the law that a fit gives, by the key of `found`."""
    exponent, ln_coefficient = law.allocation(COST)
    E, ln_k, g = law.frontier(COST)
    true = {"E": law.E, "A": np.exp(law.ln_A), "B": np.exp(law.ln_B), "alpha": law.alpha, "beta": law.beta}
    for part in ("", "2:", "1:"):
        true |= {f"{part}N exp": exponent, f"{part}N coef": np.exp(ln_coefficient)}
    true |= {"f:E": E, "f:k": np.exp(ln_k), "f:g": g}
    for times in (1, 10, 100):
        ln_N, _, loss = law.optimum(np.log(design.high * times), COST)
        for part in ("", "2:", "1:"):
            true |= {f"{part}N {times}x": float(np.exp(ln_N)), f"{part}loss {times}x": float(loss)}
    ln_N, _, loss = law.optimum(np.log(design.low), COST)
    return true | {"2:N low": float(np.exp(ln_N)), "2:loss low": float(loss)}


def found(part: dict[str, Any], design: Design) -> dict[str, Any]:
    """The same numbers as a fit has them; a refused one is absent."""
    numbers: dict[str, Any] = {}
    for prefix, name in (("", "parametric"), ("2:", "isoflop"), ("1:", "envelope")):
        one = part[name]
        if "refused" in one:
            continue
        numbers |= {prefix + "N exp": one["N_exponent"], prefix + "N coef": one["N_coefficient"]}
        if name == "parametric":
            numbers |= {key: one[key] for key in ("E", "A", "B", "alpha", "beta")}
        if name == "isoflop" and "refused" not in one["budgets"][0]:
            numbers |= {"2:N low": one["budgets"][0]["N_opt"], "2:loss low": one["budgets"][0]["loss_opt"]}
        for p in part["predictions"]:
            times = round(p["C"] / design.high)
            if p["approach"] == name and times in (1, 10, 100) and abs(p["C"] / design.high / times - 1) < 1e-6:
                numbers |= {f"{prefix}N {times}x": p["N_opt"], f"{prefix}loss {times}x": p["loss"]}
    if part["frontier"].get("law", "").startswith("L = E"):
        numbers |= {"f:" + key: part["frontier"][key] for key in ("E", "k", "g")}
    return numbers


def trial(case: tuple[str, Design, float], seed: int, samples: int) -> dict[str, tuple[bool, float]]:
    """key -> (whether the interval holds the truth, its width relative to the truth)."""
    name, design, noise = case
    law = published(name)
    part = fit_table(cells(law, design, noise, seed), samples, seed, holdout=False)["objectives"]["all"]
    true = truths(law, design)
    return {key: _held(number, true[key]) for key, number in found(part, design).items()}


def _held(number: dict[str, Any], true: float) -> tuple[bool, float]:
    low = -np.inf if number["low"] is None else number["low"]
    high = np.inf if number["high"] is None else number["high"]
    return bool(low <= true <= high), float((high - low) / abs(true))


def coverage(
    case: tuple[str, Design, float], trials: list[dict[str, tuple[bool, float]]]
) -> dict[str, tuple[int, int, float]]:
    """key -> (intervals that hold the truth, trials that gave the number, median relative width)."""
    result = {}
    for key in truths(published(case[0]), case[1]):
        given = [t[key] for t in trials if key in t]
        width = float(np.median([w for _, w in given])) if given else float("nan")
        result[key] = (sum(hit for hit, _ in given), len(given), width)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose label contains this")
    parser.add_argument("--out", default="", help="file for the figures as JSON")
    values = parser.parse_args()
    cases = [case for case in CASES if values.only in label_of(case)]
    keys = list(truths(published("quokka"), Design(5, 6)))
    labels = [label_of(case) for case in cases]
    tables = []
    figures: dict[str, Any] = {}
    begun, low = time.perf_counter(), 0
    with ProcessPoolExecutor(values.jobs) as pool:
        for label, case in zip(labels, cases):
            first = 10_000 * CASES.index(case)  # no two rows share their noise
            seeds = range(first, first + values.trials)
            jobs = [pool.submit(trial, case, seed, values.samples) for seed in seeds]
            figures[label] = coverage(case, [job.result() for job in jobs])
            print(f"{label}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    for title, part in (
        ("parametric (approach 3)", ""),
        ("IsoFLOP (2)", "2:"),
        ("envelope (1)", "1:"),
        ("frontier, where E is in it", "f:"),
    ):
        own = [key for key in keys if key[:2] == part or (not part and key[1:2] != ":")]
        printed = Printed.planned(
            part or "3:",
            f"Intervals that hold the truth, of {values.trials}: {title}",
            tuple(k[len(part) :] for k in own),
            labels,
        )
        for label in labels:
            printed.fill(label, {key[len(part) :]: _cell(figures[label][key], values.trials) for key in own})
        tables.append(printed.markdown())
        low += sum(1 for label in labels for key in own if figures[label][key][0] < LEAST * figures[label][key][1])
    print("\n\n".join(tables))
    print(
        f"\nnumbers below {LEAST:.0%}: {low} of {len(labels) * len(keys)}; {time.perf_counter() - begun:.0f} s, "
        f"{values.jobs} processes"
    )
    if values.out:
        Path(values.out).write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if low else 0


def _cell(counted: tuple[int, int, float], trials: int) -> str:
    hits, given, _ = counted
    if not given:
        return "refused"
    return f"{hits}{f'/{given}' if given < trials else ''}{'!' if hits < LEAST * given else ''}"


if __name__ == "__main__":
    sys.exit(main())
