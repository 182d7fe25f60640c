"""The vocab-parallel diffusion loss: unembedding and weighted row loss of the masked rows in one pass.

    loss = sum over masked rows i of  loss_weight_i * value_i / normalizer

Masked rows are compacted and taken in chunks. A chunk's logits exist once, and its share of both gradients is made
while they do; backward only scales. What a row's value is, and its gradient by the logits, is the row loss's business
(parallel.row_losses): by default the cross entropy. Tensor-parallel ranks exchange a few numbers a row (and the hidden
gradient), and every rank combines them in rank order, so the loss has the same bits everywhere.

Legend: T tokens, n masked rows, c rows of one chunk, H hidden size, V vocab rows of this rank.
"wide" is the dtype of logits, statistics and sums: float64 for float64 inputs, else float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.row_loss import RowLoss, Rows, VocabShard, all_gather
from parallel.row_loss_cross_entropy import CROSS_ENTROPY

_ROW_MULTIPLE = 128  # a chunk's row count is a multiple of the largest common GEMM tile, but for the last chunk


class DiffusionLossOutput(NamedTuple):
    """What `diffusion_loss` gives; only `loss` carries a gradient."""

    loss: Tensor  # scalar, wide: the same bits on every tp rank
    value: Tensor  # [T] wide: the row loss at masked rows, without loss_weight; 0 elsewhere
    ce: Tensor  # [T] wide: cross entropy of the target in nats at masked rows; 0 elsewhere
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
    row_loss: RowLoss = CROSS_ENTROPY,
    current: Optional[Tensor] = None,
    alpha: Optional[Tensor] = None,
) -> DiffusionLossOutput:
    """Weighted row losses of the masked rows over a vocab-parallel unembedding, with gradients made in forward.

    `hidden` [T, H] is the same on all tp ranks. `weight` [V, H] holds this rank's vocab rows: row r of rank k is token
    id k * V + r; rows with id >= `vocab_size` are padding and get probability 0 and gradient 0. `targets` [T] int64 and
    `masked` [T] bool: only masked rows are read. `loss_weight` [T]: a masked row of weight 0 adds no loss and still has
    its `value`, `ce` and `correct`. `normalizer` is the denominator of the whole global batch, not of this rank or microbatch.
    `chunk_rows` bounds the rows whose logits exist at once (memory: chunk_rows * V wide numbers). `current` [T] int64 and
    `alpha` [T] are read by row losses that need them: the corrupted token and how much of the clean one is left.

    A masked target outside [0, vocab_size) and logits that are not finite make loss and gradients non-finite.
    All ranks of `tp_group` must call it together, with the same masked rows. backward does not read `weight` again, so
    an engine may free it after forward. Raises ValueError for shapes, dtypes or shards that cannot be right.
    """
    ranks = dist.get_world_size(tp_group) if tp_group is not None else 1
    rank = dist.get_rank(tp_group) if tp_group is not None else 0
    shard = VocabShard(tp_group, rank, ranks, weight.shape[0], vocab_size)
    call = _Call(targets, masked, loss_weight, normalizer, shard, chunk_rows, row_loss, current, alpha)
    _check_arguments(hidden, weight, call)
    _check_coverage(weight.shape[0], ranks, vocab_size)
    # Asked here: inside an autograd.Function grad mode is always off, and needs_input_grad ignores torch.no_grad().
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return DiffusionLossOutput(*_DiffusionLoss.apply(hidden, weight, call))
    return _loss_and_gradients(hidden, weight, call, want_hidden=False, want_weight=False)[0]


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
        all_gather(gathered, torch.tensor([local_rows], device=device), group=tp_group)
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


@dataclass(frozen=True)
class _Call:
    """What `diffusion_loss` was given beside hidden states and matrix."""

    targets: Tensor
    masked: Tensor
    loss_weight: Tensor
    normalizer: float | Tensor
    shard: VocabShard
    chunk_rows: int
    row_loss: RowLoss
    current: Optional[Tensor]
    alpha: Optional[Tensor]

    def rows(self, index: Tensor, scale: Tensor) -> Rows:
        """What the row loss knows of the rows at `index` [c]; scale [c] wide."""
        rows = Rows(self.targets.index_select(0, index), scale)
        if not self.row_loss.needs_noise or self.current is None or self.alpha is None:
            return rows
        alpha = self.alpha.index_select(0, index).to(scale.dtype)
        return rows._replace(current=self.current.index_select(0, index), alpha=alpha)


def _check_arguments(hidden: Tensor, weight: Tensor, call: _Call) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [T, H] and weight [V, H] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    if call.row_loss.needs_noise and (call.current is None or call.alpha is None):
        raise ValueError(
            "this row loss needs current and alpha: the corrupted tokens, and how much of the clean is left"
        )
    for name in ("targets", "masked", "loss_weight", "current", "alpha"):
        row = getattr(call, name)
        if row is not None and row.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must have shape [{hidden.shape[0]}], one entry a row, got {list(row.shape)}")
    if call.masked.dtype != torch.bool or call.targets.dtype != torch.int64:
        raise ValueError(f"masked must be bool and targets int64, got {call.masked.dtype} and {call.targets.dtype}")
    if call.current is not None and call.current.dtype != torch.int64:
        raise ValueError(f"current must be int64, got {call.current.dtype}")
    if call.chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {call.chunk_rows}")


class _DiffusionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, call):
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        output, hidden_grad, weight_grad = _loss_and_gradients(
            hidden, weight, call, want_hidden=want_hidden, want_weight=want_weight
        )
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(output.value, output.ce, output.correct)
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        hidden_grad, weight_grad = (g if g is None else _scaled(g, grad_loss, ctx.dtype) for g in ctx.saved_tensors)
        return hidden_grad, weight_grad, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient [a, b] * factor [] as `dtype`, rounded once.

    The factor goes in as [1, 1] because a 0-d tensor would first be rounded to a bfloat16 gradient's dtype.
    """
    return torch.mul(gradient, factor.reshape(1, 1), out=torch.empty_like(gradient, dtype=dtype))


