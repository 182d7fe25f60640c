"""What row losses of the whole predicted distribution share: each row's softmax, and how kernels pass over a chunk's logits.

Such a loss needs the softmax's normaliser, joined over the ranks, before it can sum over the vocabulary: two exchanges a chunk.
1 - p_target is summed from the other probabilities and never subtracted, so that nothing is lost where the target is nearly sure.

Kernels are plain functions of logits [r, V], tensors of one entry a row [r] and numbers; they take rows one by one. Compiled where
that is possible; else a few rows at a time, so that what they make in passing is small beside the chunk.

Legend: c rows of one chunk, r some of them, V vocab rows of this rank, p probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.row_loss import Rows, VocabShard, can_compile, compiled, first_hit, gather_logit, lowest_finite

_BLOCK_NUMBERS = (
    2**18
)  # logits that a kernel takes at once where it is not compiled: they and its temporaries stay in the cache


class Softmax(NamedTuple):
    """Each row's softmax over the real vocab, and where its target (and current token) is. p = exp(logit - top) / total."""

    top: Tensor  # [c]
    total: Tensor  # [c]
    ce: Tensor  # [c] -log p of the target
    correct: Tensor  # [c] bool
    column: Tensor  # [c] of the target in this rank's logits, else -1
    target: Tensor  # [c] p of the target
    others: Tensor  # [c] 1 - p of the target, to full relative precision
    current_column: Tensor  # [c] the same of the current token; the target's where there is none
    current: Tensor  # [c]
    broken: Tensor  # [c] bool: logits that are not finite, or an id that no rank holds


def softmax_rows(logits: Tensor, rows: Rows, shard: VocabShard) -> Softmax:
    """One pass over [c, V] logits and one exchange."""
    column = shard.column(rows.targets)
    current_column = column if rows.current is None else shard.column(rows.current)
    row_max, others, argmax = reduce_rows(_statistics, logits, column)
    hit = (argmax == column).to(logits.dtype)
    local = (row_max, others, gather_logit(logits, column), hit, gather_logit(logits, current_column))
    row_max, others, target, hit, current = shard.gather(torch.stack(local)).unbind(1)
    top, target, current = row_max.amax(0), target.amax(0), current.amax(0)
    rest = torch.zeros_like(top)
    for k in range(shard.ranks):
        rest += others[k] * (row_max[k] - top).exp()
    at_target = (target - top).exp()
    total = rest + at_target
    ce = total.log() + (top - target)
    return Softmax(
        top=top,
        total=total,
        ce=ce,
        correct=first_hit(row_max, hit),
        column=column,
        target=at_target / total,
        others=rest / total,
        current_column=current_column,
        current=(current - top).exp() / total,
        broken=~(ce.isfinite() & current.isfinite()),
    )


def _statistics(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row max, sum of exp(logit - row max) of all but the target, first column of the max; each [r]."""
    row_max = lowest_finite(logits.amax(1))
    exps = torch.where(columns(logits) == column[:, None], 0.0, (logits - row_max[:, None]).exp())
    return row_max, exps.sum(1), logits.argmax(1)


def columns(logits: Tensor) -> Tensor:
    """[r, V] -> [V]: 0, 1, ..., V - 1."""
    return torch.arange(logits.shape[1], device=logits.device)


def probabilities(logits: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """[r, V]; exactly 0 at padding."""
    return (logits - top[:, None]).exp() / total[:, None]


def reduce_rows(kernel: Callable[..., tuple[Tensor, ...]], logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """kernel(logits, *arguments) -> tensors [c], of logits [c, V] and arguments that are [c] or numbers."""
    if can_compile(logits.device.type):
        return compiled(kernel)(logits, *arguments)
    parts = [kernel(logits[block], *_cut(arguments, block)) for block in _blocks(logits)]
    return tuple(torch.cat(found) for found in zip(*parts, strict=True))


def map_rows(kernel: Callable[..., Tensor], logits: Tensor, *arguments: Any, dtype: torch.dtype) -> Tensor:
    """kernel(logits, *arguments) -> [c, V], as `dtype`. May overwrite the logits; nothing is rounded before the end."""
    if can_compile(logits.device.type):
        return compiled(kernel)(logits, *arguments, dtype=dtype)
    for block in _blocks(logits):
        logits[block] = kernel(logits[block], *_cut(arguments, block), dtype=logits.dtype)
    return logits.to(dtype)


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK_NUMBERS // logits.shape[1])
    return (slice(start, start + size) for start in range(0, logits.shape[0], size))


def _cut(arguments: tuple[Any, ...], block: slice) -> Iterator[Any]:
    return (a[block] if isinstance(a, Tensor) else a for a in arguments)
