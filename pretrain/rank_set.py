"""Several ranks in one word, as people write them: 0,3-5."""

from __future__ import annotations

import re
from collections.abc import Iterable

from data.errors import InputError

SHOWN = 6  # parts


def ranks_of(text: str, option: str) -> set[int]:
    """ "0,3-5" as {0, 3, 4, 5}; InputError that names `option` if it is nothing like it."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(f"{option} is {text!r}, it must be like 0,3-5")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def ranges(numbers: Iterable[int]) -> str:
    """{0, 3, 4, 5} as "0,3-5"; many parts are cut."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    shown = [f"{a}" if a == b else f"{a}-{b}" for a, b in parts]
    return ",".join(shown) if len(shown) <= SHOWN else ",".join(shown[:SHOWN]) + ",.."
