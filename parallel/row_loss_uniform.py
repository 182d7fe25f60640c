"""The continuous-time bound of uniform-state diffusion (Schiff et al., arXiv 2412.10193), without its rate beta(t).

With xbar_y = N alpha onehot_y(target) + 1 - alpha, pbar_y = N alpha p_y + 1 - alpha and the corrupted token z:

    value = sum over y != z of  a_y log(a_y / b_y) - a_y + b_y,      a_y = xbar_y / (N xbar_z),  b_y = pbar_y / (N pbar_z)

a and b are the reverse rates from z to y of the data and of the model. The weight of a row is large where alpha is near 0 or 1,
and its value small there, so nothing may cancel: each term is a_y psi(l_y), l_y = log(b_y / a_y), psi(l) = exp(l) - 1 - l >= 0,
and with c = 1 - alpha, A = c + N alpha, g = N alpha / c every l_y is a sum of log1p's:

    y != z, target     l_y = log1p(g p_y) + offset,    offset = -log(pbar_z / A) if z is the target, else -log1p(g p_z)
    the target, if not z    l = log(pbar_target / A) - log1p(g p_z)

Gradient, by d p_y / d z_j = p_y (onehot_yj - p_j), with d_y = b_y - a_y, pulls v_y = N alpha p_y d_y / pbar_y and
v_z = -(N alpha p_z / pbar_z) (1 / pbar_z - 1 / xbar_z):

    d value / d z_j = v_j - p_j sum_y v_y

A multiple of p added to v changes nothing. v as above is small where the answer is good; where z is the target and its p far too
small (g p < 1, p < 1/2), all v_y are about p_y / pbar_z and would cancel: there alpha (1 / pbar_z - c / A^2) p_y is taken from v_y.

Legend: r rows, c rows of one chunk, V vocab rows of this rank, N the vocab without padding, p = softmax(logits).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from parallel.row_loss import Rows, RowValues, VocabShard
from parallel.row_loss_softmax import Softmax, columns, map_rows, probabilities, reduce_rows, softmax_rows

_LEAST_NOISE = 2.0**-25  # of c: half of float32's spacing below 1. An alpha that was rounded to 1 gives no infinity


@dataclass(frozen=True)
class UniformBound:
    """Rows bring the corrupted token and alpha in [0, 1]; their weight brings beta(t) = -alpha'(t) / alpha(t).

    posterior: the network says p(x | its own noisy token too), as cross-entropy teaches it, where the bound is lowest for
    p(x | the other tokens). By Bayes' rule these differ by the factor (N alpha + 1 - alpha) / (1 - alpha) at the noisy token,
    which is taken out; `ce` and `correct` are then of what is left.
    """

    posterior: bool = False
    needs_noise = True

    def __call__(self, logits: Tensor, rows: Rows, shard: VocabShard, grad_dtype: Optional[torch.dtype]) -> RowValues:
        assert rows.current is not None and rows.alpha is not None
        if self.posterior:
            column = shard.column(rows.current)
            told = torch.log1p(shard.vocab_size * rows.alpha / (1 - rows.alpha).clamp_min(_LEAST_NOISE))
            here = column.clamp_min(0)[:, None]
            logits.scatter_(1, here, logits.gather(1, here) - torch.where(column >= 0, told, 0.0)[:, None])
        x = softmax_rows(logits, rows, shard)
        noise = _noise(rows.alpha, shard.vocab_size, rows.current == rows.targets, x)
        where = x.top, x.total, x.column, x.current_column, shard.real_rows, noise.gain
        local = reduce_rows(_sums, logits, *where, noise.offset, noise.shift)
        divergence, pull = shard.sum(torch.stack(local)).unbind(0)  # of all tokens but z and the target
        value = torch.where(x.broken, torch.nan, noise.rate * divergence + noise.target_value)
        if grad_dtype is None:
            return RowValues(value, x.ce, x.correct, None)
        scale = torch.where(value.isfinite(), rows.scale, torch.nan)
        # The target's part of sum_y v_y is taken together with the target's own gradient: 1 - p is known exactly there
        others = noise.strength * pull + noise.current_pull
        total_pull = others + noise.target_pull
        target_grad = noise.target_pull * x.others - x.target * others
        current_grad = noise.current_pull - x.current * total_pull
        special = noise.strength, total_pull, target_grad, current_grad, scale
        grad = map_rows(_gradient, logits, *where, noise.shift, *special, dtype=grad_dtype)
        return RowValues(value, x.ce, x.correct, grad)


class _Noise(NamedTuple):
    """What a row's alpha, target and corrupted token make of the formulas above; each [c]."""

    gain: Tensor  # g
    offset: Tensor  # of l_y
    rate: Tensor  # a_y of tokens that are neither z nor the target
    shift: Tensor  # v_y = strength * (p_y + shift) * g p_y / (1 + g p_y) for the same tokens
    strength: Tensor
    target_value: Tensor  # the target's term of the value, 0 if it is z
    target_pull: Tensor  # v of the target
    current_pull: Tensor  # v of z, 0 if it is the target


