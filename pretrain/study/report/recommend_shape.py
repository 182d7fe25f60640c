"""A model of a wanted size: the nearest one of a family, or a shape between (or beyond) its sizes that keeps its proportions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from pretrain.study.design.family import Size
from pretrain.study.report.numbers import count

NEAR = 0.1  # ln of the ratio up to which a size of the family itself is taken


def shape_for(wanted: float, family: Mapping[str, Size], counted: Callable[[Size], int]) -> tuple[str, Size]:
    """(name, size) with about `wanted` parameters. counted: the parameters of a size, as the study counts them.

    A size of the family where one is within 10 %, else one with the width, depth, width of a head, feed-forward ratio and share of
    key-value heads that the family has there; its name is then its parameters.
    """
    nearest = min(family, key=lambda name: abs(math.log(counted(family[name]) / wanted)))
    if abs(math.log(counted(family[nearest]) / wanted)) <= NEAR:
        return nearest, family[nearest]
    size = between(wanted, family, counted)
    return count(counted(size)).replace(" ", ""), size


def between(wanted: float, family: Mapping[str, Size], counted: Callable[[Size], int]) -> Size:
    """The legal shape that misses `wanted` and the family's trends of width and depth (both powers of N) the least."""
    sizes = sorted(family.values(), key=counted)
    like = min(sizes, key=lambda size: abs(math.log(counted(size) / wanted)))
    head, grouped = like.hidden_size // like.num_heads, like.num_heads // like.num_kv_heads
    ratio, grain = like.ffn_hidden_size / like.hidden_size, math.gcd(*(size.ffn_hidden_size for size in sizes))
    counts = [counted(size) for size in sizes]
    width = _trend([size.hidden_size for size in sizes], counts, wanted)
    depth = _trend([size.num_layers for size in sizes], counts, wanted)
    best, least = like, math.inf
    for heads in range(max(1, math.floor(width / head / 2)), max(2, math.ceil(2 * width / head)) + 1):
        if heads % grouped:
            continue
        ffn = max(1, round(ratio * heads * head / grain)) * grain
        one, two = (counted(Size(layers, heads, heads * head, ffn, heads // grouped)) for layers in (1, 2))
        fitting = max(1, round((wanted - (2 * one - two)) / (two - one)))
        for layers in {max(1, fitting - 1), fitting, fitting + 1}:
            size = Size(layers, heads, heads * head, ffn, heads // grouped)
            counts_of = one + (layers - 1) * (two - one)  # every layer is alike
            missed = 8 * abs(math.log(counts_of / wanted))  # the size counts more than its proportions
            missed += abs(math.log(size.hidden_size / width)) + abs(math.log(layers / depth))
            if missed < least:
                best, least = size, missed
    return best


def _trend(values: Sequence[int], counts: Sequence[int], wanted: float) -> float:
    """values as a power of counts, by least squares, at `wanted`; a cube root where the family has one size."""
    x, y = [math.log(c) for c in counts], [math.log(v) for v in values]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle_x) ** 2 for a in x)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y)) / spread if spread > 1e-9 else 1 / 3
    return math.exp(middle_y + slope * (math.log(wanted) - middle_x))
