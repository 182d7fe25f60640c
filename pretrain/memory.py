"""Bytes that training takes on each GPU, by part, before anything is started. Pure: sizes in, bytes out; no torch.

Model states follow Rajbhandari et al. (ZeRO, arXiv 1910.02054), section 3, with what the two engines here really keep: gradients
add up in float32, DeepSpeed keeps a copy of the weights in the dtype of the forward, FSDP2 makes it of float32 shards. With a
pipeline a rank gathers its chunks once a step and reduces their gradients once, so it holds both whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Optional

from parallel.layout_rules import Case, Change
from parallel.legality import first_broken
from parallel.shape import ModelShape, parameter_table
from pretrain.memory_activations import (
    block_work,
    chunk_saves,
    element_bytes,
    hidden_bytes,
    layers_in,
    loss_saves,
    loss_work,
    most_in_flight,
    tokens_of,
)

GIB = 2**30
# CUDA's context, NCCL's channels and cuBLAS's workspaces lie outside of torch's allocator; the allocator itself loses some.
OUTSIDE_BYTES = 2 * GIB
FRAGMENTED = 0.05
BATCH_BYTES = 48  # a token of a microbatch on the device: ids, targets, positions, documents, weights, noise levels
REDUCE_BUCKET = 50_000_000  # elements; of parallel.engine_deepspeed


@dataclass(frozen=True)
class Held:
    """Elements of this rank's tensor-parallel share of its chunks, vocabulary padding included."""

    total: int
    block: int
    largest_matrix: int
    largest_unit: int  # gathered at once: a block, the embedding, or the head


