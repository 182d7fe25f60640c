"""Which layouts are legal: a pure function that answers in microseconds, without GPUs or process groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from parallel.shape import ModelShape


@dataclass(frozen=True)
class Illegal:
    """Why a layout is refused, and the nearest one that is not."""

    reason: str
    alternative: str


def _divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


def _nearest(value: int, allowed: list[int]) -> int:
    return min(allowed, key=lambda d: (abs(d - value), d))


def check_layout(
    shape: ModelShape, world_size: int, tensor: int, global_batch_size: int, micro_batch_size: int
) -> Optional[Illegal]:
    """None if the layout is legal, else the first reason against it."""
    for key, value in (
        ("model.num_layers", shape.num_layers),
        ("model.hidden_size", shape.hidden_size),
        ("model.num_heads", shape.num_heads),
        ("model.num_kv_heads", shape.num_kv_heads),
        ("model.ffn_hidden_size", shape.ffn_hidden_size),
        ("model.vocab_size", shape.vocab_size),
        ("parallel.tensor", tensor),
        ("train.global_batch_size", global_batch_size),
        ("train.micro_batch_size", micro_batch_size),
    ):
        if value < 1:
            return Illegal(f"{key} is {value}", f"{key} >= 1")
    if shape.hidden_size % shape.num_heads:
        heads = _nearest(shape.num_heads, _divisors(shape.hidden_size))
        return Illegal(
            f"model.hidden_size {shape.hidden_size} is not a multiple of model.num_heads {shape.num_heads}",
            f"model.num_heads {heads}",
        )
    if shape.head_dim % 2:
        return Illegal(
            f"rotary positions need an even head size, and {shape.hidden_size} / {shape.num_heads} = {shape.head_dim}",
            f"model.hidden_size {shape.num_heads * (shape.head_dim + 1)}",
        )
    if shape.num_heads % shape.num_kv_heads:
        heads = _nearest(shape.num_kv_heads, _divisors(shape.num_heads))
        return Illegal(
            f"model.num_heads {shape.num_heads} is not a multiple of model.num_kv_heads {shape.num_kv_heads}",
            f"model.num_kv_heads {heads}",
        )
    for key, size in (
        ("model.num_heads", shape.num_heads),
        ("model.num_kv_heads", shape.num_kv_heads),
        ("model.ffn_hidden_size", shape.ffn_hidden_size),
    ):
        if size % tensor:
            allowed = _nearest(tensor, _divisors(shape.num_heads, shape.num_kv_heads, shape.ffn_hidden_size))
            return Illegal(
                f"{key} {size} cannot be split over parallel.tensor {tensor} ranks", f"parallel.tensor {allowed}"
            )
    if world_size % tensor:
        allowed = _nearest(tensor, _divisors(world_size, shape.num_heads, shape.num_kv_heads, shape.ffn_hidden_size))
        return Illegal(
            f"{world_size} ranks are not a multiple of parallel.tensor {tensor}", f"parallel.tensor {allowed}"
        )
    unit = world_size // tensor * micro_batch_size
    if global_batch_size % unit:
        return Illegal(
            f"train.global_batch_size {global_batch_size} is not a multiple of {world_size // tensor} data-parallel ranks x "
            f"train.micro_batch_size {micro_batch_size}",
            f"train.global_batch_size {max(unit, round(global_batch_size / unit) * unit)}",
        )
    return None
