"""A piece of a logical tensor: its full shape, and the rectangular boxes of it that this rank holds.

torch.distributed.checkpoint plans and moves any object with the three dunder methods below, so a checkpoint written at one
layout is read at any other without a gather. The views alias live storage: loading writes in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Offsets = tuple[int, ...]


class Boxes:
    """`parts`: (offset of the box in the full tensor, view of its values); empty boxes are left out."""

    def __init__(
        self, shape: Sequence[int], parts: Sequence[tuple[Offsets, Tensor]], dtype: torch.dtype = torch.float32
    ):
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.parts = [(torch.Size(offset), view) for offset, view in parts if view.numel()]

    def size(self) -> torch.Size:
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, view.size()) for offset, view in self.parts]

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, offset),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(ChunkStorageMetadata(offset, view.size()), properties, self.shape),
            )
            for offset, view in self.parts
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for offset, view in self.parts if offset == index.offset)


def flat_range_boxes(start: int, stop: int, shape: Sequence[int]) -> list[tuple[Offsets, Offsets]]:
    """Splits the flat range [start, stop) of a row-major tensor into boxes (offset, size), in flat order; at most 2 ndim - 1."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row_size = math.prod(shape[1:])
    (first, first_column), (last, last_column) = divmod(start, row_size), divmod(stop, row_size)

    def inside_row(row: int, a: int, b: int) -> list[tuple[Offsets, Offsets]]:
        return [((row, *offset), (1, *size)) for offset, size in flat_range_boxes(a, b, shape[1:])]

    if first == last:
        return inside_row(first, first_column, last_column)
    boxes = []
    if first_column:
        boxes += inside_row(first, first_column, row_size)
        first += 1
    if last > first:
        boxes.append(((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])))
    if last_column:
        boxes += inside_row(last, 0, last_column)
    return boxes


def boxes_of_flat_range(
    shape: Sequence[int], local_shape: Sequence[int], tp_dim: int | None, tp_rank: int, values: Tensor, start: int
) -> Boxes:
    """Boxes of a flat range of a tensor-parallel share, which begins at element `start` of the share.

    shape: full and unpadded. local_shape: the tensor-parallel share, vocabulary padding included. values: 1-D; they may run
    past the end of the share. What lies in padding belongs to no box.
    """
    local = list(local_shape)
    base = [0] * len(shape)
    if tp_dim is not None:
        base[tp_dim] = tp_rank * local[tp_dim]
        local[tp_dim] = max(0, min(local[tp_dim], shape[tp_dim] - base[tp_dim]))  # rows of padding come last
    stop = min(start + values.numel(), math.prod(local))
    parts, at = [], 0
    for offset, size in flat_range_boxes(start, stop, local):
        count = math.prod(size)
        parts.append((tuple(b + o for b, o in zip(base, offset)), values.narrow(0, at, count).view(size)))
        at += count
    return Boxes(shape, parts, values.dtype)


def boxes_of_flat_partition(
    shape: Sequence[int], local_shape: Sequence[int], tp_dim: int | None, tp_rank: int, partition: Tensor, dp_rank: int
) -> Boxes:
    """Boxes of one data-parallel rank's flat partition of a tensor-parallel share (ZeRO-3's layout): all of equal size."""
    return boxes_of_flat_range(shape, local_shape, tp_dim, tp_rank, partition, dp_rank * partition.numel())


class BoxSavePlanner(DefaultSavePlanner):
    """The default planner asks only torch.Tensor subclasses for their shards; this one asks Boxes too."""

    def lookup_object(self, index: MetadataIndex) -> object:
        value = self.state_dict[index.fqn]
        return value.__get_tensor_shard__(index) if isinstance(value, Boxes) else super().lookup_object(index)


class BoxLoadPlanner(DefaultLoadPlanner):
    """As BoxSavePlanner; the default set-up would replace every object it does not know by None."""

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        value = self.state_dict[index.fqn]
        return value.__get_tensor_shard__(index) if isinstance(value, Boxes) else super().lookup_tensor(index)

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        self.original_state_dict = self.state_dict = dict(state_dict)
        self.metadata = metadata
        self.is_coordinator = is_coordinator
        self.flatten_state_dict = False