@dataclass(frozen=True)
class Memory:
    """What one pipeline rank's GPUs hold, in bytes. `step` exists in the optimizer's step, when `working` is gone."""

    pp_rank: int
    states: dict[str, int]
    working: dict[str, int]
    step: int

    @cached_property
    def parts(self) -> dict[str, int]:
        """All that exists at the fullest moment."""
        work = self.working if sum(self.working.values()) >= self.step else {"optimizer step": self.step}
        found = {name: size for name, size in {**self.states, **work}.items() if size}
        lost = int(FRAGMENTED * sum(found.values()))
        return {**found, "libraries and fragmentation": OUTSIDE_BYTES + lost}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def sentence(self) -> str:
        """The total and its parts, the largest first, in GiB."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size >= 0.05 * GIB)
        return f"{self.total / GIB:.1f} GiB ({shown})"


def memory_per_gpu(case: Case) -> Memory:
    """Of the pipeline rank that needs most. `case` must be legal (parallel.legality)."""
    return max((memory_of_rank(case, rank) for rank in range(case.layout.pipeline)), key=lambda memory: memory.total)


def memory_of_rank(case: Case, pp_rank: int) -> Memory:
    """Of one pipeline rank."""
    held = held_by(case, pp_rank)
    return Memory(pp_rank, model_states(case, held), _working(case, pp_rank, held), _step(case, held))


def held_by(case: Case, pp_rank: int) -> Held:
    layout = case.layout
    layers = layers_in(layout, case.shape.num_layers)
    chunks = layout.chunks_of(pp_rank)
    block, largest_in_block, first, last = _sizes(case.shape, layout.tensor)
    outside = (first if 0 in chunks else []) + (last if layout.chunks - 1 in chunks else [])
    total = sum(layers[chunk] for chunk in chunks) * block + sum(outside)
    return Held(total, block, max([largest_in_block, *outside]), max([block, *outside]))


@lru_cache(maxsize=64)
def _sizes(shape: ModelShape, tensor: int) -> tuple[int, int, list[int], list[int]]:
    """Elements of a tensor-parallel share: of a block, of its largest matrix, of what comes before the blocks and behind them."""
    padded = shape.padded_vocab(tensor)
    sizes = {name: math.prod(s.local_shape(tensor, padded)) for name, s in parameter_table(shape).items()}
    block = [size for name, size in sizes.items() if name.startswith("blocks.0.")]
    first = [size for name, size in sizes.items() if name.startswith("embedding.")]
    last = [size for name, size in sizes.items() if name.startswith(("final_norm.", "head."))]
    return sum(block), max(block), first, last


def shard_size(case: Case) -> int:
    """Data-parallel ranks that share one set of shards."""
    return case.layout.shard_group or case.dp


def model_states(case: Case, held: Held) -> dict[str, int]:
    """Weights, gradients and optimizer states between backward and step."""
    total, e, whole_step = held.total, element_bytes(case), case.pipelined
    shard = -(-total // shard_size(case))
    stage = case.layout.zero_stage
    if case.layout.engine == "fsdp2":
        return {"parameters": 4 * shard, "gradients": 4 * shard, "optimizer": 8 * shard}
    if stage == 0:  # one copy of everything, in float32
        return {"parameters": 4 * total, "gradients": 4 * total, "optimizer": 8 * total}
    optimizer = 4 * shard + 8 * shard  # float32 weights and two moments
    if stage == 3:
        return {"parameters": e * shard, "gradients": 4 * shard, "optimizer": optimizer}
    gradients = 4 * total if whole_step else 4 * shard
    if stage == 1 and case.bf16 and not whole_step:  # whole float32 sums, and the bf16 gradients beside them
        gradients = (4 + e) * total
    return {"parameters": e * total, "gradients": gradients, "optimizer": optimizer}


def _working(case: Case, pp_rank: int, held: Held) -> dict[str, int]:
    chunks = case.layout.chunks_of(pp_rank)
    activations, loss = kept(case, pp_rank)
    block = block_work(case)
    if case.layout.chunks - 1 in chunks:  # the loss runs when no block does
        loss += max(0, loss_work(case) - block)
    microbatches = case.accumulation if case.pipelined else 1
    # Buffers for what is received from the chunk before, and for the gradient from the one behind, of every microbatch.
    received = sum((chunk > 0) + (chunk < case.layout.chunks - 1) for chunk in chunks)
    return {
        "activations": activations,
        "one block's work": block,
        "loss buffers": loss,
        "gathered weights": _gathered(case, held),
        "gradients on their way": _reducing(case, held),
        "pipeline buffers": received * microbatches * hidden_bytes(case) if case.pipelined else 0,
        "batch": microbatches * tokens_of(case).inside * BATCH_BYTES,
    }


def kept(case: Case, pp_rank: int) -> tuple[int, int]:
    """(activations, what final norm, head and loss keep) of all microbatches that a pipeline rank has in flight, in bytes."""
    saves = {chunk: chunk_saves(case, chunk) for chunk in case.layout.chunks_of(pp_rank)}
    last = case.layout.chunks - 1
    everything = _held_at_once(case, pp_rank, saves)
    if last not in saves:
        return everything, 0
    activations = _held_at_once(case, pp_rank, {**saves, last: saves[last] - loss_saves(case)})
    return activations, everything - activations


def _held_at_once(case: Case, pp_rank: int, saves: dict[int, int]) -> int:
    return most_in_flight(case, pp_rank, saves) if case.pipelined else saves[0]


def _gathered(case: Case, held: Held) -> int:
    """Whole weights beside this rank's shards."""
    e = element_bytes(case)
    if case.layout.zero_stage != 3 or (shard_size(case) == 1 and case.layout.engine == "deepspeed"):
        return 0
    if case.pipelined:
        return e * held.total
    if case.layout.engine == "deepspeed":  # stage3_max_live_parameters
        return e * min(held.total, max(2 * held.largest_matrix, held.total // 8))
    return e * min(held.total, held.largest_unit + held.block)  # the unit that computes, and the one that is fetched


def _reducing(case: Case, held: Held) -> int:
    """Gradients before they are shards."""
    e, stage = element_bytes(case), case.layout.zero_stage
    if case.layout.engine == "fsdp2":
        if case.pipelined:  # float32 sums of all microbatches, and the largest unit on its way into the reduction
            return 4 * held.total + 4 * held.largest_unit
        return (e + 4) * min(held.total, held.largest_unit + held.block)
    if stage == 0:
        return 0
    bucket = max(held.largest_matrix, REDUCE_BUCKET)
    whole = e * held.block
    if (case.pipelined and stage == 3) or (stage == 1 and not case.pipelined and not case.bf16):
        whole = 4 * held.total  # summed over the microbatches before they are reduced
    # The bucket itself, and the copy of it that is reduced.
    return whole + 2 * 4 * bucket


def _step(case: Case, held: Held) -> int:
    """What the optimizer's step takes: ZeRO-3 of DeepSpeed flattens its gradient shards into one more float32 copy."""
    if case.layout.engine == "deepspeed" and case.layout.zero_stage in (2, 3):
        return 4 * -(-held.total // shard_size(case))
    return 0


def cure(case: Case, limit_bytes: float) -> Optional[Change]:
    """The mildest change of the config after which `case` is legal and fits into `limit_bytes` a GPU; None if none here does."""
    halves = [case.micro_batch // 2**i for i in range(1, 12) if case.micro_batch % 2**i == 0]
    modes = ["selective", "full"] if case.layout.activation_checkpointing == "none" else ["full"]
    changes: list[Change] = [{"train.micro_batch_size": size} for size in halves if size]
    changes += [{"parallel.activation_checkpointing": mode} for mode in modes]
    changes += [
        {"parallel.activation_checkpointing": "full", "train.micro_batch_size": size} for size in halves if size
    ]
    if case.layout.zero_stage < 3:
        changes = [{"parallel.zero_stage": 3}, *changes, *({**change, "parallel.zero_stage": 3} for change in changes)]
    changes += [{"parallel.shard_group": 0}] if case.layout.shard_group else []
    for tensor in (2, 4, 8):
        if tensor > case.layout.tensor:
            more = {"parallel.tensor": tensor, "parallel.activation_checkpointing": "full"}
            changes += [more, {**more, "train.micro_batch_size": 1}]
    for change in changes:
        other = case.with_change(change)
        if first_broken(other) is None and memory_per_gpu(other).total <= limit_bytes:
            return change
    return None
