"""The DiffusionBatch that the model and the loss read, made from the compact form on the consumer side.

Shapes: B samples, L tokens of a sample, C columns of a row: L, or 2 L where a clean copy follows (block diffusion).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Optional

import numpy as np
import torch
from torch import Tensor

from data.compact import CompactBatch

PADDING_DOCUMENT = -1
UNSEEN = 1 << 30  # rank of a token that nothing sees by its rank


@dataclass
class DiffusionBatch:
    """One microbatch, [B, C] unless said otherwise. `masked` is carried and never derived from ids."""

    noisy_ids: Tensor  # int64, what the model sees
    target_ids: Tensor  # int64, what is to be predicted there: the clean token (or the next one, or the one after)
    masked: Tensor  # bool, counted in the loss
    weight: Tensor  # float32, 0 where there is no loss, else the schedule's weight
    eligible: Tensor  # bool, could have been masked: the `tokens` normaliser counts these
    document_ids: Tensor  # int32, -1 is padding
    position_ids: Tensor  # int32
    t: Tensor  # float32
    p_mask: Tensor  # float32
    dropped: Tensor  # [B] bool
    sample_ids: Tensor  # [B] int64
    # Who sees whom inside a document, [B, C, 3] int32 (rank, reach, group): i sees j if rank[j] <= reach[i], or if both are of
    # one group >= 0. None: all see all.
    visibility: Optional[Tensor] = None
    soft_ids: Optional[Tensor] = None  # [B, C, K] int64: the input is the mixture of their embeddings
    soft_weights: Optional[Tensor] = None  # [B, C, K] float32
    current_ids: Optional[Tensor] = None  # int64, the corrupted token (uniform)
    alpha: Optional[Tensor] = None  # float32, the share of clean tokens (uniform)

    def to(self, device: torch.device | str) -> DiffusionBatch:
        return DiffusionBatch(**{name: x.to(device, non_blocking=True) for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, the plain form in which `parallel` takes a batch; without those that are None."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


Kind = Literal["masked", "block", "bert", "uniform", "flow", "autoregressive"]


@dataclass(frozen=True)
class Form:
    """What a batch looks like for an objective, beside the draws.

    Args:
        kind: the objective.
        block_size: tokens of a block (`block`); divides L.
        shift: the hidden state at i predicts token i + 1 (weights that come from an autoregressive model).
        weighting: weight counted tokens by the schedule; off: all by 1.
        per_answer: divide the weights by the number of eligible tokens of their document, so that each answer counts alike
            (LLaDA's SFT, arXiv 2502.09992, Algorithm 2).
        start_id: what stands before the first token of a text (`autoregressive`).
    """

    kind: Kind = "masked"
    block_size: int = 0
    shift: bool = False
    weighting: bool = True
    per_answer: bool = False
    start_id: int = 0

    @property
    def copies(self) -> int:
        """Columns of a row for each token of its sample."""
        return 2 if self.kind == "block" else 1


MASKED = Form()


def expand(compact: CompactBatch, mask_id: int, form: Form = MASKED, lookahead: Optional[int] = None) -> DiffusionBatch:
    """CompactBatch -> DiffusionBatch on the CPU.

    lookahead: a token sees what lies behind it and so many tokens before it (annealing from causal to full attention);
    None: everything in its document.
    """
    batch, size = compact.tokens.shape
    target = torch.from_numpy(compact.tokens.astype(np.int64))
    masked = _unpack(compact.mask_bits, size)
    column = torch.arange(size, dtype=torch.int32).expand(batch, size)
    inside = column < torch.from_numpy(compact.length)[:, None]
    dropped = torch.from_numpy(compact.dropped)
    t, p_mask = (_spread(compact, values) for values in (compact.t, compact.p_mask))
    if compact.noisy is not None:
        noisy = torch.from_numpy(compact.noisy.astype(np.int64))
    else:
        noisy = target if form.kind == "autoregressive" else torch.where(masked, mask_id, target)
    eligible, hidden = inside, None
    if compact.prompt_bits is not None:
        prompt = _unpack(compact.prompt_bits, size) & inside
        hidden = prompt & dropped[:, None]
        noisy = torch.where(hidden, mask_id, noisy)
        eligible = inside & ~prompt
    documents, positions, starts = torch.zeros(batch, size, dtype=torch.int32), column, column == 0
    if compact.border_bits is not None:
        starts = _unpack(compact.border_bits, size)
        starts[:, 0] = True
        documents = starts.cumsum(1, dtype=torch.int32) - 1
        positions = column - torch.where(starts, column, 0).cummax(1).values
    if form.shift:
        eligible = eligible & ~starts
    drawn = 1 / p_mask if compact.weight is None else _spread(compact, compact.weight)
    found = DiffusionBatch(
        noisy_ids=noisy,
        target_ids=target,
        masked=masked,
        weight=torch.where(masked, drawn if form.weighting else torch.ones(()), torch.zeros(())),
        eligible=eligible,
        document_ids=torch.where(inside, documents, PADDING_DOCUMENT).to(torch.int32),
        position_ids=positions.contiguous(),
        t=t,
        p_mask=p_mask,
        dropped=dropped,
        sample_ids=torch.from_numpy(compact.sample_ids),
    )
    if form.per_answer:
        found.weight = found.weight / answer_lengths(found)
    if lookahead is not None:
        found.visibility = torch.stack((column, column + lookahead, torch.full_like(column, -1)), -1)
    if form.kind == "autoregressive":
        found.noisy_ids = torch.where(starts, form.start_id, noisy.roll(1, 1))
        found.visibility = torch.stack((column, column, torch.full_like(column, -1)), -1)
    elif form.kind == "block":
        return _with_clean_copy(found, target if hidden is None else torch.where(hidden, mask_id, target), form)
    elif form.kind == "uniform":
        found.current_ids, found.alpha = found.noisy_ids, 1 - p_mask
    elif form.kind == "flow" and compact.soft_ids is not None and compact.soft_weights is not None:
        found.soft_ids = torch.from_numpy(compact.soft_ids.astype(np.int64))
        found.soft_weights = torch.from_numpy(compact.soft_weights)
        if hidden is not None:
            found.soft_ids = torch.where(hidden[..., None], mask_id, found.soft_ids)
    return _shifted(found) if form.shift else found


def answer_lengths(batch: DiffusionBatch) -> Tensor:
    """Eligible tokens of each token's document, at least 1, float32 [B, C]."""
    key = _answer(batch)
    return torch.bincount(key[batch.eligible], minlength=int(key.max()) + 1).clamp(min=1)[key].float()


def answers(batch: DiffusionBatch) -> int:
    """Documents that have eligible tokens."""
    return len(_answer(batch)[batch.eligible].unique())


def _answer(batch: DiffusionBatch) -> Tensor:
    """A number for each (sample, document), [B, C]."""
    samples, columns = batch.document_ids.shape
    return torch.arange(samples)[:, None] * (columns + 1) + batch.document_ids.long() + 1


def _unpack(bits: np.ndarray, size: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits, axis=1, count=size).view(bool).copy())


