"""Is this step's loss a spike? A pure function of the losses of the steps before it.

What counts is the logarithm: a loss that doubles is as bad at 4 as at 2, and the weights of low noise levels make the tail of what
is normal long. It is a spike when it lies so many deviations above what the last applied steps lead to expect; a deviation is
what these steps show, since how much a loss varies depends on the objective, the noise levels of its batch and the batch's size:
the larger of 1.4826 MAD and the distance of the 90 % quantile from the median over 1.2816 (of normal values both are their standard
deviation; Rousseeuw & Croux, "Alternatives to the median absolute deviation", JASA 1993). Fewer spikes than a tenth of the steps
change neither by much, so they stay among them, and a level that is really new becomes the normal one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

MAD, QUANTILE, AT_QUANTILE = 1.4826, 0.9, 1.2816
# The least deviation: a loss that hardly varies is no spike for varying a little.
FLOOR = 0.01
LEAST = 4  # values that a median and a spread of them are taken from at all
SMALLEST = 1e-30  # of losses, for the logarithm


class Verdict(IntEnum):
    """Of one step, the worse the larger: ranks agree on the largest."""

    FINE = 0
    SPIKE = 1
    NON_FINITE = 2


class SpikeDetector:
    """sigma: deviations that make a spike (0 = nothing is one). window: applied steps that a step is compared with.

    Nothing is a spike before half of the window is there.
    """

    def __init__(self, sigma: float, window: int):
        self._sigma, self._window = sigma, window
        self._losses: deque[float] = deque(maxlen=window)  # logarithms

    def observe(self, loss: float, grad_norm: float, applied: bool) -> Verdict:
        """Judges a step and takes note of it. loss: of the global batch; grad_norm: global, before clipping; applied: the
        parameters were updated. Not for steps without anything to learn from, whose loss is no loss.

        However large, a gradient norm is no spike while it is finite: clipping bounds what it does.
        """
        if not (applied and math.isfinite(loss) and math.isfinite(grad_norm)):
            return Verdict.NON_FINITE
        level = math.log(max(loss, SMALLEST))
        ready = self._sigma and len(self._losses) >= max(LEAST, self._window // 2)
        spike = ready and deviations(level, list(self._losses)) > self._sigma
        self._losses.append(level)
        return Verdict.SPIKE if spike else Verdict.FINE

    def state(self) -> dict[str, Any]:
        """For the checkpoint: JSON gives every float back as it was, so a resumed run decides the same."""
        return {"log_losses": list(self._losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """As `state` gave it; {} begins anew. With another window the newest values count."""
        self._losses = deque(state.get("log_losses", ()), maxlen=self._window)


def deviations(value: float, before: Sequence[float], floor: float = FLOOR) -> float:
    """Deviations by which `value` lies above what the values before it, in their order, lead to expect; 0 if below. One is at least
    `floor`.

    While they fall, a line through the medians of their older and their newer half is taken off first: else the fall of a young
    run would pass for its spread and hide a spike. A rise is not taken off, or a loss that runs away would be as expected.
    """
    half, count = len(before) // 2, len(before)
    slope = min(0.0, (median(sorted(before[half:])) - median(sorted(before[:half]))) / (count / 2))
    level = sorted(x + slope * (count - i) for i, x in enumerate(before))  # as if all were of this step
    middle = median(level)
    spread = MAD * median(sorted(abs(x - middle) for x in level))
    upper = (level[int(QUANTILE * count)] - middle) / AT_QUANTILE
    return max(0.0, value - middle) / max(spread, upper, floor)


def median(ordered: Sequence[float]) -> float:
    """Of sorted values, not empty."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
