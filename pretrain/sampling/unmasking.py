"""Masked-diffusion sampling: mask tokens are revealed step by step, the model sees the whole sequence every time.

The reverse process of LLaDA (Nie et al., "Large Language Diffusion Models", arXiv 2502.09992, Algorithms 4 and 5):

    fill positions of a row -> blocks, in order -> steps of a block -> every step: one forward, a token chosen for each
    open position of the block, and exactly the scheduled number of them revealed for good

Blocks are of so many open positions (any masked model), or the blocks of positions that a block model was trained on (Arriola et
al., arXiv 2503.09573, Algorithm 2; finished blocks are read again in every forward: no keys and values are kept).

Shapes: B rows, L positions, V vocabulary; n open positions of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from data import randomness
from pretrain.sampling.logits import Guided, gumbel_choice, put
from pretrain.sampling.options import SamplingOptions


def reveal_schedule(sizes: Sequence[int], steps: int) -> list[tuple[int, int]]:
    """One (block, number to reveal) per step of a row whose blocks have `sizes` positions to fill; the numbers sum to theirs.

    Steps are shared among blocks in proportion to their sizes (at least one each); inside a block the numbers are as
    even as they can be, the larger ones first (LLaDA, generate.py: get_num_transfer_tokens).
    """
    schedule, count, start = [], sum(sizes), 0
    for block, size in enumerate(sizes):
        stop = start + size
        block_steps = max(1, steps * stop // count - steps * start // count)
        base, remainder = divmod(size, block_steps)
        schedule += [(block, base + (step < remainder)) for step in range(block_steps)]
        start = stop
    return schedule


def number_blocks(still_open: np.ndarray, block_length: int, aligned: bool) -> np.ndarray:
    """Which block each open position belongs to, counted from 0 in each row: [B, L] int64, meaningless where nothing is open.

    Blocks of `block_length` open positions (0: one block), or `aligned`: those of the positions block_length k to
    block_length (k + 1) - 1 that hold an open one.
    """
    if not aligned:
        return (np.cumsum(still_open, axis=1) - 1) // (block_length or max(still_open.shape[1], 1))
    column = np.broadcast_to(np.arange(still_open.shape[1]) // block_length, still_open.shape)
    numbers = np.zeros(still_open.shape, np.int64)
    for row, (blocks, is_open) in enumerate(zip(column, still_open)):
        numbers[row] = np.searchsorted(np.unique(blocks[is_open]), blocks)
    return numbers


def unmask(
    guided: Guided,
    ids: Tensor,
    still_open: np.ndarray,
    options: SamplingOptions,
    *,
    block_size: int,
    eos_id: int | None,
    on_step: Callable[[int, Tensor], None] | None,
    first_row: int,
) -> Tensor:
    """Fills the open positions ([B, L] bool) of `ids`, which is changed; see pretrain.sampling.sampler.generate.

    block_size: of a block model, 0 for any other. eos_id: where given, positions that chose it are revealed last in their
    block (only with `low_confidence`): end-of-text is easy to predict, and revealed first it cuts answers short.
    """
    still_open = still_open.copy()  # tracked here and not read back from the ids
    block_of = number_blocks(still_open, block_size or options.block_length, aligned=block_size > 0)
    schedules = [
        reveal_schedule(np.bincount(blocks[is_open]).tolist(), options.steps)
        for blocks, is_open in zip(block_of, still_open)
    ]
    if options.remasking == "random":  # one random order of all positions per row
        words = [randomness.words(options.seed, "sample_reveal", first_row + i, ids.shape[1]) for i in range(len(ids))]
        scores = np.stack(words)
    for step in range(max(map(len, schedules), default=0)):
        plan = [schedule[step] if step < len(schedule) else (0, 0) for schedule in schedules]
        block, reveal = np.array(plan, np.int64).T  # [B] each
        if not reveal.any():
            continue
        rows, positions = np.nonzero(still_open & (block_of == block[:, None]) & (reveal[:, None] > 0))
        logits = guided.at(ids, rows, positions)
        tokens, confidence = gumbel_choice(logits, rows + first_row, options.temperature, options.seed, step)
        if options.remasking == "random":
            priority = scores[rows, positions]
            last = np.zeros(len(rows), bool)
        else:
            priority, last = -confidence, tokens == (-1 if eos_id is None else eos_id)
        order = np.lexsort((positions, priority, last, rows))  # by row, then last, then priority; ties: lowest position
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)  # of each place in `order`, counted within its row
        chosen = order[rank < reveal[rows]]
        still_open[rows[chosen], positions[chosen]] = False
        put(ids, rows[chosen], positions[chosen], tokens[chosen])
        if on_step is not None:
            on_step(step, ids.clone())
    return ids
