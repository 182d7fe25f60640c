"""Read a shard set with webdataset alone, as somebody else's program would."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset


class StoredPiece(NamedTuple):
    """A piece as stored: ids, spans [k, 3] that start at the piece, what is known about it, and where it begins in the set."""

    tokens: np.ndarray
    spans: list[list[int]]
    meta: Any
    start: int


def stored_pieces(folder: Path) -> list[StoredPiece]:
    found: list[StoredPiece] = []
    total = 0
    tars = [str(path) for path in sorted(folder.glob("shard-*.tar"))]
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode():
        tokens, lengths = sample["tok.npy"], sample["lens.npy"]
        spans, meta = sample.get("spans.npy", np.zeros((0, 3), np.int32)), sample.get("meta.json")
        assert lengths.sum() == len(tokens) and (len(meta) == len(lengths) if meta else True)
        start = 0
        for number, length in enumerate(lengths.tolist()):
            inside = spans[(spans[:, 0] >= start) & (spans[:, 0] < start + length)] - [start, 0, 0]
            assert (inside[:, 0] + inside[:, 1] <= length).all()
            about = meta[number] if meta else None
            found.append(StoredPiece(tokens[start : start + length], inside.tolist(), about, total + start))
            start += length
        total += len(tokens)
    return found
