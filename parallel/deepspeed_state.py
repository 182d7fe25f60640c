"""Where DeepSpeed's optimizers keep what a checkpoint needs: float32 weights, Adam's moments, reduced gradients.

Every value is a 1-D view of live storage with the place where it begins in this rank's tensor-parallel share of the parameter,
whatever the ZeRO stage: 0 holds whole shares, 1 and 2 a range of some parameters, 3 an equal range of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parallel.optimizer import MOMENTS

Range = tuple[int, Tensor]  # (first element within the share, values)


def adam(optimizer: Any) -> Any:
    """The AdamW inside a DeepSpeed optimizer; ZeRO-0 has nothing around it."""
    return getattr(optimizer, "optimizer", optimizer)


def masters(optimizer: Any) -> list[Tensor]:
    """The float32 tensors that AdamW updates on this rank."""
    partitions = getattr(
        optimizer, "fp32_partitioned_groups_flat", None
    )  # ZeRO-3 shows them to AdamW during a step only
    if partitions is not None:
        return list(partitions)
    return [tensor for group in adam(optimizer).param_groups for tensor in group["params"]]


def create_moments(optimizer: Any) -> None:
    """AdamW's state is empty until the first step; a load before it needs somewhere to write."""
    state = adam(optimizer).state
    for tensor in masters(optimizer):
        if not state[tensor]:
            device = tensor.device if torch.cuda.is_available() else "cpu"
            state[tensor].update(
                step=torch.zeros((), dtype=torch.float32, device=device),
                **{moment: torch.zeros_like(tensor.data) for moment in MOMENTS},
            )


def set_step(optimizer: Any, steps: int, impl: str) -> None:
    """AdamW goes on as after `steps` steps."""
    inner = adam(optimizer)
    for group in inner.param_groups:
        if "step" in group or impl == "apex":  # NVIDIA's FusedAdam counts steps by group
            group["step"] = steps
    for moments in inner.state.values():
        if isinstance(moments["step"], Tensor):
            moments["step"].fill_(steps)
        else:
            moments["step"] = steps


def values(optimizer: Any, zero_stage: int, parameter: nn.Parameter, kind: str, shard_rank: int) -> Range:
    """`kind` (weight or one of MOMENTS) of one parameter; no elements if this rank holds none of it."""
    if zero_stage == 0:
        tensor = parameter.data if kind == "weight" else adam(optimizer).state[parameter][kind]
        return 0, tensor.view(-1)
    if zero_stage == 3:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        partition = (
            safe_get_local_fp32_param(parameter)
            if kind == "weight"
            else safe_get_local_optimizer_state(parameter, kind)
        )
        return shard_rank * partition.numel(), partition.detach()
    fragment: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if fragment is None:
        return 0, torch.empty(0, device=parameter.device)
    flat = adam(optimizer).param_groups[fragment.param_group_index]["params"][0]
    place = fragment.hp_fragment_address
    whole = flat.data if kind == "weight" else adam(optimizer).state[flat][kind]
    return fragment.lp_fragment_address.start, whole.narrow(0, place.start, place.numel)


def copy_to_forward(optimizer: Any, zero_stage: int, parameters: list[nn.Parameter], shard_rank: int) -> None:
    """What the forward reads follows the float32 weights. Collective."""
    if zero_stage == 3:
        for parameter in parameters:
            sharded: Any = parameter
            sharded.ds_tensor.data.copy_(values(optimizer, 3, parameter, "weight", shard_rank)[1])
    elif zero_stage:
        optimizer.update_lp_params()


def gradients(optimizer: Any, zero_stage: int, shard_rank: int) -> Iterator[tuple[nn.Parameter, Range]]:
    """(parameter, values) of every reduced, unclipped gradient on this rank, between backward and step."""
    if zero_stage == 0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, (0, parameter.grad.view(-1))
    elif zero_stage == 3:
        for i, group in enumerate(optimizer.fp16_groups):
            for parameter, grad in zip(group, optimizer.averaged_gradients[i]):
                yield parameter, (shard_rank * grad.numel(), grad.view(-1))
    elif hasattr(optimizer, "bf16_groups"):  # ZeRO-1 in bf16 keeps whole float32 gradients
        for group, grads in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients):
            for parameter, grad in zip(group, grads):
                yield parameter, (0, grad.view(-1))
    else:
        for i, group in enumerate(optimizer.params_in_partition):
            held = [g for g in optimizer.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
            for parameter, grad in zip(group, held):
                yield parameter, (parameter._hp_mapping.lp_fragment_address.start, grad.reshape(-1))
