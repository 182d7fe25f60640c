"""Which pieces of a chunk share a row of L tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

RowPacking = Literal["fill", "one"]


def pack_rows(lengths: Sequence[int], row_tokens: int, packing: RowPacking) -> list[list[int]]:
    """Numbers of the pieces in each row; none of them longer than `row_tokens`.

    `fill`: best-fit-decreasing (each piece, longest first, into the row that it leaves the least room in), which needs at most
    11/9 of the fewest possible rows and a few more (Johnson 1974, Fast algorithms for bin packing). `one`: a row for each.
    Pieces keep their order inside a row, and rows follow the first piece in them.
    """
    if packing == "one":
        return [[piece] for piece in range(len(lengths))]
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)  # left in each row; 0 behind the open ones
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        left = room[: len(rows)] - lengths[piece]
        left[left < 0] = row_tokens + 1  # does not fit
        row = int(left.argmin()) if len(rows) else 0
        if row == len(rows) or left[row] > row_tokens:
            row = len(rows)
            rows.append([])
            room[row] = row_tokens
        rows[row].append(piece)
        room[row] -= lengths[piece]
    return sorted(sorted(row) for row in rows)
