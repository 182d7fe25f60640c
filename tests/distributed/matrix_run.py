"""Runs cells of the parity matrix on real ranks and measures how far each is from the float64 reference."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from tests.distributed import launch, matrix_case
from tests.distributed.matrix import Cell

# What is measured, and the largest relative error that counts as equal.
BOUNDS = {"loss": 1e-6, "norm": 1e-6, "gradient": 1e-5, "weight": 1e-5, "moment": 1e-5}
# float32 alone, in one process without any layout, is off by 1.2e-5 in one gradient of the first one's problem, and by 1.4e-6 in
# one norm of the other's.
ROUNDING = {"autoregressive": 2.0, "flow": 2.0}
START_SECONDS = 400  # imports of many ranks on few cores
NO_RESULT = "no result"


@dataclass
class Outcome:
    """One solved cell: the worst relative error of each measure, and everything that is wrong with it."""

    cell: Cell
    mutant: Optional[str] = None
    errors: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    hung: bool = False
    seconds: float = 0.0


def run_cells(
    cells: Sequence[tuple[Cell, str | None]],
    *,
    cell_seconds: float = 60,
    timeout_seconds: int = 60,
    heard: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Each (cell, mutant) on as many ranks as it names, one launch for all that need the same number.

    A cell that raises on a rank or takes longer than `cell_seconds` (hung) is recorded so; the launch is killed and another
    one goes on behind it. timeout_seconds: of the ranks' collectives. heard: told every outcome as it comes.
    """
    outcomes: dict[int, Outcome] = {}
    for world in sorted({cell.world for cell, _ in cells}):
        pending = [i for i, (cell, _) in enumerate(cells) if cell.world == world]
        while pending:
            with tempfile.TemporaryDirectory() as folder:
                solved = {}
                for index, outcome in _launch(cells, pending, world, Path(folder), cell_seconds, timeout_seconds):
                    solved[index] = outcome
                    heard(outcome)
            outcomes |= solved
            pending = [i for i in pending if i not in solved]
    return [outcomes[i] for i in range(len(cells))]


