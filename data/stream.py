"""The global block stream: block(g) is a pure function of the global block number g. Its whole state is that integer.

    shard set: N tokens, laid end to end
      -> epoch e: cut into segments of 64k tokens, segments permuted (Feistel keyed by seed and e)
      -> epochs laid end to end: one infinite token stream; what is left at the end of an epoch is carried into the next
      -> cut into blocks of L tokens; the blocks that start in epoch e are permuted among themselves

So in every epoch each token is read exactly once, nothing is dropped, and a start at any g costs O(1).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np

from data.permutation import Permutation

SEGMENT_TOKENS = 65536


class TokenStore(Protocol):
    """N tokens addressable by position (data.shard_set.ShardSet in training, an array in tests)."""

    @property
    def tokens(self) -> int: ...

    def read_tokens(self, start: int, count: int) -> np.ndarray: ...


class BlockStream:
    """Blocks of `sequence_length` tokens of `store`, shuffled by (seed, epoch), for g = 0, 1, 2, ... without end."""

    def __init__(self, store: TokenStore, sequence_length: int, seed: int, segment_tokens: int = SEGMENT_TOKENS):
        self.store = store
        self.sequence_length = sequence_length
        self.seed = seed
        self.segment_tokens = segment_tokens
        self._segments = -(-store.tokens // segment_tokens)
        self._short_by = self._segments * segment_tokens - store.tokens
        # Two epochs meet inside one block, so two or more permutations are alive at once; each is a few integers.
        self._segment_order = lru_cache(maxsize=8)(self._make_segment_order)
        self._block_order = lru_cache(maxsize=8)(self._make_block_order)

    def __getstate__(self) -> dict:
        return {k: getattr(self, k) for k in ("store", "sequence_length", "seed", "segment_tokens")}

    def __setstate__(self, state: dict) -> None:
        BlockStream.__init__(self, **state)

    def epoch(self, g: int) -> int:
        """The epoch in which block g starts."""
        return g * self.sequence_length // self.store.tokens

    def block(self, g: int) -> np.ndarray:
        """The tokens of global block g, shape [sequence_length], in the store's dtype."""
        first, order = self._block_order(self.epoch(g))
        return self._read((first + order[g - first]) * self.sequence_length, self.sequence_length)

    def _make_block_order(self, epoch: int) -> tuple[int, Permutation]:
        n, length = self.store.tokens, self.sequence_length
        first, end = -(-epoch * n // length), -(-(epoch + 1) * n // length)
        return first, Permutation(end - first, f"{self.seed}/{epoch}/block")

    def _make_segment_order(self, epoch: int) -> tuple[Permutation, int]:
        order = Permutation(self._segments, f"{self.seed}/{epoch}/segment")
        return order, order.inverse(self._segments - 1)  # the slot of the only segment that may be short

    def _read(self, position: int, count: int) -> np.ndarray:
        """Tokens [position, position + count) of the infinite stream."""
        parts = []
        while count:
            epoch, offset = divmod(position, self.store.tokens)
            order, short_slot = self._segment_order(epoch)
            size = self.segment_tokens
            if offset >= (short_slot + 1) * size - self._short_by:  # behind the short segment: slots start earlier
                offset += self._short_by
            slot, inside = divmod(offset, size)
            length = size - self._short_by if slot == short_slot else size
            take = min(count, length - inside)
            parts.append(self.store.read_tokens(order[slot] * size + inside, take))
            position += take
            count -= take
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class SequentialBlocks:
    """Every token of a (validation) store once, in order: blocks 0 .. ceil(N / L) - 1, the last one shorter."""

    def __init__(self, store: TokenStore, sequence_length: int):
        self.store = store
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return -(-self.store.tokens // self.sequence_length)

    def epoch(self, g: int) -> int:
        return 0

    def block(self, g: int) -> np.ndarray:
        start = g * self.sequence_length
        return self.store.read_tokens(start, min(self.sequence_length, self.store.tokens - start))