@torch.no_grad()
def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, call: _Call, *, want_hidden: bool, want_weight: bool
) -> tuple[DiffusionLossOutput, Tensor | None, Tensor | None]:
    """The outputs, d loss / d hidden [T, H] (summed over tp, hidden dtype) and d loss / d weight [V, H] (wide)."""
    (tokens, hidden_size), shard = hidden.shape, call.shard
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    operand = _operand_dtype(hidden, wide)
    grad_dtype = operand if want_hidden or want_weight else None
    rows = call.masked.nonzero().squeeze(1)
    bounds = _chunk_bounds(rows.numel(), call.chunk_rows)
    vocab = weight.to(operand)
    row_scale = call.loss_weight.index_select(0, rows).to(wide) / call.normalizer
    value = hidden.new_zeros(tokens, dtype=wide)
    ce = hidden.new_zeros(tokens, dtype=wide)
    correct = call.masked.new_zeros(tokens)
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
        known = call.rows(index, row_scale[start:stop])
        row_value, row_ce, row_correct, logits_grad = call.row_loss(logits, known, shard, grad_dtype)
        value.index_copy_(0, index, row_value)
        ce.index_copy_(0, index, row_ce)
        correct.index_copy_(0, index, row_correct)
        if logits_grad is None:
            continue
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
    loss = (value.index_select(0, rows) * row_scale).sum()
    return DiffusionLossOutput(loss, value, ce, correct), hidden_grad, weight_grad


def _chunk_bounds(rows: int, chunk_rows: int) -> list[tuple[int, int]]:
    """Cut `rows` into the fewest chunks of at most `chunk_rows`, about equal: a tiny last chunk wastes a GEMM."""
    if rows == 0:
        return []
    even = math.ceil(rows / math.ceil(rows / chunk_rows))
    size = min(math.ceil(even / _ROW_MULTIPLE) * _ROW_MULTIPLE, chunk_rows, rows)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


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
