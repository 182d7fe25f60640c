"""Which pieces of a chunk share a row of L tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

RowPacking = Literal["fill", "one"]


def pack_rows(lengths: Sequence[int], row_tokens: int, packing: RowPacking) -> list[list[int]]:
    """Numbers of the pieces in each row; none of them longer than `row_tokens`.

    `fill`: first-fit-decreasing, which needs at most 11/9 of the fewest possible rows and 6/9 (Dosa 2007, The tight bound of
    first fit decreasing bin-packing). `one`: a row for each. Pieces keep their order inside a row, and rows follow the first
    piece in them.
    """
    if packing == "one":
        return [[piece] for piece in range(len(lengths))]
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)  # left in each row; 0 behind the open ones
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        fits = room[: len(rows)] >= lengths[piece]
        row = int(fits.argmax()) if len(rows) and fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = row_tokens
        rows[row].append(piece)
        room[row] -= lengths[piece]
    return sorted(sorted(row) for row in rows)
