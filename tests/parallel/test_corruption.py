"""The checksum: what it must see it sees by arithmetic, not by luck; and who is named for what differs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parallel import checksum as module
from parallel.checksum import _A, _B, _BETWEEN_TILES, _TILE, checksum, same_bits
from parallel.corruption import CorruptionError, Finding, _odd_ones_out, between_shares, require_none


def by_hand(values: torch.Tensor) -> int:
    """The same sum in whole numbers without end, element by element, reduced once."""
    bits = values.view(torch.int32 if values.element_size() == 4 else torch.int16).tolist()
    total = 0
    for place, value in enumerate(bits):
        tile, i = divmod(place, _TILE)
        total += value * (2 * (_A * i + 2 * _B * i * i) + 1) * (1 + _BETWEEN_TILES * tile)
    total %= 1 << 64
    return total - (1 << 64) if total >> 63 else total


def multiplier(place: int) -> int:
    tile, i = divmod(place, _TILE)
    return (2 * (_A * i + 2 * _B * i * i) + 1) * (1 + _BETWEEN_TILES * tile) % (1 << 64)


def random(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Any bits: NaNs, infinities, both zeros and numbers."""
    draw = np.random.default_rng(count).integers(-(2**31), 2**31, count, dtype=np.int64)
    whole = torch.from_numpy(draw)
    if dtype == torch.float32:
        return whole.to(torch.int32).view(dtype)
    return (whole >> 16).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_it_is_the_sum_that_the_formula_says(dtype, count):
    values = random(count, dtype)
    assert int(checksum([values])) == by_hand(values)
    assert int(checksum([values.view(-1, 1)])) == by_hand(values), "the shape does not count"


def test_it_is_that_sum_across_tiles_too():
    values = torch.zeros(10 * _TILE + 7)
    places = [0, 1, _TILE - 1, _TILE, 3 * _TILE + 5, 8 * _TILE, 9 * _TILE - 1, 10 * _TILE, 10 * _TILE + 6]
    values[places] = random(len(places))
    bits = values.view(torch.int32)
    total = sum(int(bits[place]) * multiplier(place) for place in places) % (1 << 64)
    assert int(checksum([values])) % (1 << 64) == total


