"""Microbatches: the compact form that loader workers ship, and the DiffusionBatch that the model and the loss read.

Workers draw everything and ship few bytes (uint16/32 tokens, packed mask bits, a handful of numbers per sample); the
consumer expands. Shapes: B samples, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class CompactBatch:
    """What a worker ships: about 2.2 bytes a token."""

    tokens: np.ndarray  # [B, L] uint16 or uint32; what follows `length` is pad
    mask_bits: np.ndarray  # [B, ceil(L / 8)] uint8, np.packbits of the masks
    length: np.ndarray  # [B] int32, tokens that are not padding
    condition_length: np.ndarray  # [B] int32, clean prefix without loss
    t: np.ndarray  # [B] float32
    p_mask: np.ndarray  # [B] float32
    dropped: np.ndarray  # [B] bool
    sample_ids: np.ndarray  # [B] int64


@dataclass
class DiffusionBatch:
    """One microbatch, [B, L] unless said otherwise. `masked` is carried and never derived from ids."""

    noisy_ids: Tensor  # int64, what the model sees
    target_ids: Tensor  # int64, the clean tokens
    masked: Tensor  # bool, counted in the loss
    weight: Tensor  # float32, 0 where there is no loss, else the schedule's weight
    eligible: Tensor  # bool, could have been masked: the `tokens` normaliser counts these
    document_ids: Tensor  # int32, -1 is padding
    position_ids: Tensor  # int32
    t: Tensor  # float32
    p_mask: Tensor  # float32
    dropped: Tensor  # [B] bool
    sample_ids: Tensor  # [B] int64

    def to(self, device: torch.device | str) -> DiffusionBatch:
        return DiffusionBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, the plain form in which `parallel` takes a batch."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def collate(samples: Iterable[dict], size: int, pad_id: int) -> Iterator[CompactBatch]:
    """Stacks every `size` consecutive samples to a CompactBatch; the last one of a finite stream may be smaller."""
    group: list[dict] = []
    for sample in samples:
        group.append(sample)
        if len(group) == size:
            yield _stack(group, pad_id)
            group = []
    if group:
        yield _stack(group, pad_id)


def _stack(group: list[dict], pad_id: int) -> CompactBatch:
    tokens = np.stack([s["tokens"] for s in group])
    length = np.array([s["length"] for s in group], np.int32)
    tokens[np.arange(tokens.shape[1])[None] >= length[:, None]] = pad_id
    return CompactBatch(
        tokens=tokens,
        mask_bits=np.packbits(np.stack([s["mask"] for s in group]), axis=1),
        length=length,
        condition_length=np.array([s["condition_length"] for s in group], np.int32),
        t=np.array([s["t"] for s in group], np.float32),
        p_mask=np.array([s["p_mask"] for s in group], np.float32),
        dropped=np.array([s["dropped"] for s in group], bool),
        sample_ids=np.array([s["sample_id"] for s in group], np.int64),
    )


def expand(compact: CompactBatch, mask_id: int, weighting: bool = True) -> DiffusionBatch:
    """CompactBatch -> DiffusionBatch on the CPU.

    The weight of a masked token is 1 / p_mask (1 with `weighting` off: then the loss is not the likelihood bound).
    """
    batch, size = compact.tokens.shape
    target = torch.from_numpy(compact.tokens.astype(np.int64))
    masked = torch.from_numpy(np.unpackbits(compact.mask_bits, axis=1, count=size).view(bool))
    position = torch.arange(size, dtype=torch.int32).expand(batch, size)
    length = torch.from_numpy(compact.length)[:, None]
    condition = torch.from_numpy(compact.condition_length)[:, None]
    dropped = torch.from_numpy(compact.dropped)
    p_mask = torch.from_numpy(compact.p_mask)[:, None].expand(batch, size).contiguous()
    hidden_condition = dropped[:, None] & (position < condition)
    inside = position < length
    return DiffusionBatch(
        noisy_ids=torch.where(masked | hidden_condition, mask_id, target),
        target_ids=target,
        masked=masked,
        weight=torch.where(masked, 1.0 / p_mask if weighting else torch.ones(()), torch.zeros(())),
        eligible=inside & (position >= condition),
        document_ids=torch.where(inside, 0, PADDING_DOCUMENT).to(torch.int32),
        position_ids=position.contiguous(),
        t=torch.from_numpy(compact.t)[:, None].expand(batch, size).contiguous(),
        p_mask=p_mask,
        dropped=dropped,
        sample_ids=torch.from_numpy(compact.sample_ids),
    )
