"""The compact form of a microbatch: what loader workers ship. They draw everything; the consumer expands (data.batch).

Few bytes travel: uint16/32 tokens, packed mask bits, a handful of numbers per sample. Shapes: B samples, L tokens; n parts of all
samples that have a noise level of their own (n = B where each sample has one).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Optional

import numpy as np

from data import randomness


@dataclass(frozen=True)
class CompactBatch:
    """What a worker ships: 2.2 to 2.5 bytes a token for masks. Bits are np.packbits along the tokens."""

    tokens: np.ndarray  # [B, L] uint16 or uint32; what follows `length` is pad
    mask_bits: np.ndarray  # [B, ceil(L / 8)] uint8, tokens that count in the loss
    prompt_bits: Optional[np.ndarray]  # the same, tokens shown clean and without loss; None: there are none
    border_bits: Optional[np.ndarray]  # the same, first tokens of documents that are isolated; None: one text a sample
    length: np.ndarray  # [B] int32, tokens that are not padding; 0: nothing of this sample counts
    t: np.ndarray  # [n] float32
    p_mask: np.ndarray  # [n] float32
    dropped: np.ndarray  # [B] bool
    sample_ids: np.ndarray  # [B] int64
    source: np.ndarray  # [B] int16, which source of a mixture
    bad_shard: np.ndarray  # [B] int32, the shard of that source that could not be read, -1: all is well
    digest: np.ndarray  # [B] int64, CRC-32 of everything above that belongs to the sample
    weight: Optional[np.ndarray] = None  # [n] float32, of a counted token's loss; None: 1 / p_mask
    unit_bits: Optional[np.ndarray] = None  # as mask_bits, first tokens of the parts; None: each sample is one
    noisy: Optional[np.ndarray] = (
        None  # [B, L] uint16 or uint32, what the model is shown; None: the mask token where mask_bits
    )
    soft_ids: Optional[np.ndarray] = None  # [B, L, K] uint16 or uint32, ids that an input mixes; None: none
    soft_weights: Optional[np.ndarray] = None  # [B, L, K] float32, the shares of them

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
    prompts, borders, units = (_bits(group, name) for name in ("prompt", "borders", "units"))
    noisy, soft_ids, soft_weights = (_arrays(group, name) for name in ("noisy", "soft_ids", "soft_weights"))
    return CompactBatch(
        tokens=tokens,
        mask_bits=masks,
        prompt_bits=prompts,
        border_bits=borders,
        length=length,
        t=_numbers(group, "t"),
        p_mask=_numbers(group, "p_mask"),
        dropped=np.array([s["dropped"] for s in group], bool),
        sample_ids=np.array([s["sample_id"] for s in group], np.int64),
        source=np.array([s.get("source", 0) for s in group], np.int16),
        bad_shard=np.array([s.get("bad_shard", -1) for s in group], np.int32),
        digest=_digests(group, tokens, masks, prompts, borders, units, noisy, soft_ids, soft_weights),
        weight=_numbers(group, "weight"),
        unit_bits=units,
        noisy=noisy,
        soft_ids=soft_ids,
        soft_weights=soft_weights,
    )


def _digests(group: list[dict], *arrays: Optional[np.ndarray]) -> np.ndarray:
    """For each sample what was read and drawn for it, in one number that does not depend on the batch around it, int64 [B]."""
    nothing = [0] * len(
        group
    )  # also where no sample of the batch has such an array: the batch must not show in the digest
    sums = [nothing if array is None else _row_sums(array.reshape(len(group), -1)).tolist() for array in arrays]
    digests = []
    for sample, *hashes in zip(group, *sums, strict=True):
        levels = sample["t"], sample["p_mask"], sample["weight"]
        if "units" in sample:
            hashes += [zlib.crc32(np.asarray(values, np.float64).tobytes()) for values in levels]
            levels = 0.0, 0.0, 0.0
        numbers = (sample["sample_id"], sample["length"], *levels, sample["dropped"])
        digests.append(zlib.crc32(struct.pack(f"<qqddd?{len(hashes)}Q", *numbers, *hashes)))
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


def _arrays(group: list[dict], name: str) -> Optional[np.ndarray]:
    """The [L, ...] array of every sample, one behind the other; None if there are none."""
    return np.stack([s[name] for s in group]) if name in group[0] else None


def _numbers(group: list[dict], name: str) -> np.ndarray:
    """One number a sample, or one for each of its parts, float32 [n]."""
    if any("units" in s for s in group):
        return np.concatenate([np.atleast_1d(s[name]) for s in group]).astype(np.float32)
    return np.array([s[name] for s in group], np.float32)
