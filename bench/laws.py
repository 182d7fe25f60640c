"""Do the intervals of `study fit` hold the truth? Planted laws, simulated studies, and how many intervals contain what was planted.

    python bench/laws.py [--trials 100] [--samples 400] [--jobs 2] [--only quokka] [--out FILE.json]

Every row is one law, one design (budgets x sizes, sizes up to `span` to each side of the optimum) and one noise of log loss; two
rows that are the objectives of one study have a row among the gaps too. A cell of the table: in how many of the trials the nominal
95 % interval held the truth; after the slash, for how many trials the number was given where not for all. A refusal is no coverage
and no miss, nor is an interval without ends. `!` marks fewer than 90 in 100 of those given. The last line counts the numbers that
were given, and apart from them those given in fewer than a quarter of the trials: such a number is there only where chance made it
extreme enough to be shown (E of a frontier that hardly bends), so its intervals cannot hold the truth as often.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before numpy is there: the trials are the parallel part
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from bench.laws_cases import (  # noqa: E402
    GAP,
    TIMES,
    Case,
    Design,
    Repeats,
    Study,
    found,
    found_gap,
    gap_label,
    names_of,
    simulated,
    truths,
)
from bench.tables import Table as Printed  # noqa: E402
from pretrain.study.fitting.fit import fit_table  # noqa: E402
from pretrain.study.fitting.laws import Cost  # noqa: E402

LEAST = 0.9  # of the trials that gave a number
SELDOM = 0.25  # of the trials: what is given less often is picked by chance
ATTENTION = Cost(float(np.log(15.0)), 0.95)  # C / (6 N D) from 1.08 at 8e7 parameters to 0.9 at 3e9, as a power of N
SMALL = Design(3, 4, high=1e20)
FEW = Repeats(unique=(1e9, 3e9), sizes=(1e8, 5e8))
OPTIMA = Design(5, 1, 6e18, 1e20, span=1.01)

STUDIES: list[Study] = [
    (Case("chinchilla_again", Design(5, 6), 0.004), Case("quokka", Design(5, 6), 0.003)),
    (Case("chinchilla", Design(5, 6, span=4.0), 0.004), Case("quokka", Design(5, 6), 0.005)),
    (Case("chinchilla_again", SMALL, 0.004), Case("quokka", SMALL, 0.003)),
    (Case("quokka", SMALL, 0.005, repeats=FEW),),
    (
        Case("chinchilla", Design(4, 5, high=1e20, off=1.5), 0.004, repeats=Repeats()),
        Case("chinchilla slowed 16x", Design(4, 5, high=1e20), 0.004, ATTENTION),
    ),
    (Case("quokka", Design(3, 4, high=3e18 * 10**0.5), 0.01),),
    (Case("chinchilla", OPTIMA, 0.003), Case("chinchilla slowed 16x", OPTIMA, 0.003)),
]
Held = dict[str, tuple[bool, float]]  # key -> (whether the interval holds the truth, its width relative to the truth)
Counts = dict[
    str, tuple[int, int, float]
]  # key -> (that hold the truth, trials that gave the number, median relative width)


def rows_of(study: Study) -> dict[str, tuple[str, ...]]:
    """label -> keys that a fit may give: each objective's, and those of the gap between two."""
    rows = {case.label: tuple(truths(case)) for case in study}
    return rows | ({gap_label(study): GAP} if len(study) == 2 else {})


def trial(study: Study, seed: int, samples: int) -> dict[str, Held]:
    """One simulated study: what its fit gives, by the labels of rows_of."""
    fit = fit_table(simulated(study, seed), samples, seed, holdout=False)
    pairs = {case.label: found(fit["objectives"][name], case) for name, case in zip(names_of(study), study)}
    if len(study) == 2:
        pairs[gap_label(study)] = found_gap(fit["gap"], study)
    held = {label: {key: _held(*pair) for key, pair in row.items()} for label, row in pairs.items()}
    return {label: {key: one for key, one in row.items() if one is not None} for label, row in held.items()}


def _held(number: dict[str, Any], true: float) -> tuple[bool, float] | None:
    """None for an interval that says nothing: from nothing, or zero, up without an end."""
    low = -np.inf if number["low"] is None else number["low"]
    high = np.inf if number["high"] is None else number["high"]
    if low <= 0 and high == np.inf:
        return None
    return bool(low <= true <= high), float((high - low) / max(abs(true), 1e-300))


