"""Which samples are to blame for a step whose loss or gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from data.batch import DiffusionBatch
from parallel.mesh import Mesh
from pretrain.metrics import broken_samples


def find_broken(batches: Sequence[DiffusionBatch], values: Sequence[Tensor], mesh: Mesh) -> tuple[list[int], str]:
    """(global numbers of samples, what was seen), the same on all ranks. Collective.

    batches: this rank's microbatches of the step; values: their row losses as the model gives them, [B, C] each. A loss that is
    not finite puts its whole microbatch under suspicion, since attention kernels, loss chunks and sums are shared; if every
    loss is finite and only the gradient is not, it is every sample of the step.
    """
    named, microbatches = [], []
    for batch, value in zip(batches, values, strict=True):
        if broken := broken_samples(batch, value):
            named += broken
            microbatches += batch.sample_ids.tolist()
    mine = (named, microbatches or [sample for batch in batches for sample in batch.sample_ids.tolist()])
    everyone: list[Any] = [mine] * mesh.world_size
    if mesh.world_size > 1:
        dist.all_gather_object(everyone, mine)
    ranks = [rank for rank, (broken, _) in enumerate(everyone) if broken]
    if not ranks:
        return sorted(
            {s for _, suspects in everyone for s in suspects}
        ), "a gradient is not finite although every loss is"
    samples = sorted({sample for broken, _ in everyone for sample in broken})
    some = ", ".join(map(str, samples[:8])) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
    what = f"the loss of sample{'s' if len(samples) > 1 else ''} {some} (ranks {ranks}) is not finite"
    return sorted({s for broken, suspects in everyone if broken for s in suspects}), what