def test_parts_follow_each_other_and_where_they_lie_in_memory_does_not_count():
    values = random(100)
    assert checksum([values[:40], values[40:]]) != checksum([values[40:], values[:40]])
    assert checksum([values.view(10, 10).t()]) == checksum([values.view(10, 10).t().contiguous()])
    assert checksum([]) == checksum([values[:0]]) == 0
    with pytest.raises(ValueError, match="float64"):
        checksum([values.double()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_single_bit_changes_it(dtype):
    values = random(257, dtype)
    bits = values.view(torch.int32 if dtype == torch.float32 else torch.int16)
    before = int(checksum([values]))
    for place in range(257):
        for bit in range(8 * bits.element_size()):
            mask = 1 << bit if bit < 8 * bits.element_size() - 1 else -(1 << bit)
            bits[place] ^= mask
            assert int(checksum([values])) != before, (place, bit)
            bits[place] ^= mask
    assert int(checksum([values])) == before


def test_a_swap_of_any_two_values_changes_it_even_where_arithmetic_is_least_kind():
    """The difference of values has at most 31 factors of two, that of multipliers at most 32: here both are as many as can be."""
    worst = (
        [(0, _TILE << k) for k in range(11)] + [(5, 5 + (1 << k)) for k in range(20)] + [(1, _TILE), (7, 3 * _TILE + 7)]
    )
    for a, b in worst:
        for x, y in ((-(2**31), 0), (-(2**31), -1), (2**30, -(2**30)), (1, 0), (-(2**31), 2**31 - 1)):
            changed = (x - y) * (multiplier(a) - multiplier(b))
            assert changed % (1 << 64), (a, b, x, y)
    twos = max(((multiplier(a) - multiplier(b)) & -(multiplier(a) - multiplier(b))).bit_length() - 1 for a, b in worst)
    assert twos == 31, "of two tiles a power of two apart; 2^11 tiles are within what is promised"
    draw = np.random.default_rng(0)
    values = random(3 * _TILE + 11)
    before = int(checksum([values]))
    for _ in range(20):
        a, b = draw.integers(0, len(values), 2)
        values[[a, b]] = values[[b, a]]
        assert int(checksum([values])) != before or torch.equal(values[a : a + 1], values[b : b + 1])
        values[[a, b]] = values[[b, a]]


def test_a_checksum_without_places_misses_a_swap_and_one_with_even_places_a_pattern():
    values = torch.arange(1.0, 9.0)
    swapped = values[[3, 1, 2, 0, 4, 5, 6, 7]]
    assert values.view(torch.int32).sum() == swapped.view(torch.int32).sum()
    assert checksum([values]) != checksum([swapped])
    bits, places = values.view(torch.int32).clone(), 2 * torch.arange(8) + 1
    pattern = bits + torch.tensor([0, 1, -2, 1, 0, 0, 0, 0], dtype=torch.int32)
    assert (bits * places).sum() == (pattern * places).sum()
    assert checksum([bits.view(torch.float32)]) != checksum([pattern.view(torch.float32)])


def test_it_needs_no_more_memory_than_a_few_tiles():
    assert module._AT_ONCE * _TILE * 8 == 64 << 20


def test_bits_are_compared_not_numbers():
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.ones(2, 3).t(), torch.ones(3, 2))


@pytest.mark.parametrize(
    "held, named",
    [
        ({0: 5, 1: 5}, ()),
        ({0: 5, 1: 6}, (0, 1)),
        ({0: 5, 3: 6, 7: 5}, (3,)),
        ({0: 5, 1: 5, 2: 6, 3: 6}, (0, 1, 2, 3)),
        ({0: 5, 1: 6, 2: 7}, (0, 1, 2)),
        ({0: 5, 1: 5, 2: 5, 3: 6, 4: 7}, (3, 4)),
        ({9: 1}, ()),
    ],
)
def test_the_odd_ones_out_are_named_and_all_where_there_is_no_majority(held, named):
    assert _odd_ones_out(held) == named


def test_a_finding_is_a_sentence_that_names_tensor_rank_and_host():
    odd = Finding("copies", "weight/final_norm.weight", (3,), ("n7",), 4)
    assert str(odd) == "weight/final_norm.weight of rank 3 on n7 differs from the other 3 of 4 copies"
    both = Finding("copies", "forward/head.weight", (0, 1), ("a", "b"), 2)
    assert "2 copies disagree" in str(both) and "rank 0 on a, rank 1 on b" in str(both)
    require_none([])
    with pytest.raises(CorruptionError, match=r"exp_avg/x of rank 1 on b changed between two updates"):
        require_none([Finding("changed", "exp_avg/x", (1,), ("b",))])


def test_a_difference_between_tensor_parallel_ranks_alone_may_be_rounding_and_any_other_is_not():
    assert between_shares({0: 1, 1: 2, 2: 1, 3: 2}, tp=2), "each agrees with its data-parallel peer"
    assert not between_shares({0: 1, 1: 2, 2: 1, 3: 3}, tp=2), "ranks 1 and 3 hold the same and disagree"
    assert not between_shares({0: 1, 2: 2}, tp=2), "no two tensor-parallel ranks here"
    require_none([Finding("copies", "forward/a.gain", (1,), ("h",), 2, rounding=True)])
    with pytest.raises(CorruptionError, match="b.gain"):
        require_none(
            [
                Finding("copies", "forward/a.gain", (1,), ("h",), 2, rounding=True),
                Finding("copies", "forward/b.gain", (1,), ("h",), 2),
            ]
        )
