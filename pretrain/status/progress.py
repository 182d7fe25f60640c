"""How far a run is and how it goes: trend, speed and what is left, from the end of its metrics. Pure but for reads of the spool."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from pretrain.status.spool import Line, Spool, number

RECENT = 100  # steps of which a mean or a median is shown
_PERIODS = (
    2  # of the rarest of validation, samples and saves, that the time of a step is taken over, where there are so many
)


@dataclass(frozen=True)
class Trend:
    """Mean training loss of the newest `steps` steps, and how it differs from that of as many before (None: too few), with the
    standard error of the difference: steps are taken as independent. broken: of these steps, those whose loss is not finite.
    """

    loss: float
    steps: int
    change: Optional[float]
    error: Optional[float]
    broken: int


@dataclass(frozen=True)
class Speed:
    """Medians over the newest `steps` steps of one start. mfu: None = not measured."""

    tokens_per_second: float
    step_seconds: float
    mfu: Optional[float]
    steps: int


@dataclass(frozen=True)
class Pace:
    """seconds: of a step by the wall clock, over `steps` steps of one start with all that came between them. included: how many
    validations, samples and saves those were.
    """

    seconds: float
    steps: int
    included: dict[str, int]


def training_lines(lines: Sequence[Line]) -> list[Line]:
    """Those of optimizer steps."""
    return [line for line in lines if "train/loss" in line]


def loss_trend(lines: Sequence[Line]) -> Optional[Trend]:
    """lines: of optimizer steps, oldest first. None without any finite loss. Steps in which nothing was masked have no loss."""
    counted = [line for line in lines if line.get("train/num_masked_tokens") != 0.0]
    values = [number(line["train/loss"]) for line in counted[-2 * RECENT :]]
    broken = sum(value is None for value in values)
    finite = [value for value in values if value is not None]
    if not finite:
        return None
    half = min(RECENT, max(len(finite) // 2, 1))
    new, old = finite[-half:], finite[-2 * half : -half]
    change = error = None
    if len(old) == half and half >= 2:
        change = statistics.fmean(new) - statistics.fmean(old)
        error = math.sqrt((statistics.variance(new) + statistics.variance(old)) / half)
    return Trend(statistics.fmean(new), half, change, error, broken)


def speed(lines: Sequence[Line], since: float) -> Optional[Speed]:
    """lines: of optimizer steps. since: when the newest start was; the steps before it may have had another layout. Its own first
    step is left out where there are others: it compiles and allocates.
    """
    own = [line for line in lines if line["time"] >= since] or list(lines)
    own = (own[1:] or own)[-RECENT:]

    def median(name: str) -> Optional[float]:
        found = [value for line in own if (value := number(line.get(name))) is not None]
        return statistics.median(found) if found else None

    rate, seconds = median("perf/tokens_per_second"), median("perf/step_time")
    return Speed(rate, seconds, median("perf/mfu"), len(own)) if rate is not None and seconds is not None else None


def pace(spool: Spool, last: Line, since: float, every: dict[str, int]) -> Optional[Pace]:
    """The wall clock's time of a step, up to the line `last`; None if the newest start has made fewer than two steps.

    every: name -> steps between two of what comes between steps (0 = never).
    """
    back = max([RECENT, *(_PERIODS * steps for steps in every.values())])

    def reached(line: Line) -> bool:
        return line["time"] >= since and line["step"] >= last["step"] - back

    first = spool.first_where(reached)
    if first is None or first["step"] >= last["step"] or first["time"] >= last["time"]:
        return None
    steps = last["step"] - first["step"]
    # What follows a step lies between its line and the next one's: that of `first` counts, that of `last` does not.
    included = {name: (last["step"] - 1) // n - (first["step"] - 1) // n if n > 0 else 0 for name, n in every.items()}
    return Pace((last["time"] - first["time"]) / steps, steps, included)


def assumption(pace_: Pace, every: dict[str, int]) -> str:
    """What the time that is left follows from, in words."""
    counted = [f"{count} {name}{'s' if count != 1 else ''}" for name, count in pace_.included.items() if count]
    lacking = [name for name, n in every.items() if n > 0 and not pace_.included[name]]
    words = f"the last {pace_.steps} steps took {pace_.seconds:.3g} s each by the wall clock"
    words += f", {' and '.join(counted)} included" if counted else ""
    return words + (f", no {' and no '.join(lacking)} among them" if lacking else "")
