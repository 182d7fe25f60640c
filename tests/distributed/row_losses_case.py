"""Microbatches with soft inputs and corrupted tokens, and their dense float64 loss: what every layout must agree on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from parallel.row_loss import RowLoss
from parallel.row_losses import row_loss
from pretrain.config import ModelConfig
from pretrain.model import model_shape
from tests import reference_model
from tests.distributed import training_case
from tests.parallel.row_loss_reference import VALUES

LENGTH, SEED, MIXED, SAMPLES, ACCUMULATION, NORMALIZER = training_case.LENGTH, training_case.SEED, 3, 1, 2, 17.0
ROW_LOSSES = {
    "cross_entropy": row_loss("cross_entropy"),
    "uniform": row_loss("uniform"),
    "symmetric_kl": row_loss("symmetric_kl", 0.1),
}


def model(tied: bool) -> ModelConfig:
    return replace(training_case.MODEL, tie_embeddings=tied)


def batches(soft: bool) -> list[dict[str, Tensor]]:
    """The four samples of the global batch, one a microbatch: two documents each, half of the tokens counted."""
    draw = torch.Generator().manual_seed(11)
    found = []
    for _ in range(4):
        shape = (1, LENGTH)
        vocab = training_case.MODEL.vocab_size
        target, noisy = (torch.randint(2, vocab, shape, generator=draw) for _ in range(2))
        current = torch.where(torch.rand(shape, generator=draw) < 0.5, target, noisy)
        batch = {
            "noisy_ids": current,
            "target_ids": target,
            "masked": torch.rand(shape, generator=draw) < 0.5,
            "weight": 0.5 + torch.rand(shape, generator=draw),
            "position_ids": torch.arange(LENGTH, dtype=torch.int32).expand(shape),
            "document_ids": (torch.arange(LENGTH) >= 5).int().expand(shape),
            "current_ids": current,
            "alpha": torch.rand(shape, generator=draw).clamp(0.05, 0.95),
        }
        if soft:
            batch["soft_ids"] = torch.randint(0, vocab, (*shape, MIXED), generator=draw)
            batch["soft_weights"] = torch.rand(*shape, MIXED, generator=draw).softmax(-1)
        found.append(batch)
    return found


def truth(kind: RowLoss, soft: bool, tied: bool) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Loss of the global batch, values [1, L] of each sample, gradients."""
    shape = model_shape(model(tied))
    weights = training_case.full_weights(shape)
    loss, values = torch.zeros((), dtype=torch.float64), []
    for batch in batches(soft):
        # The reference looks rows up by ids: it is given the mixtures as a table with one row a position.
        table, ids = weights["embedding.weight"], batch["noisy_ids"]
        given = weights | {"head.weight": weights.get("head.weight", table)}
        if soft:
            given["embedding.weight"] = torch.einsum(
                "lk,lkh->lh", batch["soft_weights"][0].double(), table[batch["soft_ids"][0]]
            )
            ids = torch.arange(LENGTH)[None]
        z = reference_model.logits(given, shape, ids, batch["position_ids"], batch["document_ids"])[0]
        rows = (batch[name][0] for name in ("target_ids", "current_ids", "alpha"))
        target, current, alpha = rows
        value = VALUES[type(kind)](z.softmax(1), target, current, alpha.double(), kind) * batch["masked"][0]
        loss = loss + (value * batch["weight"][0].double()).sum() / NORMALIZER
        values.append(value.detach()[None])
    return loss.detach(), values, reference_model.gradients(weights, loss)