def _spread(compact: CompactBatch, values: np.ndarray) -> Tensor:
    """The number of each token's part, float32 [B, L]."""
    batch, size = compact.tokens.shape
    numbers = torch.from_numpy(values)
    if compact.unit_bits is None:
        return numbers[:, None].expand(batch, size).contiguous()
    starts = _unpack(compact.unit_bits, size)
    starts[:, 0] = True
    return numbers[starts.flatten().cumsum(0) - 1].view(batch, size)


def _shifted(batch: DiffusionBatch) -> DiffusionBatch:
    """What is to be predicted moves one to the left: the hidden state at i is paid for token i + 1 of its document."""
    for name, empty in (("target_ids", 0), ("masked", False), ("weight", 0.0), ("eligible", False), ("t", 1.0)):
        moved = getattr(batch, name).roll(-1, 1)
        moved[:, -1] = empty
        setattr(batch, name, moved)
    return batch


def _with_clean_copy(batch: DiffusionBatch, clean: Tensor, form: Form) -> DiffusionBatch:
    """[noisy; clean], each half of L tokens (block diffusion: Arriola et al., arXiv 2503.09573).

    A noisy block sees itself and the clean blocks before it; a clean block sees itself and those before it. Only the noisy
    half is paid for.
    """
    block = torch.arange(clean.shape[1], dtype=torch.int32).expand(clean.shape) // form.block_size
    noisy = torch.stack((torch.full_like(block, UNSEEN), block - 1, block), -1)
    behind = torch.stack((block, block, torch.full_like(block, -1)), -1)
    nothing = torch.zeros_like(batch.masked)
    return DiffusionBatch(
        noisy_ids=torch.cat((batch.noisy_ids, clean), 1),
        target_ids=torch.cat((batch.target_ids, clean), 1),
        masked=torch.cat((batch.masked, nothing), 1),
        weight=torch.cat((batch.weight, nothing.float()), 1),
        eligible=torch.cat((batch.eligible, nothing), 1),
        document_ids=torch.cat((batch.document_ids,) * 2, 1),
        position_ids=torch.cat((batch.position_ids,) * 2, 1),
        t=torch.cat((batch.t,) * 2, 1),
        p_mask=torch.cat((batch.p_mask,) * 2, 1),
        dropped=batch.dropped,
        sample_ids=batch.sample_ids,
        visibility=torch.cat((noisy, behind), 1),
    )
