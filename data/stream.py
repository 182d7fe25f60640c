"""The global block stream: block(g) is a pure function of the global block number g. Its whole state is that integer.

    shard set: N tokens, laid end to end
      -> epoch e: cut into segments of 64k tokens, segments permuted (Feistel keyed by seed and e)
      -> epochs laid end to end: one infinite token stream; what is left at the end of an epoch is carried into the next
      -> cut into blocks of L tokens; the blocks that start in epoch e are permuted among themselves

So in every epoch each token is read exactly once, nothing is dropped, and a start at any g costs O(1). With a shuffle window
segments are longer and blocks are permuted inside windows only: a stretch of the stream then touches few shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from data.permutation import Permutation

SEGMENT_TOKENS = 65536
SEGMENTS_PER_WINDOW = 8  # a window mixes about this many places of the set
NO_SPANS = np.zeros((0, 3), np.int32)


class TokenStore(Protocol):
    """N tokens addressable by position, and what is known about them (data.shard_set.ShardSet)."""

    @property
    def tokens(self) -> int: ...
    @property
    def row_tokens(self) -> int: ...
    @property
    def has_spans(self) -> bool: ...
    def read_tokens(self, start: int, count: int) -> np.ndarray: ...
    def read_pieces(self, start: int, count: int) -> np.ndarray: ...
    def read_spans(self, start: int, count: int) -> np.ndarray: ...
    def shards_of(self, start: int, count: int) -> list[int]: ...
    def prefetch(self, shards: Sequence[int]) -> None: ...


class Block(NamedTuple):
    """What a sample begins as."""

    tokens: np.ndarray  # [n] in the store's dtype; n <= L, fewer only at the end of a validation set
    borders: np.ndarray  # int64 [k], ascending: where other text begins than what stands before
    spans: np.ndarray  # int32 [k, 3]: start, length, kind (data.chunk_index)
    source: int = 0  # which source of a mixture


class BlockStream:
    """Blocks of `sequence_length` tokens of `store`, shuffled by (seed, epoch), for g = 0, 1, 2, ... without end.

    window: tokens that are shuffled among each other (0: the whole epoch). borders: whether blocks come with theirs; spans come
    whenever the store has any.
    """

    sources = ("",)

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        seed: int | str,
        segment_tokens: int = SEGMENT_TOKENS,
        window: int = 0,
        borders: bool = False,
    ):
        self.store = store
        self.sequence_length = sequence_length
        self.seed = seed
        self.window = window
        self.borders = borders
        self.segment_tokens = segment_tokens
        if window:
            segment_tokens = max(segment_tokens, window // SEGMENTS_PER_WINDOW)
        # Rows of whole documents stay whole: then every segment, and so every epoch, is a whole number of blocks.
        row = store.row_tokens or 1
        self._segment = -(-segment_tokens // row) * row
        self._window_blocks = -(-window // sequence_length)
        self._segments = -(-store.tokens // self._segment)
        self._short_by = self._segments * self._segment - store.tokens
        self._in_window = -1  # the first block of the window last read from
        # Two epochs meet inside one block, so two or more permutations are alive at once; each is a few integers.
        self._segment_order = lru_cache(maxsize=8)(self._make_segment_order)
        self._block_order = lru_cache(maxsize=8)(self._make_block_order)

    def __getstate__(self) -> dict:
        names = ("store", "sequence_length", "seed", "segment_tokens", "window", "borders")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict) -> None:
        BlockStream.__init__(self, **state)

    def epoch(self, g: int) -> int:
        """The epoch in which block g starts."""
        return g * self.sequence_length // self.store.tokens

    def source(self, g: int) -> tuple[int, int]:
        """(number of the source, its own block number): one source gives all."""
        return 0, g

    def epochs(self, g: int) -> dict[str, float]:
        """Source name -> how often it was read through before block g, fractions included."""
        return {self.sources[0]: g * self.sequence_length / self.store.tokens}

    def block(self, g: int) -> Block:
        """The g-th block. Raises what the store raises for data that cannot be read.

        With a window the store is told which shards the next one needs, as soon as the first block of this one is read.
        """
        if self._window_blocks:
            first, order = self._window_of(g)
            if first != self._in_window:
                self._in_window = first
                self.store.prefetch(self._shards_between(first + order.size, self._window_blocks))
        return read_block(self.store, self.ranges(g), self.borders)

    def ranges(self, g: int) -> list[tuple[int, int]]:
        """The ranges (start, count) of the store that block g is made of, in order."""
        first, order = self._window_of(g)
        return self._ranges((first + order[g - first]) * self.sequence_length, self.sequence_length)

    def shards_of(self, g: int) -> set[tuple[int, int]]:
        """The shards that block g lies in: (number of the source, number of the shard)."""
        return {(0, shard) for start, count in self.ranges(g) for shard in self.store.shards_of(start, count)}

    def _shards_between(self, block: int, count: int) -> list[int]:
        """The shards that `count` places of the unshuffled stream lie in, from place `block` on, in the order of first use."""
        ranges = self._ranges(block * self.sequence_length, min(count * self.sequence_length, self.store.tokens))
        return list(dict.fromkeys(shard for start, n in ranges for shard in self.store.shards_of(start, n)))

    def _window_of(self, g: int) -> tuple[int, Permutation]:
        """The first block among those that g is shuffled with, and their order."""
        epoch = self.epoch(g)
        n, length = self.store.tokens, self.sequence_length
        first = -(-epoch * n // length)
        return self._block_order(epoch, (g - first) // self._window_blocks if self._window_blocks else 0)

    def _make_block_order(self, epoch: int, window: int) -> tuple[int, Permutation]:
        n, length = self.store.tokens, self.sequence_length
        first, end = -(-epoch * n // length), -(-(epoch + 1) * n // length)
        if self._window_blocks:
            first += window * self._window_blocks
            end = min(end, first + self._window_blocks)
        return first, Permutation(end - first, f"{self.seed}/{epoch}/block/{window}")

    def _make_segment_order(self, epoch: int) -> tuple[Permutation, int]:
        order = Permutation(self._segments, f"{self.seed}/{epoch}/segment")
        return order, order.inverse(self._segments - 1)  # the slot of the only segment that may be short

    def _ranges(self, position: int, count: int) -> list[tuple[int, int]]:
        """Where tokens [position, position + count) of the infinite stream lie in the store."""
        ranges = []
        size = self._segment
        while count:
            epoch, offset = divmod(position, self.store.tokens)
            order, short_slot = self._segment_order(epoch)
            if offset >= (short_slot + 1) * size - self._short_by:  # behind the short segment: slots start earlier
                offset += self._short_by
            slot, inside = divmod(offset, size)
            length = size - self._short_by if slot == short_slot else size
            take = min(count, length - inside)
            ranges.append((order[slot] * size + inside, take))
            position += take
            count -= take
        return ranges


class SequentialBlocks:
    """Every token of a (validation) store once, in order: blocks 0 .. ceil(N / L) - 1, the last one shorter."""

    def __init__(self, store: TokenStore, sequence_length: int, borders: bool = False):
        self.store = store
        self.sequence_length = sequence_length
        self.borders = borders

    def __len__(self) -> int:
        return -(-self.store.tokens // self.sequence_length)

    def source(self, g: int) -> tuple[int, int]:
        return 0, g

    def block(self, g: int) -> Block:
        start = g * self.sequence_length
        return read_block(self.store, [(start, min(self.sequence_length, self.store.tokens - start))], self.borders)


def read_block(store: TokenStore, ranges: list[tuple[int, int]], borders: bool) -> Block:
    """The tokens of some ranges of a store, end to end, with their borders and spans."""
    tokens = [store.read_tokens(start, count) for start, count in ranges]
    starts: list[np.ndarray] = []
    spans: list[np.ndarray] = []
    filled = end = 0
    for start, count in ranges:
        if borders:
            found = store.read_pieces(start, count) + filled
            # Where two ranges meet other text begins, be it in the middle of a document.
            joint = filled and start != end and not (len(found) and found[0] == filled)
            starts.append(np.concatenate(([filled], found)) if joint else found)
        if store.has_spans:
            spans.append(store.read_spans(start, count) + np.array([[filled, 0, 0]], np.int32))
        filled, end = filled + count, start + count
    if len(ranges) == 1:
        return Block(tokens[0], starts[0] if starts else _NONE, spans[0] if spans else NO_SPANS)
    return Block(
        np.concatenate(tokens),
        np.concatenate(starts) if starts else _NONE,
        np.concatenate(spans) if spans else NO_SPANS,
    )


_NONE = np.zeros(0, np.int64)
