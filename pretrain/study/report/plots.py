"""What all figures of a study share: pictures with a text alternative, colours, logarithmic axes with ticks that can be read.

Colours are Okabe and Ito's (Color Universal Design, 2008) for names and `viridis` for what is ordered; line styles and markers
tell the same.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from PIL import Image

from pretrain.study.report.fit_file import Number
from pretrain.study.report.numbers import count, power_of_ten

APPROACH_STYLE = {
    "isoflop": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "parametric": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "envelope": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
}
OBJECTIVE_STYLE = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
)
INK, FAINT = "#222222", "#8a8a8a"
DPI = 144
_MULTIPLES = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))


@dataclass(frozen=True)
class Picture:
    """One figure. name: of its file; alt: what a person who cannot see it should know; caption: HTML-free sentence below it."""

    name: str
    title: str
    alt: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class NoPicture:
    """What stands in the figure's place where there is nothing honest to draw."""

    name: str
    title: str
    reason: str


Drawn = Union[Picture, NoPicture]


def figure(
    columns: int = 1, width: float = 8.0, height: float = 4.8, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with `columns` axes side by side; no global state of matplotlib is touched."""
    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = made.subplots(1, columns, sharey=share_y, squeeze=False)[0]
    for axis in axes:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9, color=FAINT)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return made, list(axes)


def png(made: Figure) -> bytes:
    """The picture's bytes, in 256 colours (a third of the size); equal figures give equal bytes."""
    drawn, written = io.BytesIO(), io.BytesIO()
    made.savefig(drawn, format="png")
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(written, format="png", optimize=True)
    return written.getvalue()


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round values in [low, high] for a logarithmic axis: 3 to `most` of them wherever the range allows.

    Whole decades (every second, third, ... where there are many), else 1-3, 1-2-5 and so on; evenly spaced below a factor of 3.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    best: list[float] = []
    for multiples in _MULTIPLES if high / low > 3 else ():
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in multiples if low <= m * 10.0**e <= high]
        if len(ticks) > most and multiples == (1,):
            return ticks[:: math.ceil(len(ticks) / most)]
        if len(best) < len(ticks) <= most:
            best = ticks
        if len(best) >= 4:
            break
    if len(best) >= 3:
        return best
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(s * step for s in (1, 2, 5, 10) if (high - low) / (s * step) <= most)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_axis(axes: Axes, which: str, low: float, high: float, label: Callable[[float], str], most: int = 7) -> None:
    """Makes `which` ("x" or "y") logarithmic from `low` to `high`, with few, round, labelled ticks."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    axis = axes.xaxis if which == "x" else axes.yaxis
    ticks = log_ticks(low, high, most)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([label(tick) for tick in ticks]))
    axis.set_minor_locator(NullLocator())


def range_of(values: Iterable[Optional[float]], margin: float = 0.06) -> tuple[float, float]:
    """Ends of a logarithmic axis that holds all positive `values`, with a margin of that share of its length to both sides."""
    logs = [math.log(v) for v in values if v is not None and v > 0 and math.isfinite(v)]
    room = max(margin * (max(logs) - min(logs)), 0.01)
    return math.exp(min(logs) - room), math.exp(max(logs) + room)


def size_label(value: float) -> str:
    return count(value).replace(" ", "\N{NO-BREAK SPACE}")


def flops_label(value: float) -> str:
    """1e19 as 10^19 in matplotlib's notation."""
    mantissa, exponent = power_of_ten(value)
    return f"$10^{{{exponent}}}$" if mantissa == "1" else f"${mantissa}{{\\times}}10^{{{exponent}}}$"


def loss_label(value: float) -> str:
    return f"{value:.4g}"


def ordered(many: int) -> list[Any]:
    """Colours for `many` ordered things, dark to light; the lightest is still seen on white."""
    return [colormaps["viridis"](0.08 + 0.8 * i / max(many - 1, 1)) for i in range(many)]


def band(axes: Axes, x: Sequence[float], numbers: Sequence[Number], color: Any, floor: float, ceiling: float) -> bool:
    """Shades the intervals of `numbers` over `x`; ends that are not bounded run to the axis. False if none has an interval."""
    if not any(n.low is not None or n.high is not None for n in numbers):
        return False
    low = [floor if n.low is None or n.low <= 0 else n.low for n in numbers]
    high = [ceiling if n.high is None else n.high for n in numbers]
    axes.fill_between(list(x), low, high, color=color, alpha=0.16, linewidth=0)
    return True


def error_bars(numbers: Sequence[Number]) -> list[list[float]]:
    """[down, up] lengths of the intervals, as matplotlib wants them; 0 where an end is not known."""
    down = [max(n.value - n.low, 0.0) if n.low is not None else 0.0 for n in numbers]
    up = [max(n.high - n.value, 0.0) if n.high is not None else 0.0 for n in numbers]
    return [down, up]


def file_name(kind: str, objective: str) -> str:
    """Of a picture; an objective is named by a file from outside, so only plain characters are kept."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9]+', '_', objective)[:40]}"


def shade_sampled(axes: Axes, low: float, high: float) -> None:
    """Marks where cells were; beyond it everything is extrapolation."""
    axes.axvspan(low, high, color="#000000", alpha=0.05, linewidth=0, label="budgets with cells")
