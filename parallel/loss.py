"""The vocab-parallel diffusion loss: unembedding and weighted cross entropy of the masked rows in one pass.

    loss = sum over masked rows i of  loss_weight_i * CE_i / normalizer,      CE_i = log sum_v exp(z_iv) - z_i,target

Masked rows are compacted and taken in chunks. A chunk's logits exist once, and its share of both gradients is made
while they do; backward only scales. Tensor-parallel ranks exchange four numbers a row (and the hidden gradient), and
every rank combines them in rank order, so the loss has the same bits everywhere.

Legend: T tokens, n masked rows, c rows of one chunk, H hidden size, V vocab rows of this rank.
"wide" is the dtype of logits, statistics and sums: float64 for float64 inputs, else float32.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
_ROW_MULTIPLE = 128  # a chunk's row count is a multiple of the largest common GEMM tile, but for the last chunk


class DiffusionLossOutput(NamedTuple):
    """What `diffusion_loss` gives; only `loss` carries a gradient."""

    loss: Tensor  # scalar, wide: the same bits on every tp rank
    ce: Tensor  # [T] wide: cross entropy in nats at masked rows, without loss_weight; 0 elsewhere
    correct: Tensor  # [T] bool: argmax of the logits is the target, at masked rows (on a tie the lowest id wins)


def diffusion_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    loss_weight: Tensor,
    normalizer: float | Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int,
    chunk_rows: int = 1024,
) -> DiffusionLossOutput:
    """Weighted cross entropy of the masked rows over a vocab-parallel unembedding, with gradients made in forward.

    `hidden` [T, H] is the same on all tp ranks. `weight` [V, H] holds this rank's vocab rows: row r of rank k is token
    id k * V + r; rows with id >= `vocab_size` are padding and get probability 0 and gradient 0. `targets` [T] int64 and
    `masked` [T] bool: only masked rows are read. `loss_weight` [T]: a masked row of weight 0 adds no loss and still has
    its `ce` and `correct`. `normalizer` is the denominator of the whole global batch, not of this rank or microbatch.
    `chunk_rows` bounds the rows whose logits exist at once (memory: chunk_rows * V wide numbers).

    A masked target outside [0, vocab_size) and logits that are not finite make loss and gradients non-finite.
    All ranks of `tp_group` must call it together, with the same masked rows. backward does not read `weight` again, so
    an engine may free it after forward. Raises ValueError for shapes, dtypes or shards that cannot be right.
    """
    ranks = dist.get_world_size(tp_group) if tp_group is not None else 1
    rank = dist.get_rank(tp_group) if tp_group is not None else 0
    _check_arguments(hidden, weight, targets, masked, loss_weight, chunk_rows)
    _check_coverage(weight.shape[0], ranks, vocab_size)
    shard = _VocabShard(tp_group, rank, ranks, weight.shape[0], vocab_size)
    inputs = (hidden, weight, targets, masked, loss_weight, normalizer, shard, chunk_rows)
    # Asked here: inside an autograd.Function grad mode is always off, and needs_input_grad ignores torch.no_grad().
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return DiffusionLossOutput(*_DiffusionLoss.apply(*inputs))
    return _loss_and_gradients(*inputs, want_hidden=False, want_weight=False)[0]


def check_vocab_shards(
    local_rows: int, vocab_size: int, tp_group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> None:
    """Check once, when the model is built, that the tp ranks' shards are equal and tile the vocab.

    A collective over `tp_group`: every rank raises the same ValueError. `diffusion_loss` itself sees one rank's shard
    only, and unequal shards would shift token ids without any error.
    """
    rows = [local_rows]
    if tp_group is not None:
        gathered = torch.empty(dist.get_world_size(tp_group), dtype=torch.int64, device=device)
        _all_gather(gathered, torch.tensor([local_rows], device=device), group=tp_group)
        rows = gathered.tolist()
    if min(rows) != max(rows):
        raise ValueError(f"vocab shards must have equal rows on all tp ranks, got {rows}: pad the vocab to a multiple")
    _check_coverage(local_rows, len(rows), vocab_size)


def _check_coverage(local_rows: int, ranks: int, vocab_size: int) -> None:
    if vocab_size < 1 or local_rows * ranks < vocab_size:
        raise ValueError(
            f"vocab shards do not tile the vocab: {local_rows} rows * {ranks} tp ranks = {local_rows * ranks}, "
            f"vocab_size {vocab_size}: pad the vocab up to a multiple of the tp size"
        )


def _check_arguments(
    hidden: Tensor, weight: Tensor, targets: Tensor, masked: Tensor, loss_weight: Tensor, chunk_rows: int
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [T, H] and weight [V, H] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    for name, row in (("targets", targets), ("masked", masked), ("loss_weight", loss_weight)):
        if row.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must have shape [{hidden.shape[0]}], one entry a row, got {list(row.shape)}")
    if masked.dtype != torch.bool or targets.dtype != torch.int64:
        raise ValueError(f"masked must be bool and targets int64, got {masked.dtype} and {targets.dtype}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")


@dataclass(frozen=True)
class _VocabShard:
    """Which token ids this rank's rows of the unembedding stand for."""

    group: dist.ProcessGroup | None
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

    def column(self, targets: Tensor) -> Tensor:
        """[c] token ids -> [c] column in this rank's logits, -1 where another rank (or none) has it."""
        column = targets - self.first_id
        return torch.where((column >= 0) & (column < self.real_rows), column, -1)