def _launch(
    cells: Sequence[tuple[Cell, str | None]],
    pending: list[int],
    world: int,
    folder: Path,
    cell_seconds: float,
    timeout_seconds: int,
) -> Iterator[tuple[int, Outcome]]:
    """Cells of one launch, in order, up to its end or to the first that fails."""
    listed = [_plain(i, *cells[i]) for i in pending]
    (folder / "cells.json").write_text(json.dumps({"cells": listed, "timeout_seconds": timeout_seconds}))
    ranks = launch.start("tests.distributed.matrix_worker", [str(folder)], world)
    try:
        started = _wait_for(folder, "ready", ranks, START_SECONDS)
        if started:
            raise RuntimeError(f"{world} ranks did not start: {started}")
        for index in pending:
            began = time.monotonic()
            said = _wait_for(folder, str(index), ranks, cell_seconds)
            outcome = Outcome(*cells[index], wrong=[said], hung=said.startswith(NO_RESULT))
            if not said:
                outcome = compare(*cells[index], _read(folder, index, world))
            outcome.seconds = time.monotonic() - began
            yield index, outcome
            if said:
                return
        _wait_for_end(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def _plain(index: int, cell: Cell, mutant: Optional[str]) -> dict[str, Any]:
    return {
        "index": index,
        "layout": asdict(cell.layout),
        "micro_batch": cell.micro_batch,
        "tied": cell.tied,
        "packed": cell.packed,
        "kind": cell.kind,
        "bf16": False,
        "mutant": mutant,
    }


def _wait_for(folder: Path, index: str, ranks: list, seconds: float) -> str:
    """Waits until every rank has written FOLDER/INDEX-RANK.pt: "", or how it failed."""
    deadline = time.monotonic() + seconds
    while not all((folder / f"{index}-{rank}.pt").exists() for rank in range(len(ranks))):
        if any(p.poll() is not None for p in ranks):
            time.sleep(0.5)  # a rank that raised is at once followed by peers that lost it: the first cause is on disk
            return _first_error(folder, index) or _last_words(folder, ranks)
        if time.monotonic() > deadline:
            return _first_error(folder, index) or f"{NO_RESULT} after {seconds:.0f} s"
        time.sleep(0.02)
    return ""


def _first_error(folder: Path, index: str) -> str:
    errors = sorted(folder.glob(f"{index}-*.error"), key=lambda path: path.stat().st_mtime_ns)
    return f"raised: {errors[0].read_text().strip()}" if errors else ""


def _last_words(folder: Path, ranks: list) -> str:
    """What the ranks said into their files and, of those that ended before they had one, to us; and what stopped their first cell
    before the others were there (a fault that cannot be planted any more).
    """
    codes = [p.poll() for p in ranks]
    said = [path.read_text()[-2000:] for path in sorted(folder.glob("*.error"))]
    said += [path.read_text()[-2000:] for path in sorted(folder.glob("said-*"))]
    said += [p.stdout.read()[-2000:] for p, code in zip(ranks, codes) if code is not None]
    return f"ended with exit codes {codes}: " + "\n".join(said)


def _wait_for_end(ranks: list) -> None:
    deadline = time.monotonic() + 30
    while any(p.poll() is None for p in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    codes = [p.poll() for p in ranks]
    assert codes == [0] * len(ranks), f"the ranks of a solved matrix ended with {codes}"


def _read(folder: Path, index: int, world: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{index}-{rank}.pt", weights_only=True) for rank in range(world)]


def compare(cell: Cell, mutant: Optional[str], found: list[dict[str, Any]]) -> Outcome:
    """What the ranks of one cell found, against the reference. found: as matrix_worker writes it, in rank order."""
    truth = matrix_case.truth(cell.tied, cell.packed, cell.kind)
    outcome = Outcome(cell, mutant)
    errors: dict[str, list[tuple[float, str]]] = {measure: [] for measure in BOUNDS}
    for step, (loss, norm) in enumerate(zip(truth.losses, truth.norms)):
        for rank, value in enumerate(_summed_losses(found, step)):
            errors["loss"].append((_off(value, loss), f"step {step}, rank {rank}: {value} for {loss}"))
        for rank, one in enumerate(found):
            value = one["norms"][step]
            errors["norm"].append((_off(value, norm), f"step {step}, rank {rank}: {value} for {norm}"))
            if not one["applied"][step]:
                outcome.wrong.append(f"step {step} was skipped by rank {rank}")
        held = [one["gradients"][step] for one in found]
        errors["gradient"] += _tensor_errors(held, truth.gradients[step], f"step {step}, ")
    state = _tensor_errors([one["state"] for one in found], truth.state, "")
    errors["weight"] = [(error, where) for error, where in state if where.startswith("weight/")]
    errors["moment"] = [(error, where) for error, where in state if not where.startswith("weight/")]
    for measure, bound in BOUNDS.items():
        bound *= ROUNDING.get(cell.kind, 1.0)
        worst, where = max(errors[measure], key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
        outcome.errors[measure] = worst
        if not worst <= bound:
            outcome.wrong.append(f"{measure} off by {worst:.1e}: {where}")
    outcome.wrong += _mask_faults(found, truth.masked)
    return outcome


def _off(value: float, truth: float) -> float:
    return abs(value - truth) / abs(truth)


def _summed_losses(found: list[dict[str, Any]], step: int) -> list[float]:
    """The global loss as every rank's (pp, tp) peers see it: summed over data-parallel ranks."""
    sums: dict[tuple[int, int], float] = {}
    for one in found:
        pp, _, tp = one["place"]
        sums[pp, tp] = sums.get((pp, tp), 0.0) + one["losses"][step]
    return list(sums.values())


def _tensor_errors(held: list[dict[str, list]], truth: dict[str, Tensor], where: str) -> list[tuple[float, str]]:
    """(relative error by norm, name) of every tensor: the worst of all copies of each element; inf where no rank has one."""
    errors = []
    for name in {name for one in held for name in one} - set(truth):
        errors.append((math.inf, f"{where}{name} is no tensor of the model"))
    for name, true in truth.items():
        worst = torch.full(true.shape, -1.0, dtype=torch.float64)
        for one in held:
            for offset, values in one.get(name, ()):
                place = tuple(slice(o, o + size) for o, size in zip(offset, values.shape))
                off = (values.double() - true[place]).abs()
                worst[place] = torch.maximum(worst[place], off)  # propagates NaN
        missing = int((worst < 0).sum())
        if missing:
            errors.append((math.inf, f"{name}: {where}{missing} elements are on no rank"))
        else:
            errors.append((float(worst.norm() / true.norm()), f"{name}{', ' + where if where else ''}".rstrip(", ")))
    return errors


def _mask_faults(found: list[dict[str, Any]], masked: Tensor) -> list[str]:
    """Ranks whose masks are not their slice of the reference's: pipeline and tensor peers then agree as well."""
    dp = 1 + max(one["place"][1] for one in found)
    shares = masked.chunk(dp, dim=1)
    return [
        f"rank {rank} drew other masks"
        for rank, one in enumerate(found)
        if not torch.equal(one["masked"], shares[one["place"][1]])
    ]
