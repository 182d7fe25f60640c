"""Laws of mixtures: shares, exact epochs, caps, and that block g depends on g alone."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.mixture import Ingredient, Mixture, shares
from data.stream import BlockStream
from tests.data.test_stream import Positions


def mixture(weights, tokens=None, epochs=None, length=4, seed=0) -> Mixture:
    tokens = tokens or [400] * len(weights)
    epochs = epochs or [None] * len(weights)
    return Mixture(
        [
            Ingredient(f"s{i}", BlockStream(Positions(n), length, f"{seed}/s{i}", 16), w, e)
            for i, (w, n, e) in enumerate(zip(weights, tokens, epochs, strict=True))
        ],
        seed,
    )


def test_every_stretch_of_blocks_holds_nearly_the_exact_shares():
    """Each source is off by less than one block in any stretch from where the pattern begins, so by less than two in any, and
    by a percent of its share.
    """
    weights = np.array([0.62, 0.25, 0.1, 0.03])
    mixed = mixture(weights)
    sources = np.array([mixed.source(g)[0] for g in range(20000)])
    counts = np.cumsum(sources[:, None] == np.arange(4), axis=0)
    for size in (32, 100, 1280, 15000):
        windows = counts[size:] - counts[:-size]
        assert (np.abs(windows - size * weights) < 2 + 0.01 * size * weights).all()


@pytest.mark.parametrize("tokens", [(10**12, 10**9, 2 * 10**8), (10**11, 4 * 10**7), (10**12, 2 * 10**7)])
def test_sources_that_count_by_their_tokens_are_read_through_equally_often(tokens):
    counts = shares(np.array(tokens, np.float64))
    often = counts / counts.sum() * sum(tokens) / tokens
    assert np.abs(often - 1).max() < 0.1 and counts.sum() <= 1.1 * (1 << 22)


def test_a_weight_that_no_pattern_can_keep_is_refused():
    with pytest.raises(InputError, match="smallest weight is 1.0e-09"):
        shares(np.array([1.0, 1e-9]))


@given(
    weights=st.lists(st.floats(0, 5), min_size=1, max_size=5),
    caps=st.lists(st.one_of(st.none(), st.floats(0.01, 3)), min_size=5, max_size=5),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_block_numbers_of_each_source_count_up_without_gap_and_stop_at_its_cap(weights, caps, seed):
    positive = [w for w in weights if w > 0]
    if not positive or min(positive) < 1e-3 * sum(positive):
        return
    tokens = [400 + 37 * i for i in range(len(weights))]
    mixed = mixture(weights, tokens, caps[: len(weights)], seed=seed)
    given_: Counter = Counter()
    total = min(mixed.total, 1500) if mixed.total is not None else 1500
    for g in range(total):
        if g % 97 == 0:
            assert mixed.epochs(g) == {f"s{i}": given_[i] * 4 / tokens[i] for i in range(len(weights))}
        source, local = mixed.source(g)
        assert local == given_[source] and weights[source] > 0
        given_[source] += 1
        if caps[source] is not None:
            assert given_[source] <= np.ceil(caps[source] * tokens[source] / 4)
    if mixed.total is not None and mixed.total == total:
        for i, weight in enumerate(weights):
            assert given_[i] == (np.ceil(caps[i] * tokens[i] / 4) if weight > 0 else 0)
        with pytest.raises(InputError, match="give .* samples in all"):
            mixed.block(mixed.total)


def test_a_capped_source_gives_its_share_until_it_is_read_through_and_the_others_then_share_the_rest():
    mixed = mixture([0.5, 0.3, 0.2], [400, 4000, 4000], [2, None, None])
    sources = [mixed.source(g)[0] for g in range(4000)]
    end = max(g for g, source in enumerate(sources) if source == 0) + 1
    assert sources.count(0) == 200 and abs(end - 400) <= 2
    rest = sources[end:]
    assert abs(rest.count(1) / len(rest) - 0.6) < 0.01
    tokens = np.concatenate([mixed.block(g).tokens for g in range(end) if sources[g] == 0])
    assert Counter(tokens.tolist()) == dict.fromkeys(range(400), 2), "each token exactly once an epoch"


def test_a_block_depends_on_its_number_alone_and_names_its_source():
    mixed = mixture([1, 3], [500, 700], [1.5, None])
    blocks = {g: mixed.block(g) for g in range(900)}
    fresh = pickle.loads(pickle.dumps(mixture([1, 3], [500, 700], [1.5, None])))
    for g in (899, 0, 500, 499, 77):
        block = fresh.block(g)
        assert np.array_equal(block.tokens, blocks[g].tokens) and block.source == blocks[g].source == mixed.source(g)[0]
    assert [mixture([1, 3], seed=1).source(g) for g in range(50)] != [mixture([1, 3]).source(g) for g in range(50)]


def test_a_source_keeps_its_order_when_another_joins():
    alone, joined = mixture([1]), mixture([1, 1])
    of_first = [joined.block(g).tokens.tolist() for g in range(200) if joined.source(g)[0] == 0]
    assert of_first == [alone.block(g).tokens.tolist() for g in range(len(of_first))]


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -0.1], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_make_no_sense_are_refused(weights):
    with pytest.raises(InputError, match="weights must be >= 0"):
        mixture(weights)
