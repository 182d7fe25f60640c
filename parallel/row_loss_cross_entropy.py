"""The cross entropy of the target: the row loss of masked diffusion and of autoregressive models.

    value = log sum_v exp(z_v) - z_target

Legend: c rows of one chunk, V vocab rows of this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from parallel.row_loss import (
    Rows,
    RowValues,
    VocabShard,
    can_compile,
    compiled,
    first_hit,
    gather_logit,
    lowest_finite,
)


@dataclass(frozen=True)
class CrossEntropy:
    """Four numbers a row are exchanged, once."""

    needs_noise = False

    def __call__(self, logits: Tensor, rows: Rows, shard: VocabShard, grad_dtype: Optional[torch.dtype]) -> RowValues:
        kernels = _kernels(logits.device.type)
        column = shard.column(rows.targets)
        target_logit = gather_logit(logits, column)
        row_max, sum_exp, argmax = kernels.statistics(logits)
        statistics = torch.stack((row_max, sum_exp, target_logit, (argmax == column).to(logits.dtype)))
        top, total, target_logit, correct = _combine(statistics, shard)
        ce = total.log() + (top - target_logit)  # in this order large logits lose no digits
        if grad_dtype is None:
            return RowValues(ce, ce, correct, None)
        # A target no rank holds has an infinite CE but a finite softmax.
        scale = torch.where(ce.isfinite(), rows.scale, torch.nan)
        return RowValues(ce, ce, correct, kernels.gradient(logits, row_max, top, total, scale, column, grad_dtype))


CROSS_ENTROPY = CrossEntropy()


def _combine(statistics: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Join the ranks' [4, c] statistics into top logit, sum of exp(logit - top), target logit and `correct`, each [c]."""
    row_max, sum_exp, target_logit, hit = shard.gather(statistics).unbind(1)
    top = row_max.amax(0)
    total = torch.zeros_like(top)
    for k in range(shard.ranks):
        total += sum_exp[k] * (row_max[k] - top).exp()
    return top, total, target_logit.amax(0), first_hit(row_max, hit)


# The passes over a chunk's [c, V] logits: statistics (row max, sum of exp, first column of the max), and the gradient
#     scale * (exp(logit - top) / total - onehot(column))          [c, V]
# Two forms of one contract. In place, for plain PyTorch: no second [c, V] buffer, and statistics leaves
# exp(logit - row_max) behind. Fused: written to be compiled, so that only the gradient is ever stored.


class _Kernels(NamedTuple):
    statistics: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


@functools.cache
def _kernels(device_type: str) -> _Kernels:
    if can_compile(device_type):
        return _Kernels(compiled(_statistics_fused), compiled(_gradient_fused))
    return _Kernels(_statistics_in_place, _gradient_in_place)


def _statistics_in_place(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row_max, argmax = logits.max(1)
    row_max = lowest_finite(row_max)
    return row_max, logits.sub_(row_max[:, None]).exp_().sum(1), argmax


def _gradient_in_place(
    exps: Tensor, row_max: Tensor, top: Tensor, total: Tensor, scale: Tensor, column: Tensor, dtype: torch.dtype
) -> Tensor:
    exps.mul_((scale * (row_max - top).exp() / total)[:, None])
    at_target = column.clamp_min(0)[:, None]
    here = torch.where(column >= 0, scale, 0.0)[:, None]
    exps.scatter_(1, at_target, exps.gather(1, at_target) - here)
    return exps.to(dtype)  # rounded last: a rounded probability near 1 would lose what the one-hot leaves


def _statistics_fused(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row_max = lowest_finite(logits.amax(1))
    return row_max, (logits - row_max[:, None]).exp().sum(1), logits.argmax(1)


def _gradient_fused(
    logits: Tensor, row_max: Tensor, top: Tensor, total: Tensor, scale: Tensor, column: Tensor, dtype: torch.dtype
) -> Tensor:
    onehot = torch.arange(logits.shape[1], device=logits.device) == column[:, None]
    probability = (logits - top[:, None]).exp() * total.reciprocal()[:, None]
    return ((probability - onehot.to(logits.dtype)) * scale[:, None]).to(dtype)
