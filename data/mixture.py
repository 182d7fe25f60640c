"""Mixtures: which source block g comes from, in closed form.

A pattern of PERIOD places, drawn once from the seed, repeats without end; each source stands in it as often as its weight
says, evenly spread. So any stretch of blocks, a global batch for one, holds nearly the exact shares, and both the source of
block g and how many blocks it gave before g cost O(1). A source that may be read only so many times leaves at a block that is known
beforehand; from there on a pattern of the remaining ones repeats.
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

PERIOD = 4096


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
    base: np.ndarray  # int64 [sources], blocks given before `start`
    pattern: np.ndarray  # int16 [PERIOD], the source of each place
    before: np.ndarray  # int64 [PERIOD + 1, sources], how often each stands before a place


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

    def source(self, g: int) -> tuple[int, int]:
        """(source, its own block number) of global block g. IndexError behind the end of a mixture of capped sources."""
        if g < 0 or (self.total is not None and g >= self.total):
            raise IndexError(
                f"block {g}: the sources of this mixture give {self.total} blocks in all (data.shards: epochs)"
            )
        phase = self._phases[bisect_right(self._starts, g) - 1]
        rounds, place = divmod(g - phase.start, PERIOD)
        source = int(phase.pattern[place])
        given = phase.base[source] + rounds * phase.before[PERIOD, source] + phase.before[place, source]
        return source, int(given)

    def block(self, g: int) -> Block:
        source, local = self.source(g)
        return self.ingredients[source].stream.block(local)._replace(source=source)

    def shards_of(self, g: int) -> set[tuple[int, int]]:
        """The shards that block g lies in: (number of the source, number of the shard)."""
        source, local = self.source(g)
        return {(source, shard) for _, shard in self.ingredients[source].stream.shards_of(local)}

    def epochs(self, g: int) -> dict[str, float]:
        """Source name -> how often it was read through before block g, fractions included."""
        given = self._given(g)
        return {i.name: i.stream.epochs(int(n))[""] for i, n in zip(self.ingredients, given)}

    def _given(self, g: int) -> np.ndarray:
        """How many blocks each source gave before block g."""
        phase = self._phases[bisect_right(self._starts, max(g - 1, 0)) - 1]
        rounds, place = divmod(g - phase.start, PERIOD)
        return phase.base + rounds * phase.before[PERIOD] + phase.before[place]

    def _plan(self) -> tuple[list[_Phase], Optional[int]]:
        weights = np.array([i.weight for i in self.ingredients], np.float64)
        limits = [self._limit(i) for i in self.ingredients]
        phases: list[_Phase] = []
        start, base = 0, np.zeros(len(weights), np.int64)
        while True:
            pattern = _pattern(weights, f"{self.seed}/mixture/{len(phases)}")
            before = np.zeros((PERIOD + 1, len(weights)), np.int64)
            np.cumsum(pattern[:, None] == np.arange(len(weights)), axis=0, out=before[1:])
            phases.append(_Phase(start, base, pattern, before))
            self._starts = [phase.start for phase in phases]
            ends = [
                (_nth(phases[-1], source, limit - int(base[source])), source)
                for source, limit in enumerate(limits)
                if limit is not None and weights[source] > 0
            ]
            if not ends:
                return phases, None
            end, gone = min(ends)
            weights[gone] = 0
            if not weights.any():
                return phases, end
            start, base = end, base + (end - start) // PERIOD * before[PERIOD] + before[(end - start) % PERIOD]

    def _limit(self, ingredient: Ingredient) -> Optional[int]:
        """Blocks that a capped source may give: those that start in its first `epochs` epochs."""
        if ingredient.epochs is None:
            return None
        return int(np.ceil(ingredient.epochs * ingredient.stream.store.tokens / self.sequence_length))


def _pattern(weights: np.ndarray, key: str) -> np.ndarray:
    """The source of each of PERIOD places, int16. Source i stands there n_i times, at (k + u_i) / n_i of the way for k < n_i,
    with one u_i drawn for each source.
    """
    exact = weights / weights.sum() * PERIOD
    counts = np.where(weights > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    by_remainder = by_remainder[weights[by_remainder] > 0]
    for k in range(int(PERIOD - counts.sum())):
        counts[by_remainder[k % len(by_remainder)]] += 1
    while counts.sum() > PERIOD:  # many tiny weights were rounded up to one place
        counts[np.argmax(counts)] -= 1
    shifts = randomness.uniform(0, key, 0, len(weights))
    places = np.concatenate([(np.arange(n) + u) / max(n, 1) for n, u in zip(counts, shifts)])
    owners = np.repeat(np.arange(len(weights), dtype=np.int16), counts)
    return owners[np.argsort(places, kind="stable")]


def _nth(phase: _Phase, source: int, n: int) -> int:
    """The block at which `source` would give its n-th block (from 0) of this phase."""
    rounds, rest = divmod(n, int(phase.before[PERIOD, source]))
    return phase.start + rounds * PERIOD + int(np.flatnonzero(phase.pattern == source)[rest])
