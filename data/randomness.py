"""Every random draw of the data path: a pure function of (seed, purpose, index, epoch).

Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the key is
made from (seed, purpose), the counter from (index, epoch). There is no state to carry, so a draw is the same on
any rank, worker, microbatch or resume point. No global generator is ever read.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

_U64 = (1 << 64) - 1


@lru_cache(maxsize=256)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def generator(seed: int, purpose: str, index: int, epoch: int = 0) -> np.random.Philox:
    """A Philox4x64 bit generator whose whole output belongs to (seed, purpose, index, epoch) alone.

    The lowest counter word counts the outputs, so streams of different indices never overlap.
    """
    return np.random.Philox(key=_key(seed, purpose), counter=(0, index & _U64, epoch & _U64, 0))


def words(seed: int, purpose: str, index: int, count: int, epoch: int = 0) -> np.ndarray:
    """`count` independent uniform uint64 words, shape [count]."""
    return generator(seed, purpose, index, epoch).random_raw(count)


def uniform(seed: int, purpose: str, index: int, count: int, epoch: int = 0) -> np.ndarray:
    """`count` float64 uniforms in (0, 1] with 53 random bits, shape [count]: 0 is never drawn, so 1/u is finite."""
    return ((words(seed, purpose, index, count, epoch) >> np.uint64(11)) + 1.0) * 2.0**-53


def bernoulli(seed: int, purpose: str, index: int, count: int, probability: float, epoch: int = 0) -> np.ndarray:
    """`count` independent booleans, true with `probability` (exact to 2**-32), shape [count]."""
    raw = words(seed, purpose, index, (count + 1) // 2, epoch).view(np.uint32)[:count]
    threshold = round(probability * 2.0**32)
    return np.ones(count, bool) if threshold >= 2**32 else raw < np.uint32(max(threshold, 0))
