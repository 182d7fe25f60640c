"""Training metrics, defined once, from the loss's own by-products: no second pass over logits.

Everything is a ratio of sums over the tokens of the global batch, so it is exact for any split over ranks and microbatches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import DiffusionBatch
from parallel.mesh import Mesh

T_BINS = 10


def sum_over_ranks(values: Tensor, mesh: Mesh) -> Tensor:
    """Sum over the data-parallel ranks; the same bits on every rank."""
    values = values.to(mesh.device)
    if mesh.dp > 1:
        dist.all_reduce(values, group=mesh.dp_group)
    return values.cpu()


def largest_over_ranks(values: Sequence[int], mesh: Mesh) -> list[int]:
    """The largest of all ranks' values, each: one decision for all of them."""
    found = torch.tensor(values, device=mesh.device)
    if mesh.world_size > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def global_counts(batches: Iterable[DiffusionBatch], mesh: Mesh, *more: int) -> list[int]:
    """Loss-eligible tokens and masked tokens of the global batch, known before the first backward, then the sum over the
    data-parallel ranks of each number in `more`. Exact up to 2**53.
    """
    local = torch.tensor([0, 0, *more], dtype=torch.float64)
    for batch in batches:
        local[:2] += torch.stack((batch.eligible.sum(), batch.masked.sum())).double()
    return [int(count) for count in sum_over_ranks(local, mesh).tolist()]


def token_sums(batch: DiffusionBatch, value: Tensor, ce: Tensor, correct: Tensor) -> Tensor:
    """The sums of one microbatch, [7 + 2 T_BINS] float64; value, ce and correct [B, L] as the model gives them."""
    value, masked, weight = value.detach().double().cpu(), batch.masked, batch.weight.double()
    totals = torch.stack(
        (
            (weight * value).sum(),
            ce.detach().double().cpu()[masked].sum(),
            correct.cpu()[masked].sum().double(),
            masked.sum().double(),
            batch.eligible.sum().double(),
            batch.p_mask[batch.eligible].double().sum(),
            weight[masked].sum(),
        )
    )
    return torch.cat((totals, *sums_by_level(batch, value)))


def sums_by_level(batch: DiffusionBatch, value: Tensor) -> Tensor:
    """The unweighted losses of masked tokens summed by noise level, and how many there were: [2, T_BINS] float64.

    value: [B, C], of each counted token. Bin k has the levels in [k / T_BINS, (k + 1) / T_BINS), the last also 1.
    """
    bins = (batch.t[batch.masked] * T_BINS).long().clamp(max=T_BINS - 1)
    values = value.detach().double().cpu()[batch.masked]
    sums = torch.zeros(T_BINS, dtype=torch.float64).index_add_(0, bins, values)
    return torch.stack((sums, torch.bincount(bins, minlength=T_BINS).double()))


def train_metrics(sums: Tensor, normalizer: float) -> dict[str, float]:
    """Metric name -> value from the summed `token_sums` of the global batch.

    train/loss: the weighted loss that is minimised (nats per eligible token); train/ce_loss: mean cross-entropy of masked
    tokens; train/loss_t_bin_k: mean row loss without its weight (of most objectives the cross-entropy itself) of masked tokens
    with t in [k/10, (k+1)/10), left out where none fell.
    """
    weighted, ce, correct, masked, eligible, p_mask, weight = sums[:7].tolist()
    metrics = {
        "train/loss": weighted / normalizer,
        "train/num_masked_tokens": masked,
        "train/mask_ratio": masked / max(eligible, 1),
        "train/avg_p_mask": p_mask / max(eligible, 1),
    }
    if masked:
        metrics |= {
            "train/ce_loss": ce / masked,
            "train/accuracy": correct / masked,
            "train/importance_weight_avg": weight / masked,
        }
    for k in range(T_BINS):
        if count := float(sums[7 + T_BINS + k]):
            metrics[f"train/loss_t_bin_{k}"] = float(sums[7 + k]) / count
    return metrics


def broken_samples(batch: DiffusionBatch, value: Tensor) -> list[int]:
    """Global indices of the samples of a microbatch whose loss is not finite. value: [B, C], of each counted token."""
    broken = (~torch.isfinite(value.cpu()) & batch.masked).any(1)
    return batch.sample_ids[broken].tolist()
