"""Every random draw of the data path: a pure function of (seed, purpose, index, epoch).

Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the key is
made from (seed, purpose), the counter from (index, epoch). There is no state to carry, so a draw is the same on
any rank, worker, microbatch or resume point. No global generator is ever read.
"""

from __future__ import annotations

import hashlib
import threading
from functools import lru_cache
from typing import Any

import numpy as np

_U64 = (1 << 64) - 1
_TOGETHER = 64  # indices whose chances are drawn at once


@lru_cache(maxsize=256)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class _Generator(threading.local):
    """One bit generator for each thread: setting its key and counter takes a quarter of the time that making one takes."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.counter, self.key = np.zeros(4, np.uint64), np.zeros(2, np.uint64)
        self.state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": self.counter, "key": self.key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,  # nothing is left of an earlier draw
            "has_uint32": 0,
            "uinteger": 0,
        }


_generator = _Generator()


def words(seed: int, purpose: str, index: int, count: int, epoch: int = 0) -> np.ndarray:
    """`count` independent uniform uint64 words, shape [count]: the output of Philox4x64-10 that belongs to these numbers alone.

    The lowest counter word counts the outputs, so streams of different indices never overlap.
    """
    return _raw(seed, purpose, (0, index & _U64, epoch & _U64, 0), count)


def _raw(seed: int, purpose: str, counter: tuple[int, int, int, int], count: int) -> np.ndarray:
    own = _generator
    own.key[:] = _key(seed, purpose)
    own.counter[:] = counter
    own.philox.state = own.state
    return own.philox.random_raw(count)


def generator(seed: int, purpose: str, index: int, epoch: int = 0) -> np.random.Philox:
    """A bit generator of its own whose whole output is that of `words`, for draws that go on."""
    return np.random.Philox(key=_key(seed, purpose), counter=(0, index & _U64, epoch & _U64, 0))


def uniform(seed: int, purpose: str, index: int, count: int, epoch: int = 0) -> np.ndarray:
    """`count` float64 uniforms in (0, 1] with 53 random bits, shape [count]: 0 is never drawn, so 1/u is finite."""
    return ((words(seed, purpose, index, count, epoch) >> np.uint64(11)) + 1.0) * 2.0**-53


def chance(seed: int, purpose: str, index: int, which: int = 0, epoch: int = 0) -> float:
    """The number `which` (0 to 3) of the four uniforms in (0, 1] that belong to these numbers, for draws of one or two a sample.

    Here the index is the lowest counter word, so that neighbouring ones come out of one call; the highest is 1, where that of
    `words` is 0, so that the two never meet.
    """
    return _chances(seed, purpose, index // _TOGETHER, epoch)[index % _TOGETHER][which]


@lru_cache(maxsize=256)
def _chances(seed: int, purpose: str, group: int, epoch: int) -> list[list[float]]:
    raw = _raw(seed, purpose, (group * _TOGETHER & _U64, 0, epoch & _U64, 1), 4 * _TOGETHER)
    return (((raw >> np.uint64(11)) + 1.0) * 2.0**-53).reshape(_TOGETHER, 4).tolist()


def bernoulli(seed: int, purpose: str, index: int, count: int, probability: float, epoch: int = 0) -> np.ndarray:
    """`count` independent booleans, true with `probability` (exact to 2**-48), shape [count].

    16 bits decide, but where they equal the first 16 of the probability the next 32 do; those come from behind the first ones.
    """
    whole = round(probability * 2.0**48)
    if not 0 < whole < 1 << 48:
        return np.full(count, whole > 0)
    first, rest = whole >> 32, whole & 0xFFFFFFFF
    size = (count + 3) // 4
    coarse = words(seed, purpose, index, size, epoch).view(np.uint16)[:count]
    drawn = coarse < first
    tied = coarse == first
    if tied.any():
        ties = np.flatnonzero(tied)
        fine = words(seed, purpose, index, size + (len(ties) + 1) // 2, epoch)[size:].view(np.uint32)[: len(ties)]
        drawn[ties] = fine < rest
    return drawn
