"""Mixtures: which source block g comes from, in closed form.

A pattern of places, drawn once from the seed, repeats without end; each source stands in it as often as its weight says,
evenly spread. So any stretch of blocks, a global batch for one, holds nearly the exact shares, and both the source of block g
and how many blocks it gave before g cost O(1). The pattern is as long as the smallest weight needs to be met to within a
percent. A source that may be read only so many times leaves at a block that is known beforehand; from there on a pattern of the
remaining ones repeats.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import numpy as np

from data import randomness
from data.errors import InputError
from data.stream import Block, BlockStream

SHORTEST, LONGEST = 1 << 12, 1 << 22  # places of a pattern
CLOSE = 0.01  # a source's share is off by at most this part of it, if the longest pattern allows
FAR = 0.1  # else it is refused


@dataclass(frozen=True)
class Ingredient:
    """One source of a mixture.

    weight: its share of the blocks, relative to the others' (0: never read). epochs: how often it may be read
    at most (None: without end).
    """

    name: str
    stream: BlockStream
    weight: float
    epochs: Optional[float] = None


class _Phase(NamedTuple):
    """A stretch of blocks over which the same sources take part."""

    start: int
    base: list[int]  # blocks each source gave before `start`
    pattern: np.ndarray  # int16 [places], the source of each place
    places: list[np.ndarray]  # int32, ascending: where each source stands

    def given(self, g: int, source: int) -> int:
        """How many blocks `source` gave before block g."""
        rounds, place = divmod(g - self.start, len(self.pattern))
        places = self.places[source]
        return self.base[source] + rounds * len(places) + int(places.searchsorted(place))

    def nth(self, source: int, n: int) -> int:
        """The block at which `source` would give its n-th block (from 0) of this phase."""
        rounds, rest = divmod(n, len(self.places[source]))
        return self.start + rounds * len(self.pattern) + int(self.places[source][rest])


class Mixture:
    """The blocks of several sources, interleaved by weight. `total` is None, or where the last capped source ends."""

    def __init__(self, ingredients: Sequence[Ingredient], seed: int):
        """Raises InputError for weights that make no sense."""
        self.ingredients = tuple(ingredients)
        self.sources = tuple(i.name for i in ingredients)
        self.seed = seed
        self.sequence_length = ingredients[0].stream.sequence_length
        weights = [i.weight for i in ingredients]
        if min(weights) < 0 or not sum(weights) > 0 or not np.isfinite(weights).all():
            raise InputError(f"data.shards: weights must be >= 0 and some must be > 0, found {weights}")
        self._phases, self.total = self._plan()
        self._starts = [phase.start for phase in self._phases]

    def __getstate__(self) -> dict:
        return {"ingredients": self.ingredients, "seed": self.seed}

    def __setstate__(self, state: dict) -> None:
        Mixture.__init__(self, **state)

    def source(self, g: int) -> tuple[int, int]:
        """(source, its own block number) of global block g. InputError behind the end of a mixture of capped sources."""
        if self.total is not None and g >= self.total:
            raise InputError(
                f"data.shards: the sources give {self.total} samples in all, sample {g} is behind that: raise or drop an `epochs`"
            )
        phase = self._phase(g)
        source = int(phase.pattern[(g - phase.start) % len(phase.pattern)])
        return source, phase.given(g, source)

    def block(self, g: int) -> Block:
        source, local = self.source(g)
        return self.ingredients[source].stream.block(local)._replace(source=source)

    def shards_of(self, g: int) -> set[tuple[int, int]]:
        """The shards that block g lies in: (number of the source, number of the shard)."""
        source, local = self.source(g)
        return {(source, shard) for _, shard in self.ingredients[source].stream.shards_of(local)}

    def epochs(self, g: int) -> dict[str, float]:
        """Source name -> how often it was read through before block g, fractions included."""
        phase = self._phase(max(g - 1, 0))
        return {one.name: one.stream.epochs(phase.given(g, i))[""] for i, one in enumerate(self.ingredients)}

    def _phase(self, g: int) -> _Phase:
        return self._phases[bisect_right(self._starts, g) - 1]

    def _plan(self) -> tuple[list[_Phase], Optional[int]]:
        weights = np.array([i.weight for i in self.ingredients], np.float64)
        limits = [self._limit(i) for i in self.ingredients]
        phases: list[_Phase] = []
        start, base = 0, [0] * len(weights)
        while True:
            pattern = _pattern(weights, f"{self.seed}/mixture/{len(phases)}")
            places = [np.flatnonzero(pattern == source).astype(np.int32) for source in range(len(weights))]
            phase = _Phase(start, base, pattern, places)
            phases.append(phase)
            ends = [
                (phase.nth(source, limit - base[source]), source)
                for source, limit in enumerate(limits)
                if limit is not None and weights[source] > 0
            ]
            if not ends:
                return phases, None
            start, gone = min(ends)
            weights[gone] = 0
            if not weights.any():
                return phases, start
            base = [phase.given(start, source) for source in range(len(weights))]

    def _limit(self, ingredient: Ingredient) -> Optional[int]:
        """Blocks that a capped source may give: those that start in its first `epochs` epochs."""
        if ingredient.epochs is None:
            return None
        return int(np.ceil(ingredient.epochs * ingredient.stream.store.tokens / self.sequence_length))


def shares(weights: np.ndarray) -> np.ndarray:
    """How often each source stands in the pattern, int64 [sources]; the pattern's length is their sum.

    Raises InputError for a weight that even the longest pattern cannot meet.
    """
    taking_part = weights > 0
    places = SHORTEST
    while True:
        exact = weights / weights.sum() * places
        counts = np.where(taking_part, np.maximum(np.round(exact), 1), 0).astype(np.int64)
        off = np.abs(counts[taking_part] / counts.sum() * weights.sum() / weights[taking_part] - 1).max()
        if off <= CLOSE:
            return counts
        if places == LONGEST:
            if off > FAR:
                raise InputError(
                    f"data.shards: the smallest weight is {weights[taking_part].min() / weights.sum():.1e} of all, less than a "
                    "mixture can keep (about 1e-06): give it more, leave it out, or prepare it together with another source"
                )
            return counts
        places *= 2


def _pattern(weights: np.ndarray, key: str) -> np.ndarray:
    """The source of each place, int16. Source i stands there n_i times, at (k + u_i) / n_i of the way for k < n_i, with one
    u_i drawn for each source.
    """
    counts = shares(weights)
    shifts = randomness.uniform(0, key, 0, len(weights))
    places = np.concatenate([(np.arange(n) + u) / max(n, 1) for n, u in zip(counts, shifts)])
    owners = np.repeat(np.arange(len(weights), dtype=np.int16), counts)
    return owners[np.argsort(places, kind="stable")]
