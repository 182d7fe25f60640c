"""Visibilities that training and sampling make, written from their definitions, and who sees whom by them, by enumeration."""

from __future__ import annotations

import torch
from torch import Tensor

UNSEEN = 2**30


def _together(rank: Tensor, reach: Tensor, group: Tensor | int, samples: int) -> Tensor:
    group = group if isinstance(group, Tensor) else torch.full_like(rank, group)
    return torch.stack((rank, reach, group), -1).int().expand(samples, -1, -1).contiguous()


def look_ahead(samples: int, length: int, tokens: int) -> Tensor:
    """[samples, length, 3]: every token sees those before it and `tokens` after it; 0: causal."""
    column = torch.arange(length)
    return _together(column, column + tokens, -1, samples)


def one_copy(samples: int, length: int, size: int) -> Tensor:
    """[samples, length, 3]: every token sees its block of `size` tokens and the blocks before."""
    block = torch.arange(length) // size
    return _together(block, block, -1, samples)


def two_copies(samples: int, length: int, size: int) -> Tensor:
    """[samples, 2 length, 3]: a noisy copy, whose blocks see themselves and the clean blocks before; then the clean copy."""
    block = torch.arange(length) // size
    unseen, none = torch.full_like(block, UNSEEN), torch.full_like(block, -1)
    rank, reach, group = torch.cat((unseen, block)), torch.cat((block - 1, block)), torch.cat((block, none))
    return _together(rank, reach, group, samples)


def seen(visibility: Tensor | None, documents: Tensor) -> Tensor:
    """[B, L, L] bool: whether query (second) sees key (third), token by token."""
    samples, length = documents.shape
    result = torch.zeros(samples, length, length, dtype=torch.bool)
    for b in range(samples):
        rules = visibility[b].tolist() if visibility is not None else [(0, 0, -1)] * length
        ids = documents[b].tolist()
        for i, (_, reach, group) in enumerate(rules):
            for j, (rank, _, other) in enumerate(rules):
                result[b, i, j] = ids[i] == ids[j] and (rank <= reach or (group >= 0 and group == other))
    return result


def blocks_of_two_copies(length: int, size: int) -> Tensor:
    """[2 length, 2 length] bool, from the words of the paper rather than from ranks: who sees whom in [noisy, clean]."""
    result = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for i in range(2 * length):
        for j in range(2 * length):
            query, key = i % length // size, j % length // size
            noisy_query, noisy_key = i < length, j < length
            if noisy_key:
                result[i, j] = noisy_query and query == key
            else:
                result[i, j] = key < query if noisy_query else key <= query
    return result
