"""What a study costs, before anything runs: cells, tokens, FLOPs, and hours at a rate that is given or was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

from pretrain.quantities import count, duration
from pretrain.study.design.cells import Cell


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one rank (as the study counts FLOPs), where from, and beside that what was measured of each size."""

    flops: float
    source: str
    by_size: Mapping[str, float]

    def seconds(self, cell: Cell) -> float:
        """Wall-clock seconds of a cell."""
        return cell.C / (self.by_size.get(cell.size, self.flops) * cell.ranks)


def measured_rate(cells: Sequence[Cell], seconds: Mapping[str, float]) -> Optional[Rate]:
    """From cells that are done; None without any. seconds: cell -> what its steps took."""
    done = [cell for cell in cells if seconds.get(cell.id)]
    if not done:
        return None
    by_size: dict[str, list[float]] = {}
    for cell in done:
        by_size.setdefault(cell.size, []).append(cell.C / seconds[cell.id] / cell.ranks)
    total = sum(cell.C for cell in done) / sum(seconds[cell.id] * cell.ranks for cell in done)
    rates = {size: math.fsum(found) / len(found) for size, found in by_size.items()}
    return Rate(total, f"measured on {len(done)} cells", rates)


def table(cells: Sequence[Cell], rate: Optional[Rate]) -> list[str]:
    """A line a cell, sums by objective and budget, and the whole. Excluded cells cost nothing and say why."""
    width = max(len(cell.id) for cell in cells)
    lines = [
        f"{'cell':{width}}  {'N':>8} {'tokens':>8} {'tok/N':>7} {'FLOPs':>9} {'steps':>8} {'batch':>6} {'lr':>8}  time"
    ]
    for cell in cells:
        end = f"left out: {cell.reason}" if cell.status != "planned" else duration(rate.seconds(cell)) if rate else "-"
        lines.append(
            f"{cell.id:{width}}  {count(cell.N):>8} {count(cell.D):>8} {cell.D / cell.N:>7.3g} {cell.C:>9.2e} {cell.steps:>8} "
            f"{cell.batch:>6} {cell.lr:>8.2e}  {end}"
        )
    planned = [cell for cell in cells if cell.status == "planned"]
    lines.append("")
    groups: dict[tuple[str, Optional[float]], list[Cell]] = {}
    for cell in planned:
        groups.setdefault((cell.objective, cell.budget), []).append(cell)
    if len(groups) > 1:
        for (objective, budget), some in groups.items():
            lines.append(_sum(f"{objective}{f', {budget:.3g} FLOPs each' if budget else ''}", some, rate))
    lines.append(_sum("in all", planned, rate))
    if len(planned) < len(cells):
        lines.append(f"left out before they run: {len(cells) - len(planned)} cells")
    if rate:
        lines.append(f"time: of the steps alone, at {rate.flops:.3g} FLOP/s a rank ({rate.source})")
    else:
        lines.append("time: not known; give --flops-rate FLOP/s of a rank, or --gpu NAME and --mfu")
    return lines


def _sum(name: str, cells: Sequence[Cell], rate: Optional[Rate]) -> str:
    tokens, flops = sum(cell.D for cell in cells), math.fsum(cell.C for cell in cells)
    line = f"{name}: {len(cells)} cells, {count(tokens)} tokens, {flops:.3g} FLOPs"
    if rate:
        seconds = math.fsum(rate.seconds(cell) * cell.ranks for cell in cells)
        line += f", {seconds / 3600:.3g} rank-hours" if seconds >= 3600 else f", {duration(seconds)} of one rank"
    return line
