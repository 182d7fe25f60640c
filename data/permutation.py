"""A keyed permutation of range(n) in O(1) memory: a Feistel network with cycle walking.

Source: Luby & Rackoff (1988) for the network, Black & Rogaway (CT-RSA 2002) for cycle walking on a domain that is
not a power of two. Each image and each preimage is computed alone, so no epoch needs a table and
starting at any position costs the same.
"""

from __future__ import annotations

import hashlib

_ROUNDS = 6
_M64 = (1 << 64) - 1


def _mix(x: int) -> int:
    """The 64-bit finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _M64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _M64
    return x ^ (x >> 31)


class Permutation:
    """A bijection of range(size) chosen by `key` (any string); `p[i]` is the image, `p.inverse(j)` the preimage."""

    def __init__(self, size: int, key: str):
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got size {size}")
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __getitem__(self, i: int) -> int:
        return self._walk(i, self._keys, forward=True)

    def inverse(self, j: int) -> int:
        return self._walk(j, self._keys[::-1], forward=False)

    def _walk(self, x: int, keys: list[int], forward: bool) -> int:
        if not 0 <= x < self.size:
            raise IndexError(f"{x} is outside range({self.size})")
        while True:
            left, right = x >> self._half, x & self._mask
            for key in keys:
                if forward:
                    left, right = right, left ^ (_mix(right + key & _M64) & self._mask)
                else:
                    left, right = right ^ (_mix(left + key & _M64) & self._mask), left
            x = left << self._half | right
            if x < self.size:
                return x
