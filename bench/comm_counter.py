"""Counts what a step communicates, on the c10d operators themselves: whoever calls them, forward or backward, is seen."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "broadcast", "point-to-point", "other")

# Operator of c10d -> its kind, and the argument that holds the full buffer: what all ranks of the group hold together after
# an all-gather or before a reduce-scatter.
_BUFFERS = {
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_coalesced_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "broadcast_": ("broadcast", 0),
    "send": ("point-to-point", 0),
    "reduce_": ("other", 0),
    "gather_": ("other", 1),
    "scatter_": ("other", 0),
    "alltoall_": ("other", 1),
    "alltoall_base_": ("other", 1),
}
_WITHOUT_PAYLOAD = ("barrier", "monitored_barrier_", "check_for_nan")
_COUNTED_WHERE_SENT = ("recv_", "recv_any_source_")


@dataclass
class Volume:
    """calls: collectives entered, or messages sent. bytes: of the full, unsharded buffers."""

    calls: int = 0
    bytes: int = 0


class CommCounter(TorchDispatchMode):
    """Inside this context `volumes` (kind -> Volume) grows with every collective that this process enters.

    Raises NotImplementedError for a communicating operator that it cannot size, so that none goes uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.volumes: defaultdict[str, Volume] = defaultdict(Volume)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        elif func.namespace == "_c10d_functional" and func.overloadpacket.__name__ != "wait_tensor":
            raise NotImplementedError(f"{func}: a functional collective; the counter knows those of c10d")
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple) -> None:
        if operator in _WITHOUT_PAYLOAD or operator in _COUNTED_WHERE_SENT:
            return
        if operator not in _BUFFERS:
            raise NotImplementedError(f"c10d::{operator}: the counter does not know which argument is the full buffer")
        kind, index = _BUFFERS[operator]
        buffers = [x for x in tree_leaves(args[index]) if isinstance(x, torch.Tensor)]
        self.volumes[kind].calls += 1
        self.volumes[kind].bytes += sum(x.numel() * x.element_size() for x in buffers)