def coverage(keys: tuple[str, ...], trials: list[Held]) -> Counts:
    """Counts over the trials of one row."""
    result = {}
    for key in keys:
        given = [t[key] for t in trials if key in t]
        width = float(np.median([w for _, w in given])) if given else float("nan")
        result[key] = (sum(hit for hit, _ in given), len(given), width)
    return result


def coverages(study: Study, trials: list[dict[str, Held]]) -> dict[str, Counts]:
    """label -> counts, for every row of a study."""
    return {label: coverage(keys, [t[label] for t in trials]) for label, keys in rows_of(study).items()}


def tables(figures: dict[str, Counts], trials: int) -> list[str]:
    """The tables as text: the laws and the predictions of each approach, the frontier, repeats, the gap."""
    far = tuple(f"{key} {times}x" for times in TIMES for key in ("N", "D", "loss"))
    law = ("N exp", "N coef", "D exp", "D coef")
    seen = tuple(f"{key} {at}" for at in ("low", "high") for key in ("N", "D", "loss"))
    five = ("E", "A", "B", "alpha", "beta")
    planned = (
        ("parametric (approach 3)", "", five + law),
        ("parametric (approach 3), predictions", "", far),
        ("IsoFLOP (2)", "2:", law + seen),
        ("IsoFLOP (2), predictions", "2:", far),
        ("envelope (1)", "1:", law),
        ("envelope (1), predictions", "1:", far),
        ("frontier, where E is in it", "f:", ("E", "k", "g")),
        ("repeated data", "r:", ("R*", *five)),
        ("compute gap", "", GAP),
    )
    texts = []
    for title, prefix, columns in planned:
        labels = [label for label, row in figures.items() if prefix + columns[0] in row]
        if not labels:
            continue
        title = f"Intervals that hold the truth, of {trials}: {title}"
        printed = Printed.planned(prefix or title, title, columns, labels)
        for label in labels:
            printed.fill(label, {key: _cell(figures[label][prefix + key], trials) for key in columns})
        texts.append(printed.markdown())
    return texts


def _cell(counted: tuple[int, int, float], trials: int) -> str:
    hits, given, _ = counted
    if not given:
        return "refused"
    return f"{hits}{f'/{given}' if given < trials else ''}{'!' if hits < LEAST * given else ''}"


def summary(figures: dict[str, Counts], trials: int) -> tuple[str, int]:
    """(the last line, how many of the numbers that are given often enough to judge miss the truth too often)."""
    counts = [(hits, given) for row in figures.values() for hits, given, _ in row.values()]
    often = [(hits, given) for hits, given in counts if given >= SELDOM * trials]
    seldom = [(hits, given) for hits, given in counts if 0 < given < SELDOM * trials]
    low, low_seldom = (sum(hits < LEAST * given for hits, given in some) for some in (often, seldom))
    text = f"{len(often) + len(seldom)} of {len(counts)} numbers given; held in fewer than {LEAST:.0%} of their trials: {low} of "
    text += f"{len(often)}, and {low_seldom} of the {len(seldom)} given in fewer than {SELDOM:.0%} of the trials"
    return text, low


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="studies with a row whose label contains this")
    parser.add_argument("--out", default="", help="file for the figures as JSON")
    values = parser.parse_args()
    figures: dict[str, Counts] = {}
    begun = time.perf_counter()
    with ProcessPoolExecutor(values.jobs) as pool:
        for number, study in enumerate(STUDIES):
            if not any(values.only in label for label in rows_of(study)):
                continue
            seeds = range(10_000 * number, 10_000 * number + values.trials)  # no two studies share their noise
            jobs = [pool.submit(trial, study, seed, values.samples) for seed in seeds]
            figures |= coverages(study, [job.result() for job in jobs])
            print(
                f"{' and '.join(c.label for c in study)}: {time.perf_counter() - begun:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    print("\n\n".join(tables(figures, values.trials)))
    text, low = summary(figures, values.trials)
    print(f"\n{text}; {time.perf_counter() - begun:.0f} s, {values.jobs} processes")
    if values.out:
        Path(values.out).write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