class _DiffusionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, masked, loss_weight, normalizer, shard, chunk_rows):
        inputs = (hidden, weight, targets, masked, loss_weight, normalizer, shard, chunk_rows)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        output, hidden_grad, weight_grad = _loss_and_gradients(
            *inputs, want_hidden=want_hidden, want_weight=want_weight
        )
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(output.ce, output.correct)
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        hidden_grad, weight_grad = (g if g is None else _scaled(g, grad_loss, ctx.dtype) for g in ctx.saved_tensors)
        return hidden_grad, weight_grad, None, None, None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient [a, b] * factor [] as `dtype`, rounded once.

    The factor goes in as [1, 1] because a 0-d tensor would first be rounded to a bfloat16 gradient's dtype.
    """
    return torch.mul(gradient, factor.reshape(1, 1), out=torch.empty_like(gradient, dtype=dtype))


@torch.no_grad()
def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    loss_weight: Tensor,
    normalizer: float | Tensor,
    shard: _VocabShard,
    chunk_rows: int,
    *,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[DiffusionLossOutput, Tensor | None, Tensor | None]:
    """The outputs, d loss / d hidden [T, H] (summed over tp, hidden dtype) and d loss / d weight [V, H] (wide)."""
    tokens, hidden_size = hidden.shape
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    operand = _operand_dtype(hidden, wide)
    kernels = _kernels(hidden.device.type)
    rows = masked.nonzero().squeeze(1)
    bounds = _chunk_bounds(rows.numel(), chunk_rows)
    vocab = weight.to(operand)
    row_scale = loss_weight.index_select(0, rows).to(wide) / normalizer
    ce = hidden.new_zeros(tokens, dtype=wide)
    correct = masked.new_zeros(tokens)
    hidden_grad = hidden.new_zeros(tokens, hidden_size) if want_hidden else None
    weight_grad = hidden.new_zeros(shard.rows, hidden_size, dtype=wide) if want_weight else None
    buffer = hidden.new_empty(bounds[0][1] if bounds else 0, shard.rows, dtype=wide)

    for start, stop in bounds:
        index = rows[start:stop]
        states = hidden.index_select(0, index).to(operand)
        # Shrunk in place for the last chunk: a view of it would make compiled kernels recompile.
        logits = _matmul(states, vocab.t(), out=buffer.resize_(stop - start, shard.rows))
        if shard.real_rows < shard.rows:
            logits[:, shard.real_rows :] = -torch.inf
        column = shard.column(targets.index_select(0, index))
        target_logit = logits.gather(1, column.clamp_min(0)[:, None]).squeeze(1)
        target_logit = torch.where(column >= 0, target_logit, -torch.inf)
        row_max, sum_exp, argmax = kernels.statistics(logits)
        statistics = torch.stack((row_max, sum_exp, target_logit, (argmax == column).to(wide)))
        top, total, target_logit, hit = _combine(statistics, shard)

        chunk_ce = total.log() + (top - target_logit)  # in this order large logits lose no digits
        ce.index_copy_(0, index, chunk_ce)
        correct.index_copy_(0, index, hit)
        if not (want_hidden or want_weight):
            continue
        # A target no rank holds has an infinite CE but a finite softmax: an engine that only looks at gradients must
        # see the broken row too.
        scale = torch.where(chunk_ce.isfinite(), row_scale[start:stop], torch.nan)
        logits_grad = kernels.gradient(logits, row_max, top, total, scale, column, operand)
        reduction = None
        if want_hidden:
            chunk_grad = _matmul(logits_grad, vocab, out=hidden.new_empty(stop - start, hidden_size, dtype=wide))
            if shard.ranks > 1:  # runs beside the weight-gradient matmul
                reduction = dist.all_reduce(chunk_grad, group=shard.group, async_op=True)
        if weight_grad is not None:
            _accumulate(weight_grad, logits_grad.t(), states)
        if hidden_grad is not None:
            if reduction is not None:
                reduction.wait()
            hidden_grad.index_copy_(0, index, chunk_grad.to(hidden.dtype))
        del logits_grad  # before the next chunk's is made

    # Scaled per row and not at the end: with no masked row a normalizer of 0 still gives a loss of 0.
    loss = (ce.index_select(0, rows) * row_scale).sum()
    return DiffusionLossOutput(loss, ce, correct), hidden_grad, weight_grad


def _chunk_bounds(rows: int, chunk_rows: int) -> list[tuple[int, int]]:
    """Cut `rows` into the fewest chunks of at most `chunk_rows`, about equal: a tiny last chunk wastes a GEMM."""
    if rows == 0:
        return []
    even = math.ceil(rows / math.ceil(rows / chunk_rows))
    size = min(math.ceil(even / _ROW_MULTIPLE) * _ROW_MULTIPLE, chunk_rows, rows)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _combine(statistics: Tensor, shard: _VocabShard) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Join the ranks' [4, c] statistics into top logit, sum of exp(logit - top), target logit and `correct`, each [c].

    One all-gather; the sum runs in rank order on every rank, so no backend's reduction order shows in the bits. Lower
    ranks hold lower ids, so on a tie the first rank that reaches the top decides, as torch.argmax would.
    """
    gathered = statistics[None]
    if shard.ranks > 1:
        gathered = statistics.new_empty(shard.ranks, *statistics.shape)
        _all_gather(gathered.flatten(0, 1), statistics, group=shard.group)
    row_max, sum_exp, target_logit, hit = gathered.unbind(1)
    top = row_max.amax(0)
    total = torch.zeros_like(top)
    correct = torch.zeros_like(top)
    for k in range(shard.ranks):
        total += sum_exp[k] * (row_max[k] - top).exp()
    for k in reversed(range(shard.ranks)):
        correct = torch.where(row_max[k] == top, hit[k], correct)
    return top, total, target_logit.amax(0), correct.bool()


