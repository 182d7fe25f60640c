"""The problem of the visibility tests: causal, look-ahead and block rows, other documents and blocks in each microbatch."""

from __future__ import annotations

import torch

from tests import visibility_cases
from tests.distributed import training_case

MODEL, SEED, LENGTH, SAMPLES, MICROBATCHES, NORMALIZER = training_case.MODEL, training_case.SEED, 12, 2, 4, 50.0
HALF = LENGTH // 2
KINDS = ("causal", "one ahead", "two copies")
# For microbatch i: the lengths of its samples' documents (padding behind them), in a row or in each of its two copies.
ROWS = (((5, 1, 6), (10,)), ((12,), (12,)), ((3, 3, 3), (1, 11)), ((12,), (2, 2)))
COPIES = (((6,), (6,)), ((4, 2), (5,)), ((6,), (6,)), ((1, 5), (3, 3)))
BLOCKS = (1, 2, 3, 4)


def _numbers(lengths: tuple[int, ...], width: int) -> tuple[list[int], list[int]]:
    """(document ids, positions counted anew in each document) of one row."""
    ids = [number for number, size in enumerate(lengths) for _ in range(size)]
    positions = [at for size in lengths for at in range(size)]
    rest = width - len(ids)
    return ids + [-1] * rest, positions + list(range(rest))


def microbatches(kind: str) -> list[dict[str, torch.Tensor]]:
    """All of the global batch, in order; half of the tokens count, of two copies only noisy ones."""
    draw = torch.Generator().manual_seed(SEED)
    found = []
    for rows, copies, size in zip(ROWS, COPIES, BLOCKS):
        two = kind == "two copies"
        numbers = [_numbers(lengths, HALF if two else LENGTH) for lengths in (copies if two else rows)]
        documents, positions = (torch.tensor([row[i] * (1 + two) for row in numbers]).int() for i in range(2))
        clean = torch.randint(2, MODEL.vocab_size, (SAMPLES, LENGTH), generator=draw)
        masked = (torch.rand(clean.shape, generator=draw) < 0.5) & (documents >= 0)
        if two:
            masked[:, HALF:] = False
            clean[:, :HALF] = clean[:, HALF:]
            visibility = visibility_cases.two_copies(SAMPLES, HALF, size)
        else:
            visibility = visibility_cases.look_ahead(SAMPLES, LENGTH, int(kind == "one ahead"))
        found.append(
            {
                "noisy_ids": clean.masked_fill(masked, training_case.MASK),
                "target_ids": clean,
                "masked": masked,
                "weight": masked * (1 + torch.rand(clean.shape, generator=draw)),
                "position_ids": positions,
                "document_ids": documents,
                "visibility": visibility,
            }
        )
    return found
