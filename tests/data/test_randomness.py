"""Draws are Philox's own numbers, each owned by (seed, purpose, index, epoch), whatever was drawn before or in another thread."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest

from data import randomness

M = (1 << 64) - 1


def philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 in plain integers (Salmon et al., SC 2011, section 3.3), the counter as [low, ..., high]."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & M, (a >> 64) ^ c3 ^ k1, a & M
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & M, (k1 + 0xBB67AE8584CAA73B) & M
    return [c0, c1, c2, c3]


def test_words_are_philox_with_the_index_and_the_epoch_in_the_counter():
    """numpy counts up before it draws: the first block is that of counter 1."""
    key = randomness._key(5, "mask")
    for index, epoch in ((0, 0), (7, 0), (7, 3), (2**40, 1)):
        expected = [*philox([1, index, epoch, 0], key), *philox([2, index, epoch, 0], key)][:7]
        assert randomness.words(5, "mask", index, 7, epoch).tolist() == expected
        assert randomness.generator(5, "mask", index, epoch).random_raw(7).tolist() == expected


def test_chances_are_philox_with_the_index_in_the_lowest_word():
    key = randomness._key(5, "drop")
    for index in (0, 1, 63, 64, 1000, 2**40 + 9):
        raw = philox([index + 1, 0, 2, 1], key)
        got = [randomness.chance(5, "drop", index, which, epoch=2) for which in range(4)]
        assert got == [((word >> 11) + 1) * 2.0**-53 for word in raw]


def test_no_two_purposes_indices_or_epochs_share_a_number():
    seen = [
        word
        for purpose in ("a", "b")
        for seed in (0, 1)
        for index in range(20)
        for epoch in (0, 1)
        for word in randomness.words(seed, purpose, index, 5, epoch).tolist()
    ]
    assert len(set(seen)) == len(seen)
    chances = [randomness.chance(s, p, i, w) for s in (0, 1) for p in ("a", "b") for i in range(200) for w in range(4)]
    assert len(set(chances)) == len(chances) and 0 < min(chances) and max(chances) <= 1
    assert abs(np.mean(chances) - 0.5) < 4 * 12**-0.5 / len(chances) ** 0.5


def test_threads_do_not_disturb_each_other():
    expected = [randomness.words(0, "x", i, 50).tolist() for i in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: randomness.words(0, "x", i % 40, 50).tolist(), range(2000)))
    assert all(words == expected[i % 40] for i, words in enumerate(found))


@pytest.mark.parametrize("probability", [0.001, 0.3, 1 / 3, 0.5, 1 - 2**-20, 5 / 65536])
def test_bernoulli_draws_are_the_comparison_of_48_bits_with_the_probability(probability):
    """Against the definition, digit by digit; 3 * 2**16 draws meet the tie of the first 16 bits about three times."""
    count = 3 << 16
    drawn = randomness.bernoulli(1, "b", 9, count, probability)
    size = count // 4
    coarse = randomness.words(1, "b", 9, size).view(np.uint16).astype(np.int64)
    whole = round(probability * 2**48)
    ties = np.flatnonzero(coarse == whole >> 32)
    fine = randomness.words(1, "b", 9, size + count)[size:].view(np.uint32)
    number = coarse << 32
    number[ties] += fine[: len(ties)]
    expected = number < whole
    assert np.array_equal(drawn, expected)
    assert abs(drawn.mean() - probability) < 5 * (probability * (1 - probability) / count) ** 0.5 + 1e-12


def test_bernoulli_at_the_ends():
    assert not randomness.bernoulli(0, "b", 0, 100, 0.0).any() and randomness.bernoulli(0, "b", 0, 100, 1.0).all()
    tie = randomness.bernoulli(1, "b", 9, 3 << 16, 0.3)
    assert len(tie) == 3 << 16
