"""Sequence parallelism: between tensor-parallel regions each tensor-parallel rank keeps its share of the tokens only.

Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2 (arXiv 2205.05198).
Shapes: B samples, L tokens, H hidden, T tensor-parallel ranks; a share is tokens [r L/T, (r+1) L/T) of rank r.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def _gather(x_BlH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L/T, H] of each rank -> [B, L, H]."""
    ranks = dist.get_world_size(group)
    out = x_BlH.new_empty((ranks * x_BlH.shape[0], *x_BlH.shape[1:]))
    dist.all_gather_into_tensor(out, x_BlH.contiguous(), group=group)
    return out.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1, 2)


def _reduce_scatter(x_BLH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L, H], a summand on each rank -> this rank's [B, L/T, H] of the sum."""
    ranks = dist.get_world_size(group)
    by_rank = x_BLH.unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    out = x_BLH.new_empty((x_BLH.shape[0], x_BLH.shape[1] // ranks, x_BLH.shape[2]))
    dist.reduce_scatter_tensor(out, by_rank, group=group)
    return out


def _share(x_BLH: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x_BLH.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)].contiguous()


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _reduce_scatter(gradient, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _gather(gradient, ctx.group), None


class _SplitSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _share(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _gather(gradient, ctx.group), None


class _JoinSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _share(gradient, ctx.group), None


def gather_sequence(x_BlH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Into a tensor-parallel region: shares -> whole sequence; backward sums the ranks' gradients and cuts them into shares."""
    return _GatherSequence.apply(x_BlH, group)


def scatter_sequence(x_BLH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Out of a tensor-parallel region: sums the ranks' parts and cuts the sum into shares; backward gathers."""
    return _ScatterSequence.apply(x_BLH, group)


def split_sequence(x_BLH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A replicated tensor -> this rank's share; backward gathers, so every rank has the whole gradient."""
    return _SplitSequence.apply(x_BLH, group)


def join_sequence(x_BlH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Shares -> a tensor that every rank uses alike (the loss, whose hidden gradient is already summed); backward cuts."""
    return _JoinSequence.apply(x_BlH, group)
