"""Where the pieces of a chunk begin and what spans it has, and the recently used ones of a process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple, Optional

import numpy as np

from data.chunk_index import SPAN_FIELDS, SPAN_KINDS, Payloads
from data.shard_writer import NO_SPANS


class ChunkLayout(NamedTuple):
    begins: np.ndarray  # int64 [pieces], positions in the chunk
    spans: np.ndarray  # int32 [k, 3]: start in the chunk, length, kind


def parse_layout(content: bytes | bytearray, places: Payloads, tokens: int, pieces: int, spans: int) -> ChunkLayout:
    """The layout in the bytes of a tar from `places.lengths` on. Raises ValueError, saying why, for what cannot be."""
    lengths = np.frombuffer(content, "<i4", pieces)
    if lengths.min() < 1 or lengths.sum(dtype=np.int64) != tokens:
        raise ValueError(f"has document lengths that do not sum to its {tokens} tokens")
    ends = np.cumsum(lengths, dtype=np.int64)
    if not spans:
        return ChunkLayout(ends - lengths, NO_SPANS)
    rows = np.frombuffer(content, "<i4", spans * SPAN_FIELDS, places.spans - places.lengths).reshape(spans, SPAN_FIELDS)
    fault = span_fault(rows, tokens)
    if fault:
        raise ValueError(fault)
    return ChunkLayout(ends - lengths, rows.copy())


def span_fault(spans: np.ndarray, tokens: int) -> str:
    """What breaks the rule that spans [k, 3] lie in order, apart, and inside `tokens` tokens; "" if nothing."""
    starts, lengths, kinds = spans.astype(np.int64).T
    ends = starts + lengths
    if (lengths < 1).any() or (starts < 0).any() or (ends > tokens).any():
        return f"has a span that is empty or outside its {tokens} tokens"
    if (starts[1:] < ends[:-1]).any():
        return "has spans out of order or over each other"
    if (kinds < 0).any() or (kinds >= len(SPAN_KINDS)).any():
        return f"has a span of an unknown kind (known are 0 to {len(SPAN_KINDS) - 1})"
    return ""


class LayoutCache:
    """The most recently used layouts, at most `most_bytes` of arrays. Safe between threads."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._lock = threading.Lock()
        self._layouts: OrderedDict[int, ChunkLayout] = OrderedDict()

    def get(self, chunk: int) -> Optional[ChunkLayout]:
        with self._lock:
            found = self._layouts.get(chunk)
            if found is not None:
                self._layouts.move_to_end(chunk)
            return found

    def put(self, chunk: int, layout: ChunkLayout) -> None:
        """Keep a layout and let go of the oldest ones; one that alone is larger than the bound is not kept."""
        with self._lock:
            if chunk not in self._layouts:
                self._layouts[chunk] = layout
                self.bytes += _bytes(layout)
            while self.bytes > self.most_bytes:
                _, oldest = self._layouts.popitem(last=False)
                self.bytes -= _bytes(oldest)


def _bytes(layout: ChunkLayout) -> int:
    return layout.begins.nbytes + layout.spans.nbytes + 400  # the objects around them
