"""A checksum of a tensor's bits that no single change and no swap can leave as it was.

S = sum over elements of v * m mod 2^64, v an element's bits as a signed integer, m an odd multiplier that follows from its place.
- One element changed, by however many bits: |dv| < 2^32 and m is odd, so dv m is not 0 mod 2^64.
- Two elements swapped: (v - w)(m - n) has at most 31 factors of two from v - w (they differ, below 2^32) and at most 32 from m - n
  (see `_multipliers`), so it is not 0 either.
Anything else goes unseen with a chance of about 2^-64. Sums of integers do not depend on their order: the same on every device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

_TILE = 1 << 20
_BETWEEN_TILES = 2 * _TILE
_AT_ONCE = 8  # tiles multiplied in one go: 64 MiB of products
LARGEST = 1 << 32  # elements, for the promise about swaps
_BITS = {2: torch.int16, 4: torch.int32}
_A, _B = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F  # odd; any odd numbers would do


@functools.cache
def _multipliers(device: torch.device) -> Tensor:
    """m of each place of a tile, int64 [_TILE]: 2 (a i + 2 b i^2) + 1 mod 2^64.

    The difference of two is 2 (i - j)(a + 2 b (i + j)), with as many factors of two as 2 (i - j): at most 20 here. Tile number c
    multiplies by 1 + 2^21 c. Unequal places of whatever tiles then still differ by at most 20 factors, equal places of tiles c
    and d by 21 and those of c - d: 32 below 2^12 tiles. The square is there so that m does not grow evenly: with m = 2 i + 1 three
    neighbours that change by 1, -2 and 1 would cancel.
    """
    place = torch.arange(_TILE, dtype=torch.int64, device=device)
    return 2 * (place * _signed(_A) + 2 * place * place * _signed(_B)) + 1


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    number %= 1 << 64
    return number - (1 << 64) if number >> 63 else number


@torch.no_grad()
def checksum(parts: Iterable[Tensor]) -> Tensor:
    """The checksum of some tensors of 16- or 32-bit elements, in their order: int64 [] on their device, without waiting for it.

    Tensors of other shapes but the same elements in the same order have the same checksum; how elements are cut into `parts`
    counts. No parts, or empty ones: 0. Raises ValueError for elements of another size.
    """
    total: Tensor | None = None
    tile = 0
    for part in parts:
        if part.element_size() not in _BITS:
            raise ValueError(f"checksum of {part.dtype}: only 16- and 32-bit elements")
        bits = part.detach().contiguous().view(-1).view(_BITS[part.element_size()])
        whole = bits.numel() // _TILE
        rest = bits[whole * _TILE :]
        rows = [r for r in bits[: whole * _TILE].view(whole, _TILE).split(_AT_ONCE) if len(r)]
        for row in [*rows, *([rest[None]] if rest.numel() else [])]:
            sums = (row * _multipliers(part.device)[: row.shape[1]]).sum(1)
            numbers = torch.arange(tile, tile + len(row), device=part.device)
            found = (sums * (1 + _BETWEEN_TILES * numbers)).sum()
            total = found if total is None else total + found
            tile += len(row)
    return torch.zeros((), dtype=torch.int64) if total is None else total


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Whether two tensors of one shape and dtype hold the same bits, bool [] on their device: NaN equals itself, 0 is not -0."""
    bits = _BITS[a.element_size()]
    return (a.detach().contiguous().view(bits) == b.detach().contiguous().view(bits)).all()
