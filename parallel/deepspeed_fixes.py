"""What DeepSpeed needs done to it for a pipeline and for shard groups: the only place that touches its private state.

DeepSpeed's engine expects that it calls the model and the backward itself, one microbatch after the other. Here the schedules
of torch.distributed.pipelining call the chunks directly: no engine hook sees the microbatches, so nothing divides gradients by
the accumulation, nothing counts backwards, no trace is recorded and compared with ranks that run other layers. What is left:

- `norm_group`: the global norm and the skip of a step span all stages, not one.
- `gathered_once`: ZeRO-3's module hooks would gather and drop every layer in every microbatch.
- `accumulate_in_float32`: without the engine's backward, bf16 gradients of the microbatches would add up in bf16.
- `sum_over_replicas`: ZeRO knows one group of ranks; those that hold copies of a shard must add their gradients too.
- `one_norm_for_replicas`: each replica's norm is summed in a communicator of its own, and its last bit may differ.
- `number_alike`: after engines that gave ranks different layers, DeepSpeed numbers the next one's parameters differently.
- `forget`: a closed engine stays in a module-level list and in a method cache, its parameters with it, and ZeRO-3's linear stays
  torch.nn.functional.linear for everybody.

Each is looked up in this module at every call, so a test can take one away.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.mesh import Mesh

VERSION = "0.19.8"
_PINNED = -1  # in `ds_active_sub_modules`; modules are numbered from 0


def require_version(installed: str) -> None:
    """ValueError unless this is the release whose private state is known."""
    if installed != VERSION:
        raise ValueError(
            f"layout: pipeline or shard_group on engine deepspeed needs deepspeed=={VERSION}, found {installed}; "
            "install it or use parallel.engine=fsdp2"
        )


def _private(holder: Any, name: str) -> Any:
    """`holder.name`, or an error that says what is missing."""
    if not hasattr(holder, name):
        raise RuntimeError(
            f"deepspeed: {type(holder).__name__}.{name} is gone; parallel/deepspeed_fixes.py relies on it"
        )
    return getattr(holder, name)


def norm_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """The group over which DeepSpeed adds up squared norms and shares the verdict "not finite": tensor x pipeline ranks.

    DeepSpeed calls it the model-parallel group and takes its size and rank to be the tensor-parallel ones. A replicated parameter
    is counted on tensor-parallel rank 0 of its stage. With the tensor-parallel group alone each stage would clip by its own
    norm, and one stage would skip a step that the others apply.
    """
    return mesh.model_group


@contextlib.contextmanager
def gathered_once(zero: Any, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, every parameter of `modules` is gathered once (ZeRO-3) and stays until the end.

    The gathers of all blocks are issued at once and awaited by the modules' own hooks when they first need them. Without this
    each layer is gathered for the forward and again for the backward of every microbatch.
    """
    offload = _private(zero, "parameter_offload")
    stream = _private(offload, "_DeepSpeedZeRoOffload__allgather_stream")
    in_flight = _private(offload, "_DeepSpeedZeRoOffload__inflight_param_registry")
    parameters: list[Any] = []
    with _after_current_work(stream):
        for module in modules:
            for unit in _fetched_together(module):
                parameters += unit
                handle = unit[0].all_gather_coalesced(unit)
                for parameter in unit:
                    in_flight[parameter] = handle
                    _private(parameter, "ds_active_sub_modules").add(_PINNED)
    try:
        yield
    finally:
        for parameter in parameters:
            if parameter in in_flight:  # never used
                in_flight.pop(parameter).wait()
            parameter.ds_active_sub_modules.clear()
            parameter.partition()


@contextlib.contextmanager
def _after_current_work(stream: Any) -> Iterator[None]:
    """Runs the body on `stream` (None: there are no streams), behind what the current one has been given."""
    from deepspeed.accelerator import get_accelerator

    if stream is not None:
        stream.wait_stream(get_accelerator().current_stream())
    with get_accelerator().stream(stream):
        yield


def _fetched_together(module: nn.Module) -> Iterator[list[Any]]:
    """Lists of parameters that one module's hooks fetch at once: those of a leaf module, else a module's own."""
    from deepspeed.utils import z3_leaf_module

    leaf = z3_leaf_module(module)
    own = list(module.parameters(recurse=leaf))
    if own:
        yield own
    if not leaf:
        for child in module.children():
            yield from _fetched_together(child)


def accumulate_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """The gradients of bf16 parameters are float32: each microbatch's bf16 gradient is added to a float32 sum."""
    for parameter in parameters:
        parameter.grad_dtype = torch.float32


def sum_over_replicas(zero: Any, mesh: Mesh) -> None:
    """Adds up ZeRO-3's reduced gradient shards over the ranks that hold copies of the same shard, in place."""
    flat = _private(zero, "grad_partitions_flat_buffer")
    dist.all_reduce(flat, group=mesh.replica_group)


def one_norm_for_replicas(zero: Any, mesh: Mesh) -> None:
    """Every replica of a shard clips by the first replica's norm (ZeRO-3): their weights stay equal to the bit.

    The gradients of replicas are equal after `sum_over_replicas`, but a communication library need not add up numbers in one
    order in two communicators.
    """
    own = _private(type(zero), "_get_norm_groups")
    this = weakref.proxy(zero)  # the optimizer holds what is set on it

    def first_replicas() -> list[torch.Tensor]:
        norms = torch.stack(list(own(this)))
        dist.broadcast(norms, group=mesh.replica_group, group_src=0)
        return list(norms)

    zero._get_norm_groups = first_replicas


def number_alike() -> None:
    """DeepSpeed numbers modules and parameters through a process's life, and compares the numbers of all ranks (ZeRO-3).

    Ranks that held different stages of an earlier engine would differ: each engine numbers from 0. Numbers are looked up within
    one engine only.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    _private(Init, "param_id")
    Init.param_id = 0
    (count,) = _private(_private(DeepSpeedZeRoOffload, "_register_deepspeed_module"), "__defaults__")
    count[0] = 0


def forget(module: nn.Module) -> None:
    """Drops a closed engine's model from DeepSpeed's module-level state, else its memory is never freed; torch's linear is back."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    stack = _private(parameter_offload, "FWD_MODULE_STACK")
    gone = set(module.modules())
    stack[:] = [kept for kept in stack if kept not in gone]
    releases = _private(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release")
    for cell in _private(releases, "__closure__"):  # a decorator around functools.lru_cache, which holds its arguments
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    if not stack and hasattr(InsertPostInitMethodToModuleSubClasses, "linear_bk"):  # no other engine uses ZeRO-3 here
        torch.nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk
