"""python -m tests.distributed.parity_table [--every N]: runs the whole parity matrix with all planted faults and writes
docs/parity.md; with N > 1 only every N-th planted fault, and the page stays as it is.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version

from tests.distributed import launch
from tests.distributed.matrix import CELLS
from tests.distributed.matrix_faults import MUTANTS, all_faults, list_mutants
from tests.distributed.matrix_run import BOUNDS, ROUNDING, Outcome, run_cells

PAGE = launch.ROOT / "docs" / "parity.md"


def cell_table(outcomes: Sequence[Outcome]) -> str:
    """The worst relative errors of every cell, as a markdown table."""
    heads = ["cell", "ranks", *BOUNDS, "seconds", ""]
    rows = [
        [
            outcome.cell.name,
            str(outcome.cell.world),
            *(f"{outcome.errors[m]:.0e}" if m in outcome.errors else "-" for m in BOUNDS),
            f"{outcome.seconds:.1f}",
            f"**{short(outcome.wrong[0])}**" if outcome.wrong else "equal",
        ]
        for outcome in outcomes
    ]
    return _table(heads, rows)


def fault_table(outcomes: Sequence[Outcome]) -> str:
    """What caught every planted fault, as a markdown table."""
    rows = [
        [
            MUTANTS[str(outcome.mutant)].what,
            outcome.cell.name,
            short(outcome.wrong[0]) if outcome.wrong else "**survived**",
        ]
        for outcome in outcomes
    ]
    return _table(["fault", "cell", "caught by"], rows)


def short(wrong: str) -> str:
    """One line of at most 120 characters: of a traceback its last line."""
    line = wrong.strip().splitlines()[-1].replace("|", "/")
    line = f"raised {line}" if wrong.startswith("raised") else line
    return line if len(line) <= 120 else line[:117] + "..."


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(cells: Sequence[Outcome], faults: Sequence[Outcome]) -> str:
    """The text of docs/parity.md."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "megatron-core"))
    bounds = ", ".join(f"{measure} {bound:.0e}" for measure, bound in BOUNDS.items())
    return f"""# Parity

Every legal kind of layout trains like one dense process in float64. `make parity` writes this page ({platform.machine()}
CPU ranks over gloo, fp32; {versions}).

Each cell takes three AdamW steps (two of them clipped) on a five-layer model with padded samples, samples of two isolated
documents, and a step in which whole ranks have no masked token. The columns are the worst relative error of any step, rank
and tensor: the loss, the gradient norm, every gradient after the engine reduced it (by norm), every weight and both Adam
moments of the end. Allowed: {bounds}; twice as much for {", ".join(ROUNDING)},
whose problems are off by more than that in float32 alone, in one process.

A legal layout belongs to a class (engine, schedule, tensor mode) and uses features (see `parallel/equivalence.py`); a test
shows that each has a cell here. In a name: z0 to z3 are DeepSpeed's ZeRO stages; pp, dp, tp, sp (tensor with sequence
parallelism) are sizes; xN is the number of microbatches; packed: several isolated documents in every sample; an objective's
name: its batches, attention and loss (`shift`: predictions of the next token, three tokens ahead seen, answers counted alike).

{cell_table(cells)}

## Planted faults

Each fault breaks the product inside the ranks by one patch. All must be caught: by wrong numbers, an error, or a bounded hang.

{fault_table(faults)}
"""


def _say(outcome: Outcome) -> None:
    """A line of progress."""
    what = f"{outcome.mutant} in {outcome.cell.name}" if outcome.mutant else outcome.cell.name
    print(f"{outcome.cell.world} ranks, {outcome.seconds:5.1f} s: {what}: ", end="")
    print(short(outcome.wrong[0]) if outcome.wrong else "equal", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1)
    every = max(parser.parse_args().every, 1)
    list_mutants()
    cells = run_cells([(cell, None) for cell in CELLS], heard=_say)
    print(cell_table(cells), flush=True)
    faults = run_cells(all_faults(CELLS)[::every], heard=_say)
    print(fault_table(faults), flush=True)
    if every == 1:
        PAGE.write_text(page(cells, faults))
    broken = [outcome.cell.name for outcome in cells if outcome.wrong]
    survived = [
        f"{outcome.mutant} in {outcome.cell.name}"
        for outcome in faults
        if not outcome.wrong or (outcome.hung and not MUTANTS[str(outcome.mutant)].hangs)
    ]
    for line in (*broken, *survived):
        print(f"NOT PROVEN: {line}")
    return 1 if broken or survived else 0


if __name__ == "__main__":
    sys.exit(main())