def _noise(alpha: Tensor, vocab: int, same: Tensor, x: Softmax) -> _Noise:
    """same [c]: z is the target."""
    noise = (1 - alpha).clamp_min(_LEAST_NOISE)
    signal = vocab * alpha
    top = noise + signal
    gain = signal / noise
    lost = signal / top * x.others  # 1 - pbar_target / A
    pbar_target, pbar_current = noise + signal * x.target, noise + signal * x.current
    log_kept = torch.where(lost < 0.5, torch.log1p(-lost), (pbar_target / top).log())
    log_current = torch.log1p(gain * x.current)  # log(pbar_z / c)
    share = signal * x.target / pbar_target
    current_share = signal * x.current / pbar_current
    target_value = top / (vocab * noise) * _psi(log_kept - log_current)
    far = same & (gain * x.target < 1) & (x.target < 0.5)
    same_pull = -lost * share / pbar_target
    far_pull = same_pull - alpha * (1 / pbar_target - noise / top**2) * x.target
    other_pull = -alpha * share * (x.others + top / noise * x.current) / pbar_current
    return _Noise(
        gain=gain,
        offset=torch.where(same, -log_kept, -log_current),
        rate=torch.where(same, noise / (vocab * top), 1 / vocab),
        shift=torch.where(far, -1.0, torch.where(same, noise / top * x.others, -x.current)),
        strength=torch.where(far, alpha * noise / top**2, alpha / pbar_current),
        target_value=torch.where(same, 0.0, target_value),
        target_pull=torch.where(far, far_pull, torch.where(same, same_pull, other_pull)),
        current_pull=torch.where(same, 0.0, current_share**2 / noise),
    )


def _psi(x: Tensor) -> Tensor:
    """exp(x) - 1 - x to nearly full relative precision: its series where the difference would cancel."""
    terms = 14 if x.dtype == torch.float64 else 7
    series = torch.full_like(x, 1 / math.factorial(terms + 1))
    for k in range(terms, 1, -1):
        series = series * x + 1 / math.factorial(k)
    return torch.where(x.abs() < 0.3, series * x * x, torch.expm1(x) - x)


def _sums(
    logits: Tensor,
    top: Tensor,
    total: Tensor,
    column: Tensor,
    current_column: Tensor,
    real_rows: int,
    gain: Tensor,
    offset: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sums over all real tokens but z and the target of psi(l_y) and of v_y / strength, each [r]."""
    p = probabilities(logits, top, total)
    odds = p * gain[:, None]
    here = columns(logits)
    counted = (here != column[:, None]) & (here != current_column[:, None]) & (here < real_rows)
    divergence = torch.where(counted, _psi(torch.log1p(odds) + offset[:, None]), 0.0)
    pull = torch.where(counted, (p + shift[:, None]) * (odds / (1 + odds)), 0.0)
    return divergence.sum(1), pull.sum(1)


def _gradient(
    logits: Tensor,
    top: Tensor,
    total: Tensor,
    column: Tensor,
    current_column: Tensor,
    real_rows: int,
    gain: Tensor,
    shift: Tensor,
    strength: Tensor,
    total_pull: Tensor,
    target_grad: Tensor,
    current_grad: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    p = probabilities(logits, top, total)
    odds = p * gain[:, None]
    grad = strength[:, None] * (p + shift[:, None]) * (odds / (1 + odds)) - p * total_pull[:, None]
    here = columns(logits)
    grad = torch.where(here == current_column[:, None], current_grad[:, None], grad)
    grad = torch.where(here == column[:, None], target_grad[:, None], grad)  # last: z may be the target
    return torch.where(here < real_rows, grad * scale[:, None], 0.0).to(dtype)
