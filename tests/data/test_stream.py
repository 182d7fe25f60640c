"""Laws of the global block stream and of everything drawn from counters."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.permutation import Permutation
from data.stream import BlockStream, SequentialBlocks


class Positions:
    """A store whose token at position i is i itself, so that a block shows where it was read."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def read_tokens(self, start: int, count: int) -> np.ndarray:
        assert 0 <= start and start + count <= self.tokens and count > 0
        return np.arange(start, start + count)


@given(size=st.integers(1, 3000), key=st.text(max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_a_bijection_and_its_inverse_undoes_it(size, key):
    permutation = Permutation(size, key)
    images = [permutation[i] for i in range(size)]
    assert sorted(images) == list(range(size))
    assert all(permutation.inverse(j) == i for i, j in enumerate(images))


def test_permutations_spread_like_random_ones():
    """Chi-square over (position, image) cells of many keys; 7 cells in a row, 36 degrees of freedom, 99.99% quantile 79."""
    counts = np.zeros((7, 7))
    keys = 2100
    for key in range(keys):
        permutation = Permutation(7, str(key))
        for i in range(7):
            counts[i, permutation[i]] += 1
    assert ((counts - keys / 7) ** 2 / (keys / 7)).sum() < 79


@given(tokens=st.integers(1, 400), length=st.integers(1, 50), segment=st.integers(1, 120), seed=st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_every_epoch_reads_every_token_exactly_once_and_nothing_is_dropped(tokens, length, segment, seed):
    """Epoch e is the token range [e N, (e + 1) N) of the infinite stream: 3 whole epochs are 3 of each token."""
    stream = BlockStream(Positions(tokens), length, seed, segment)
    epochs = 3 * length  # so that a whole number of blocks fills them: 3 L epochs of N tokens = 3 N blocks
    if tokens * epochs > 20000:
        epochs = length
    blocks = tokens * epochs // length
    seen = Counter(np.concatenate([stream.block(g) for g in range(blocks)]).tolist())
    assert seen == dict.fromkeys(range(tokens), epochs)


def test_two_epochs_come_in_different_orders_and_a_seed_repeats_them():
    stream, again, other = (BlockStream(Positions(1000), 10, seed, 64) for seed in (0, 0, 1))
    read = lambda s, e: [s.block(g).tolist() for g in range(100 * e, 100 * e + 100)]  # noqa: E731
    assert read(stream, 0) == read(again, 0)
    assert read(stream, 0) != read(stream, 1)
    assert read(stream, 0) != read(other, 0)
    assert [stream.epoch(g) for g in (0, 99, 100, 250)] == [0, 0, 1, 2]


def test_a_block_depends_on_its_number_alone():
    """Read in any order, from any start, and after a trip through pickle (as into a worker)."""
    stream = BlockStream(Positions(5000), 33, 5, 256)
    blocks = {g: stream.block(g) for g in range(400)}
    fresh = pickle.loads(pickle.dumps(BlockStream(Positions(5000), 33, 5, 256)))
    for g in (399, 0, 217, 151, 152, 398):
        assert np.array_equal(fresh.block(g), blocks[g])


def test_blocks_are_contiguous_inside_a_segment_and_shuffled_across_the_set():
    stream = BlockStream(Positions(64 * 100), 16, 0, 64)
    blocks = np.stack([stream.block(g) for g in range(400)])
    assert (np.diff(blocks, axis=1) == 1).all()  # 16 divides 64: no block crosses a border
    order = blocks[:, 0] // 16
    assert abs(np.corrcoef(np.arange(400), order)[0, 1]) < 0.2
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.05


@pytest.mark.parametrize("tokens, length", [(100, 10), (101, 10), (5, 10)])
def test_validation_blocks_cover_every_token_once_in_order(tokens, length):
    blocks = SequentialBlocks(Positions(tokens), length)
    assert np.concatenate([blocks.block(g) for g in range(len(blocks))]).tolist() == list(range(tokens))
