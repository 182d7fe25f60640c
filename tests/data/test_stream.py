"""Laws of the global block stream and of everything drawn from counters."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.permutation import Permutation
from data.shard_writer import clip_spans
from data.stream import BlockStream, SequentialBlocks


class Positions:
    """A store whose token at position i is i itself, so that a block shows where it was read."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.row_tokens, self.has_spans = 0, False
        self.wanted: list[list[int]] = []

    def read_tokens(self, start: int, count: int) -> np.ndarray:
        assert 0 <= start and start + count <= self.tokens and count > 0
        return np.arange(start, start + count)

    def shards_of(self, start: int, count: int) -> list[int]:
        """A shard holds 100 tokens."""
        return list(range(start // 100, (start + count - 1) // 100 + 1))

    def prefetch(self, shards) -> None:
        self.wanted.append(list(shards))


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
    seen = Counter(np.concatenate([stream.block(g).tokens for g in range(blocks)]).tolist())
    assert seen == dict.fromkeys(range(tokens), epochs)


def test_two_epochs_come_in_different_orders_and_a_seed_repeats_them():
    stream, again, other = (BlockStream(Positions(1000), 10, seed, 64) for seed in (0, 0, 1))
    read = lambda s, e: [s.block(g).tokens.tolist() for g in range(100 * e, 100 * e + 100)]  # noqa: E731
    assert read(stream, 0) == read(again, 0)
    assert read(stream, 0) != read(stream, 1)
    assert read(stream, 0) != read(other, 0)
    assert [stream.epoch(g) for g in (0, 99, 100, 250)] == [0, 0, 1, 2]


def test_a_block_depends_on_its_number_alone():
    """Read in any order, from any start, and after a trip through pickle (as into a worker)."""
    stream = BlockStream(Positions(5000), 33, 5, 256)
    blocks = {g: stream.block(g).tokens for g in range(400)}
    fresh = pickle.loads(pickle.dumps(BlockStream(Positions(5000), 33, 5, 256)))
    for g in (399, 0, 217, 151, 152, 398):
        assert np.array_equal(fresh.block(g).tokens, blocks[g])


def test_blocks_are_contiguous_inside_a_segment_and_shuffled_across_the_set():
    stream = BlockStream(Positions(64 * 100), 16, 0, 64)
    blocks = np.stack([stream.block(g).tokens for g in range(400)])
    assert (np.diff(blocks, axis=1) == 1).all()  # 16 divides 64: no block crosses a border
    order = blocks[:, 0] // 16
    assert abs(np.corrcoef(np.arange(400), order)[0, 1]) < 0.2
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.05


@pytest.mark.parametrize("tokens, length", [(100, 10), (101, 10), (5, 10)])
def test_validation_blocks_cover_every_token_once_in_order(tokens, length):
    blocks = SequentialBlocks(Positions(tokens), length)
    assert np.concatenate([blocks.block(g).tokens for g in range(len(blocks))]).tolist() == list(range(tokens))


@given(tokens=st.integers(1, 500), length=st.integers(1, 40), window=st.integers(1, 700), segment=st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_with_a_window_too_every_epoch_reads_every_token_exactly_once(tokens, length, window, segment):
    stream = BlockStream(Positions(tokens), length, 1, segment, window=window)
    # `length` epochs are a whole number of blocks.
    seen = Counter(np.concatenate([stream.block(g).tokens for g in range(tokens)]).tolist())
    assert seen == dict.fromkeys(range(tokens), length)


def test_a_window_keeps_a_stretch_of_the_stream_in_few_places_and_shuffles_inside():
    near, far = (BlockStream(Positions(1 << 18), 16, 0, 64, window=w) for w in (4096, 0))
    stretch = [np.stack([s.block(g).tokens for g in range(512, 768)])[:, 0] for s in (near, far)]  # one window
    places = [len(set((x // 512).tolist())) for x in stretch]
    assert places[0] <= 9 and places[1] > 150
    assert abs(np.corrcoef(np.arange(256), stretch[0] % 512)[0, 1]) < 0.25
    assert np.mean(np.abs(np.diff(stretch[0])) == 16) < 0.1
    first, second = ([near.block(g).tokens[0] for g in range(e * 16384, e * 16384 + 300)] for e in (0, 1))
    assert first != second


def test_the_store_hears_at_the_beginning_of_a_window_which_shards_the_next_one_needs():
    store = Positions(1 << 14)
    stream = BlockStream(store, 16, 0, 64, window=2048)
    needed: list[set[int]] = []
    for g in range(3 * 1024):  # three epochs of eight windows
        if g % 128 == 0:
            needed.append(set())
            assert len(store.wanted) == g // 128
        needed[-1] |= {shard for _, shard in stream.shards_of(g)}
        stream.block(g)
    assert len(store.wanted) == 24
    assert [set(shards) for shards in store.wanted[:-1]] == needed[1:]


class Documents(Positions):
    """A store of documents of given lengths; rows of `row` tokens end in padding where `padded`."""

    def __init__(self, lengths, row=0, padded=()):
        super().__init__(sum(lengths))
        self.row_tokens, self.has_spans = row, bool(len(padded))
        self.starts = np.cumsum([0, *lengths[:-1]])
        self.spans = np.array([(self.starts[i], lengths[i], 2) for i in padded], np.int32).reshape(-1, 3)

    def read_pieces(self, start, count):
        return self.starts[(self.starts >= start) & (self.starts < start + count)] - start

    def read_spans(self, start, count):
        return clip_spans(self.spans, start, count)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), length=st.integers(1, 25), segment=st.integers(1, 50)
)
@settings(max_examples=80, deadline=None)
def test_borders_are_where_the_next_token_belongs_to_other_text(lengths, length, segment):
    """A token continues the text before it only if it is the next one in the store and no document begins with it."""
    store = Documents(lengths)
    stream = BlockStream(store, length, 3, segment, borders=True)
    for g in range(min(60, 2 * store.tokens // length + 2)):
        block = stream.block(g)
        before = np.concatenate(([-5], block.tokens[:-1]))
        begins = np.isin(block.tokens, store.starts) | ((block.tokens != before + 1) & (np.arange(length) > 0))
        assert block.borders.tolist() == np.flatnonzero(begins).tolist()
        shards = {shard for start, count in stream.ranges(g) for shard in store.shards_of(start, count)}
        assert stream.shards_of(g) == {(0, shard) for shard in shards}
        assert shards == set((block.tokens // 100).tolist())


@pytest.mark.parametrize("segment, window", [(16, 0), (50, 0), (64, 0), (10, 96)])
def test_rows_of_whole_documents_stay_rows(segment, window):
    """Rows of 16 tokens: 5, 8 and 3 of padding. Every block of 16 is one row, whatever the segments and windows."""
    store = Documents([5, 8, 3] * 25, row=16, padded=range(2, 75, 3))
    stream = BlockStream(store, 16, 0, segment, window=window, borders=True)
    rows = [stream.block(g) for g in range(75)]
    for row in rows:
        assert row.tokens[0] % 16 == 0 and (np.diff(row.tokens) == 1).all()
        assert row.borders.tolist() == [0, 5, 13] and row.spans.tolist() == [[13, 3, 2]]
    assert Counter(int(row.tokens[0]) for row in rows) == dict.fromkeys(range(0, 400, 16), 3)