# Matmuls with wide results. CUDA multiplies half-precision operands into float32 sums. The CPU kernels round the result
# to the operands' dtype (and bfloat16 is slower there than float32), so on a CPU half-precision operands are widened.


def _operand_dtype(hidden: Tensor, wide: torch.dtype) -> torch.dtype:
    return hidden.dtype if hidden.is_cuda else wide


def _matmul(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """a @ b into `out`, summed and stored in out's dtype."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


# The passes over a chunk's [c, V] logits: statistics (row max, sum of exp, first column of the max), and the gradient
#     scale * (exp(logit - top) / total - onehot(column))          [c, V]
# Two forms of one contract. In place, for plain PyTorch: no second [c, V] buffer, and statistics leaves
# exp(logit - row_max) behind. Fused: written to be compiled, so that only the gradient is ever stored.


class _Kernels(NamedTuple):
    statistics: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


@functools.cache
def _kernels(device_type: str) -> _Kernels:
    if device_type == "cuda" and importlib.util.find_spec("triton") is not None:
        # Row counts change with every mask, hence dynamic. Deterministic: no kernel choice by timing, so a rerun of
        # the program has the same bits.
        compiled = functools.partial(torch.compile, dynamic=True, options={"deterministic": True})
        return _Kernels(compiled(_statistics_fused), compiled(_gradient_fused))
    return _Kernels(_statistics_in_place, _gradient_in_place)


def _lowest_finite(row_max: Tensor) -> Tensor:
    """Lift -inf (a shard of nothing but padding) so that exp(logit - row_max) is 0 and not nan; nan stays nan."""
    return row_max.clamp_min(torch.finfo(row_max.dtype).min)


def _statistics_in_place(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row_max, argmax = logits.max(1)
    row_max = _lowest_finite(row_max)
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
    row_max = _lowest_finite(logits.amax(1))
    return row_max, (logits - row_max[:, None]).exp().sum(1), logits.argmax(1)


def _gradient_fused(
    logits: Tensor, row_max: Tensor, top: Tensor, total: Tensor, scale: Tensor, column: Tensor, dtype: torch.dtype
) -> Tensor:
    onehot = torch.arange(logits.shape[1], device=logits.device) == column[:, None]
    probability = (logits - top[:, None]).exp() * total.reciprocal()[:, None]
    return ((probability - onehot.to(logits.dtype)) * scale[:, None]).to(dtype)
