"""The global gradient norm, every parameter counted once, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from parallel.shape import ParameterSpec


@torch.no_grad()
def global_grad_norm(
    gradients: Iterable[tuple[str, Tensor]], table: Mapping[str, ParameterSpec], mesh: Mesh, sharded: bool = True
) -> Tensor:
    """The 2-norm of the whole model's gradient, float64 []: the same bits on every rank, and NaN on every rank if a gradient of
    any rank is not finite.

    gradients: (name in `table`, what this rank holds of it). The table decides what tensor-parallel ranks share. sharded: the
    ranks of a shard group hold different parts (False: each holds the whole). One all-reduce of two numbers, no host sync.
    """
    split: list[Tensor] = []  # over tensor-parallel ranks
    replicated: list[Tensor] = []
    for name, gradient in gradients:
        if gradient.numel():
            (replicated if table[name].tp_dim is None else split).append(gradient)
    of_split, of_replicated = _square(split, mesh), _square(replicated, mesh)
    not_finite = 1.0 - (of_split + of_replicated).isfinite().double()
    counted = torch.zeros_like(of_split)
    if mesh.dp_rank < (mesh.shard if sharded else 1):  # the others hold copies
        counted += of_split
        if mesh.tp_rank == 0:
            counted += of_replicated
    sums = torch.stack((counted, not_finite))
    if mesh.world_size > 1:
        dist.all_reduce(sums)
    return torch.where(sums[1] > 0, torch.nan, sums[0].sqrt())


def _square(tensors: list[Tensor], mesh: Mesh) -> Tensor:
    """Sum of the squares of all elements, in float64."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=mesh.device)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()


@torch.no_grad()
def clip_(gradients: Sequence[Tensor], norm: float, limit: float) -> None:
    """Scales the gradients so that the global norm is at most `limit` (0: no clipping). norm: the global norm, finite."""
    if 0 < limit < norm:
        torch._foreach_mul_(list(gradients), limit / norm)
