"""Numbers of a study as people read them: as many digits as the interval supports, sizes in k, M, B, T."""

from __future__ import annotations

import math
import re
from html import escape
from typing import Optional

from pretrain.study.report.fit_file import Number

_UNITS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))


def count(value: float, digits: int = 3) -> str:
    """ "84.2 M" parameters, "8.25 B" tokens, "941": the field's letters."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:g}"
    if value >= 1e16:
        return "{} × 10^{}".format(*power_of_ten(value))
    rounded = float(f"{value:.{digits}g}")
    for unit, letter in _UNITS:
        if rounded >= unit:
            return f"{_plain(rounded / unit, digits)}{letter}"
    return _plain(rounded, digits)


def _plain(value: float, digits: int) -> str:
    """`digits` significant digits, never in powers of ten."""
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def power_of_ten(value: float, digits: int = 2) -> tuple[str, int]:
    """("6.4", 19) for 6.4e19."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa), int(exponent)


def flops(value: float) -> str:
    """FLOPs as HTML: 6.4 × 10<sup>19</sup>."""
    mantissa, exponent = power_of_ten(value, 3)
    words = f"10<sup>{exponent}</sup>" if mantissa == "1" else f"{mantissa} × 10<sup>{exponent}</sup>"
    return f'<data class="flops" value="{value!r}">{words}</data>'


def digits_for(found: Number, least: int = 2, most: int = 5) -> int:
    """Significant digits so that the interval shows two of its own: 0.514 of 0.49 to 0.54, 2.4132 of 2.412 to 2.415."""
    ends = [abs(end - found.value) for end in (found.low, found.high) if end is not None and end != found.value]
    if not ends or not found.value:
        return 4
    ratio = min(ends) / abs(found.value)
    return min(most, max(least, 1 + math.ceil(-math.log10(ratio)))) if ratio > 0 else most


def significant(value: float, digits: int) -> str:
    """Plain for everyday sizes, a power of ten beyond them."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        mantissa, exponent = power_of_ten(value, digits)
        return f"{mantissa} × 10^{exponent}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def html(text: str) -> str:
    """Escapes, and sets powers (10^19, C^-g) as such."""
    return re.sub(r"\^(-?[A-Za-z0-9.]*[A-Za-z0-9])", r"<sup>\1</sup>", escape(text))


def data(value: float, text: str) -> str:
    """A number in the page that keeps its full value for machines (and for the tests): <data value>."""
    return f'<data value="{value!r}">{html(text).replace(" ", "&nbsp;")}</data>'


def show(found: Optional[Number], kind: str = "number") -> str:
    """HTML: the value and its interval, or a dash. kind: `number`, `count` (sizes), `loss`."""
    if found is None:
        return '<span class="none">none</span>'
    digits = digits_for(found)

    def words(value: float) -> str:
        return count(value) if kind == "count" else significant(value, digits)

    shown = data(found.value, words(found.value))
    if found.low is None and found.high is None:
        return f'{shown} <span class="interval">(no interval)</span>'
    low = data(found.low, words(found.low)) if found.low is not None else "no lower bound"
    high = data(found.high, words(found.high)) if found.high is not None else "no upper bound"
    return f'{shown} <span class="interval">({low} to {high})</span>'


def percent(value: float) -> str:
    return f"{100 * value:.2g} %"
