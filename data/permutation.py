"""A keyed permutation of range(n) in O(1) memory: a Feistel network with cycle walking.

Source: Luby & Rackoff (1988) for the network, Black & Rogaway (CT-RSA 2002) for cycle walking on a domain that is
not a power of two. Each image and each preimage is computed alone, so no epoch needs a table and
starting at any position costs the same.
"""

from __future__ import annotations

import hashlib

_ROUNDS = 6  # even, so that the halves, of which one may be a bit wider, end where they began
_M64 = (1 << 64) - 1


class Permutation:
    """A bijection of range(size) chosen by `key` (any string); `p[i]` is the image, `p.inverse(j)` the preimage.

    The round function is the 64-bit finaliser of SplitMix64 (Steele et al., OOPSLA 2014).
    """

    def __init__(self, size: int, key: str):
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got size {size}")
        self.size = size
        bits = max(2, (size - 1).bit_length())  # the network permutes 2**bits numbers, fewer than two for each of ours
        self._low = bits // 2
        self._low_mask, self._high_mask = (1 << self._low) - 1, (1 << bits - self._low) - 1
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]
        self._pairs = list(zip(keys[::2], keys[1::2], strict=True))
        self._pairs_back = self._pairs[::-1]

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self.size:
            raise IndexError(f"{i} is outside range({self.size})")
        low, low_mask, high_mask, size = self._low, self._low_mask, self._high_mask, self.size
        while True:
            a, b = i >> low, i & low_mask
            for first, second in self._pairs:  # written out: this is in the hot path of every read
                x = b + first & _M64
                x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _M64
                x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _M64
                a ^= (x ^ (x >> 31)) & high_mask
                x = a + second & _M64
                x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _M64
                x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _M64
                b ^= (x ^ (x >> 31)) & low_mask
            i = a << low | b
            if i < size:
                return i

    def inverse(self, j: int) -> int:
        if not 0 <= j < self.size:
            raise IndexError(f"{j} is outside range({self.size})")
        while True:
            a, b = j >> self._low, j & self._low_mask
            for first, second in self._pairs_back:
                b ^= _mix(a + second & _M64) & self._low_mask
                a ^= _mix(b + first & _M64) & self._high_mask
            j = a << self._low | b
            if j < self.size:
                return j


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _M64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _M64
    return x ^ (x >> 31)
