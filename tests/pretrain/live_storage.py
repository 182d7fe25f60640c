"""Bytes of tensors that exist, whoever holds them: Python, or autograd's graph, which Python's garbage collector does not see."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageLog(TorchDispatchMode):
    """Notes the storage of every tensor that an operation makes while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        output = function(*arguments, **(options or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return output

    def alive(self, without: Iterable[Tensor] = ()) -> int:
        """Bytes of those that still exist, but for what `without` holds."""
        known = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(size for key, (ref, size) in self._seen.items() if key not in known and not ref.expired())


def storages(device: torch.device) -> dict[int, torch.UntypedStorage]:
    """Address -> storage of every tensor on `device` that Python knows, gradients included."""
    gc.collect()
    found: dict[int, torch.UntypedStorage] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
        tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    for tensor in tensors:
        if not hasattr(tensor, "_local_tensor") and tensor.device == device:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return found
