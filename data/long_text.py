"""Cut a long text where the tokens on both sides are the same as if it had not been cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

PART_CHARS = 1 << 18  # tokenizers need up to 100 bytes of memory for a byte of text
_SPACE_BEGINS = re.compile(r"(?<=\S)(?=\s)")
_CONTEXT = 200  # characters on each side of a cut that are encoded together and apart to see that the cut is harmless
_TRIES = 20


def parts(text: str, encode: Callable[[Sequence[str]], list[np.ndarray]]) -> Iterator[str]:
    """Parts of about PART_CHARS characters, cut before white space where `encode` gives the same ids for both sides apart.

    Where no such place is found the part grows: correct ids come before little memory.
    """
    start = 0
    while len(text) - start > 2 * PART_CHARS:
        cut = _harmless_cut(text, start + PART_CHARS, encode)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _harmless_cut(text: str, begin: int, encode: Callable[[Sequence[str]], list[np.ndarray]]) -> int | None:
    for number, found in enumerate(_SPACE_BEGINS.finditer(text, begin)):
        if number == _TRIES:
            return None
        cut = found.start()
        left, right = text[cut - _CONTEXT : cut], text[cut : cut + _CONTEXT]
        whole, first, second = encode([left + right, left, right])
        if np.array_equal(whole, np.concatenate([first, second])):
            return cut
    return None
