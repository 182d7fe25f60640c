"""What a row loss is: the number that each counted row adds, as a function of its logits, over a vocab-parallel shard.

The loop over chunks (parallel.loss) makes the logits and turns gradients of logits into those of hidden states and matrix; a
row loss turns a chunk's logits into values and that gradient. Ranks exchange a few numbers a row and combine them in rank order.

Legend: c rows of one chunk, V vocab rows of this rank. "wide" is the dtype of logits, statistics and sums.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


@dataclass(frozen=True)
class VocabShard:
    """Which token ids this rank's rows of the unembedding stand for."""

    group: Optional[dist.ProcessGroup]
    rank: int
    ranks: int
    rows: int
    vocab_size: int

    @property
    def first_id(self) -> int:
        return self.rank * self.rows

    @property
    def real_rows(self) -> int:
        """Rows that are not padding; they come first."""
        return min(max(self.vocab_size - self.first_id, 0), self.rows)

    def column(self, ids: Tensor) -> Tensor:
        """[c] token ids -> [c] column in this rank's logits, -1 where another rank (or none) has it."""
        column = ids - self.first_id
        return torch.where((column >= 0) & (column < self.real_rows), column, -1)

    def gather(self, statistics: Tensor) -> Tensor:
        """[k, c] of this rank -> [ranks, k, c], the same bits on every rank. One all-gather."""
        if self.ranks == 1:
            return statistics[None]
        gathered = statistics.new_empty(self.ranks, *statistics.shape)
        all_gather(gathered.flatten(0, 1), statistics, group=self.group)
        return gathered

    def sum(self, statistics: Tensor) -> Tensor:
        """[k, c] of this rank -> [k, c] summed over the ranks, in rank order: no backend's reduction order shows in the bits."""
        total = torch.zeros_like(statistics)
        for part in self.gather(statistics):
            total += part
        return total


class Rows(NamedTuple):
    """What is known of a chunk's rows, beside their logits."""

    targets: Tensor  # [c] int64 token ids
    scale: Tensor  # [c] wide: d loss / d value
    current: Optional[Tensor] = None  # [c] int64: the corrupted token z_t
    alpha: Optional[Tensor] = None  # [c] wide: alpha_t


class RowValues(NamedTuple):
    """What a row loss makes of a chunk. A broken row (logits that are not finite, an id outside the vocab) has value and gradient
    that are not finite: an engine that only looks at gradients must see it too."""

    value: Tensor  # [c] wide: what the loss adds up
    ce: Tensor  # [c] wide: cross entropy of the target, nats
    correct: Tensor  # [c] bool: argmax of the logits is the target (on a tie the lowest id wins)
    logits_grad: Optional[Tensor]  # [c, V]: scale * d value / d logits


class RowLoss(Protocol):
    """One kind of row loss, chosen when the model is built."""

    @property
    def needs_noise(self) -> bool:
        """Whether it reads `current` and `alpha`."""
        ...

    def __call__(self, logits: Tensor, rows: Rows, shard: VocabShard, grad_dtype: Optional[torch.dtype]) -> RowValues:
        """Values of a chunk and, unless grad_dtype is None, its gradient.

        logits [c, V] wide, -inf at padding; may be overwritten.
        """
        ...


def can_compile(device_type: str) -> bool:
    """Whether kernels over logits run compiled on this kind of device, or as plain PyTorch."""
    return device_type == "cuda" and importlib.util.find_spec("triton") is not None


@functools.cache
def compiled(kernel: Callable) -> Callable[..., Any]:
    """torch.compile of a kernel over a chunk. Row counts change with every mask, hence dynamic. Deterministic: no kernel choice by
    timing, so a rerun of the program has the same bits."""
    return torch.compile(kernel, dynamic=True, options={"deterministic": True})


def gather_logit(logits: Tensor, column: Tensor) -> Tensor:
    """[c, V], [c] -> [c]: each row's logit at its column, -inf where the column is -1 (the maximum over ranks is the logit)."""
    logit = logits.gather(1, column.clamp_min(0)[:, None]).squeeze(1)
    return torch.where(column >= 0, logit, -torch.inf)


def lowest_finite(row_max: Tensor) -> Tensor:
    """Lift -inf (a shard of nothing but padding) so that exp(logit - row_max) is 0 and not nan; nan stays nan."""
    return row_max.clamp_min(torch.finfo(row_max.dtype).min)


def first_hit(row_max: Tensor, hit: Tensor) -> Tensor:
    """`correct` of the ranks' [ranks, c] maxima and whether the target is where each has its own.

    Lower ranks hold lower ids, so on a tie the first rank that reaches the top decides, as torch.argmax would.
    """
    top = row_max.amax(0)
    correct = torch.zeros_like(top)
    for k in reversed(range(len(row_max))):
        correct = torch.where(row_max[k] == top, hit[k], correct)
    return correct.bool()
