"""Microbatches: the compact form that loader workers ship, and the DiffusionBatch that the model and the loss read.

Workers draw everything and ship few bytes (uint16/32 tokens, packed mask bits, a handful of numbers per sample); the
consumer expands. Shapes: B samples, L tokens.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from data import randomness

PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class CompactBatch:
    """What a worker ships: 2.2 to 2.5 bytes a token. Bits are np.packbits along the tokens."""

    tokens: np.ndarray  # [B, L] uint16 or uint32; what follows `length` is pad
    mask_bits: np.ndarray  # [B, ceil(L / 8)] uint8
    prompt_bits: Optional[np.ndarray]  # the same, tokens shown clean and without loss; None: there are none
    border_bits: Optional[np.ndarray]  # the same, first tokens of documents that are isolated; None: one text a sample
    length: np.ndarray  # [B] int32, tokens that are not padding; 0: nothing of this sample counts
    t: np.ndarray  # [B] float32
    p_mask: np.ndarray  # [B] float32
    dropped: np.ndarray  # [B] bool
    sample_ids: np.ndarray  # [B] int64
    source: np.ndarray  # [B] int16, which source of a mixture
    bad_shard: np.ndarray  # [B] int32, the shard of that source that could not be read, -1: all is well
    digest: np.ndarray  # [B] int64, CRC-32 of everything above that belongs to the sample

    def pairs(self) -> int:
        """Pairs of tokens that attend to each other: the sum of the squares of the documents' lengths, padding being one more."""
        batch, size = self.tokens.shape
        borders = np.zeros((batch, size), bool)
        if self.border_bits is not None:
            borders = np.unpackbits(self.border_bits, axis=1, count=size).view(bool)
        borders &= np.arange(size) < self.length[:, None]
        borders[:, 0] = True
        padded = self.length < size
        borders[padded, self.length[padded]] = True
        lengths = np.diff(np.append(np.flatnonzero(borders), batch * size))
        return int((lengths.astype(np.int64) ** 2).sum())

    def without(self, lost: np.ndarray) -> CompactBatch:
        """The same batch, of whose samples where `lost` ([B] bool) nothing counts: no mask, no loss, only padding."""
        keep = ~lost
        return replace(
            self, mask_bits=self.mask_bits * keep[:, None], length=self.length * keep, digest=self.digest * keep
        )


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
    if pad_id > np.iinfo(tokens.dtype).max:  # samples that could not be read know nothing of the vocabulary
        tokens = tokens.astype(np.uint32)
    length = np.array([s["length"] for s in group], np.int32)
    for row, used in zip(tokens, length):
        row[used:] = pad_id
    masks = np.packbits(np.stack([s["mask"] for s in group]), axis=1)
    prompts, borders = _bits(group, "prompt"), _bits(group, "borders")
    return CompactBatch(
        tokens=tokens,
        mask_bits=masks,
        prompt_bits=prompts,
        border_bits=borders,
        length=length,
        t=np.array([s["t"] for s in group], np.float32),
        p_mask=np.array([s["p_mask"] for s in group], np.float32),
        dropped=np.array([s["dropped"] for s in group], bool),
        sample_ids=np.array([s["sample_id"] for s in group], np.int64),
        source=np.array([s.get("source", 0) for s in group], np.int16),
        bad_shard=np.array([s.get("bad_shard", -1) for s in group], np.int32),
        digest=_digests(group, tokens, masks, prompts, borders),
    )


def _digests(group: list[dict], *arrays: Optional[np.ndarray]) -> np.ndarray:
    """For each sample what was read and drawn for it, in one number that does not depend on the batch around it, int64 [B]."""
    sums = [_row_sums(array).tolist() if array is not None else [0] * len(group) for array in arrays]
    digests = []
    for sample, *hashes in zip(group, *sums, strict=True):
        numbers = (sample["sample_id"], sample["length"], sample["t"], sample["p_mask"], sample["dropped"])
        digests.append(zlib.crc32(struct.pack("<qqdd?4Q", *numbers, *hashes)))
    return np.array(digests, np.int64)


def _row_sums(rows: np.ndarray) -> np.ndarray:
    """A linear hash of each row's bytes modulo 2**64, uint64 [B]; 0 for a row of zeros."""
    content = rows.view(np.uint8)
    if content.shape[1] % 8:
        content = np.pad(content, ((0, 0), (0, -content.shape[1] % 8)))
    return content.view(np.uint64) @ _weights(content.shape[1] // 8)


@lru_cache(maxsize=8)
def _weights(count: int) -> np.ndarray:
    return randomness.words(0, "digest", 0, count) | np.uint64(1)


def _bits(group: list[dict], name: str) -> Optional[np.ndarray]:
    """The [L] bool of every sample, packed; None if no sample has one."""
    if all(s.get(name) is None for s in group):
        return None
    nothing = np.zeros(len(group[0]["tokens"]), bool)
    return np.packbits(np.stack([nothing if s.get(name) is None else s[name] for s in group]), axis=1)


def expand(compact: CompactBatch, mask_id: int, weighting: bool = True) -> DiffusionBatch:
    """CompactBatch -> DiffusionBatch on the CPU.

    The weight of a masked token is 1 / p_mask (1 with `weighting` off: then the loss is not the likelihood bound).
    """
    batch, size = compact.tokens.shape
    target = torch.from_numpy(compact.tokens.astype(np.int64))
    masked = torch.from_numpy(np.unpackbits(compact.mask_bits, axis=1, count=size).view(bool))
    column = torch.arange(size, dtype=torch.int32).expand(batch, size)
    inside = column < torch.from_numpy(compact.length)[:, None]
    dropped = torch.from_numpy(compact.dropped)
    p_mask = torch.from_numpy(compact.p_mask)[:, None].expand(batch, size).contiguous()
    noisy, eligible = torch.where(masked, mask_id, target), inside
    if compact.prompt_bits is not None:
        prompt = torch.from_numpy(np.unpackbits(compact.prompt_bits, axis=1, count=size).view(bool)) & inside
        noisy = torch.where(prompt & dropped[:, None], mask_id, noisy)
        eligible = inside & ~prompt
    documents, positions = torch.zeros(batch, size, dtype=torch.int32), column
    if compact.border_bits is not None:
        borders = torch.from_numpy(np.unpackbits(compact.border_bits, axis=1, count=size).view(bool)).clone()
        borders[:, 0] = True
        documents = borders.cumsum(1, dtype=torch.int32) - 1
        positions = column - torch.where(borders, column, 0).cummax(1).values
    return DiffusionBatch(
        noisy_ids=noisy,
        target_ids=target,
        masked=masked,
        weight=torch.where(masked, 1.0 / p_mask if weighting else torch.ones(()), torch.zeros(())),
        eligible=eligible,
        document_ids=torch.where(inside, documents, PADDING_DOCUMENT).to(torch.int32),
        position_ids=positions.contiguous(),
        t=torch.from_numpy(compact.t)[:, None].expand(batch, size).contiguous(),
        p_mask=p_mask,
        dropped=dropped,
        sample_ids=torch.from_numpy(compact.sample_ids),
    )
