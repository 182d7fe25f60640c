"""The symmetric Kullback-Leibler divergence to a smoothed target.

    q = (1 - s) onehot(target) + s / N,      value = (KL(q || p) + KL(p || q)) / 2 = 1/2 sum_y (q_y - p_y) (log q_y - log p_y)

Every term of the sum is at least 0, so nothing cancels. Its gradient, by d p_y / d z_j = p_y (onehot_yj - p_j):

    d value / d z_j = 1/2 [p_j - q_j + p_j (log p_j - log q_j - KL(p || q))]

Legend: r rows, c rows of one chunk, V vocab rows of this rank, N the vocab without padding, p = softmax(z).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from parallel.row_loss import Rows, RowValues, VocabShard
from parallel.row_loss_softmax import columns, map_rows, reduce_rows, softmax_rows


@dataclass(frozen=True)
class SymmetricKL:
    """smoothing: s, strictly between 0 and 1."""

    smoothing: float

    needs_noise = False

    def __post_init__(self) -> None:
        if not 0 < self.smoothing < 1:
            raise ValueError(f"smoothing must lie strictly between 0 and 1, got {self.smoothing}")

    def __call__(self, logits: Tensor, rows: Rows, shard: VocabShard, grad_dtype: Optional[torch.dtype]) -> RowValues:
        missing = self.smoothing * (1 - 1 / shard.vocab_size)  # 1 - q of the target
        q, log_q_target = self.smoothing / shard.vocab_size, math.log1p(-missing)
        x = softmax_rows(logits, rows._replace(current=None), shard)
        log_total = x.total.log()
        log_target = torch.where(x.others < 0.5, torch.log1p(-x.others), -x.ce)
        where = x.column, shard.real_rows, q, math.log(q)
        local = reduce_rows(_sums, logits, x.top, log_total, *where)
        others, others_kl = shard.sum(torch.stack(local)).unbind(0)  # of all tokens but the target
        less, ratio = x.others - missing, log_q_target - log_target  # q - p and log q - log p at the target
        value = torch.where(x.broken, torch.nan, (less * ratio + others) / 2)
        if grad_dtype is None:
            return RowValues(value, x.ce, x.correct, None)
        scale = torch.where(value.isfinite(), rows.scale, torch.nan) / 2
        # KL(p || q) is others_kl - target * ratio; its part of the target is taken together with the target's own
        target_grad = -less - x.target * (x.others * ratio + others_kl)
        divergence = others_kl - x.target * ratio
        grad = map_rows(_gradient, logits, x.top, log_total, *where, divergence, target_grad, scale, dtype=grad_dtype)
        return RowValues(value, x.ce, x.correct, grad)


def _sums(
    logits: Tensor, top: Tensor, log_total: Tensor, column: Tensor, real_rows: int, q: float, log_q: float
) -> tuple[Tensor, Tensor]:
    """Sums over all real tokens but the target of (q - p) (log q - log p) and p (log p - log q), each [r]."""
    log_p = logits - top[:, None] - log_total[:, None]
    p, excess = log_p.exp(), log_p - log_q
    counted = (columns(logits) != column[:, None]) & (columns(logits) < real_rows)
    both = torch.where(counted, (p - q) * excess, 0.0)
    return both.sum(1), torch.where(counted, p * excess, 0.0).sum(1)


def _gradient(
    logits: Tensor,
    top: Tensor,
    log_total: Tensor,
    column: Tensor,
    real_rows: int,
    q: float,
    log_q: float,
    divergence: Tensor,
    target_grad: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    log_p = logits - top[:, None] - log_total[:, None]
    p = log_p.exp()
    grad = p - q + p * (log_p - log_q - divergence[:, None])
    grad = torch.where(columns(logits) == column[:, None], target_grad[:, None], grad)
    grad = grad * scale[:, None]
    return torch.where(columns(logits) < real_rows, grad, 0.0).to(dtype)
