"""Counts what engines do in a step: python -m tests.pretrain.planning.communication_worker FOLDER [NAME ...], on 4 ranks.

Each rank writes FOLDER/RANK.json: name of a case -> kind of collective -> [measured, planned] bytes of the full buffers, and
without a pipeline "flops" -> those of the step.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.comm_counter import CommCounter
from parallel.engine import AdamWOptions
from parallel.engines import build_engine
from parallel.layout import Layout
from parallel.layout_rules import Case
from parallel.legality import first_broken
from parallel.mesh import build_mesh, leave
from pretrain.config import ModelConfig
from pretrain.flops import flops_per_token, recomputed_flops_per_token
from pretrain.model import build_chunks, model_shape
from pretrain.planning.communication import traffic_of

MODEL = ModelConfig(
    num_layers=6, hidden_size=128, num_heads=4, num_kv_heads=2, ffn_hidden_size=384, vocab_size=1024, init_std=0.02
)
LENGTH, MICRO, MICROBATCHES = 32, 2, 4
MASKED = 0.5
DEEP, FSDP = "deepspeed", "fsdp2"
CASES = {
    "deepspeed 0": (Layout(DEEP, 0), False),
    "deepspeed 1": (Layout(DEEP, 1), False),
    "deepspeed 1 bf16": (Layout(DEEP, 1), True),
    "deepspeed 2 bf16": (Layout(DEEP, 2), True),
    "deepspeed 3": (Layout(DEEP, 3), False),
    "deepspeed 3 bf16": (Layout(DEEP, 3), True),
    "deepspeed 3 full": (Layout(DEEP, 3, activation_checkpointing="full"), False),
    "deepspeed 3 selective bf16": (Layout(DEEP, 3, activation_checkpointing="selective"), True),
    "deepspeed 1 full": (Layout(DEEP, 1, activation_checkpointing="full"), False),
    "deepspeed 3 replicas": (Layout(DEEP, 3, shard_group=2), False),
    "deepspeed 3 tensor full": (Layout(DEEP, 3, tensor=2, activation_checkpointing="full"), False),
    "deepspeed 3 sequence bf16": (Layout(DEEP, 3, tensor=2, sequence_parallel=True), True),
    "deepspeed 3 pipeline bf16": (Layout(DEEP, 3, pipeline=2), True),
    "deepspeed 1 pipeline bf16": (Layout(DEEP, 1, pipeline=2), True),
    "deepspeed 3 interleaved": (Layout(DEEP, 3, pipeline=2, schedule="interleaved"), False),
    "fsdp2 bf16": (Layout(FSDP), True),
    "fsdp2 replicas": (Layout(FSDP, shard_group=2), False),
    "fsdp2 tensor selective": (Layout(FSDP, tensor=2, activation_checkpointing="selective"), False),
    "fsdp2 sequence full": (
        Layout(FSDP, tensor=2, sequence_parallel=True, activation_checkpointing="full"),
        False,
    ),
    "fsdp2 sequence bf16": (Layout(FSDP, tensor=2, sequence_parallel=True), True),
    "fsdp2 pipeline bf16": (Layout(FSDP, pipeline=2), True),
    "fsdp2 zbv": (Layout(FSDP, pipeline=2, schedule="zbv"), False),
    "fsdp2 interleaved zb bf16": (Layout(FSDP, pipeline=2, schedule="interleaved_zb"), True),
    "fsdp2 pipeline sequence": (Layout(FSDP, pipeline=2, tensor=2, sequence_parallel=True), False),
    "fsdp2 four stages": (Layout(FSDP, pipeline=4), False),
}


def microbatch() -> dict[str, torch.Tensor]:
    ids = torch.arange(MICRO * LENGTH).view(MICRO, LENGTH)
    return {
        "noisy_ids": ids,
        "target_ids": ids + 1,
        "masked": ids % 2 == 0,
        "weight": torch.ones(MICRO, LENGTH),
        "position_ids": torch.arange(LENGTH, dtype=torch.int32).expand(MICRO, LENGTH),
    }


def measure(layout: Layout, bf16: bool) -> dict[str, list[float]]:
    mesh = build_mesh(layout.tensor, layout.pipeline, layout.shard_group, timeout_seconds=60)
    case = Case(model_shape(MODEL), mesh.world_size, layout, mesh.dp * MICRO * MICROBATCHES, MICRO, LENGTH, bf16)
    assert first_broken(case) is None
    engine = build_engine(
        build_chunks(MODEL, mesh, layout, seed=1),
        case.shape,
        mesh,
        layout,
        optimizer=AdamWOptions(),
        micro_batch_size=MICRO,
        accumulation=MICROBATCHES,
        sequence_length=LENGTH,
        grad_clip=1.0,
        bf16=bf16,
    )
    batches = [microbatch() for _ in range(MICROBATCHES)]  # engines know the last one by its identity
    for _ in range(2):  # DeepSpeed records what is used when
        engine.train_step(batches, 64.0, 1e-3)
    with CommCounter() as counter:
        engine.train_step(batches, 64.0, 1e-3)
    flops = {} if layout.pipeline > 1 else {"flops": count_flops(lambda: engine.train_step(batches, 64.0, 1e-3), case)}
    engine.close()
    planned: defaultdict[str, float] = defaultdict(float)
    for one in traffic_of(case, mesh.pp_rank, MASKED):
        planned[one.kind] += one.buffer
    measured = {kind: volume.bytes for kind, volume in counter.volumes.items()}
    return {kind: [measured.get(kind, 0), planned.get(kind, 0.0)] for kind in {*measured, *planned}} | flops


def count_flops(step: Callable[[], object], case: Case) -> list[float]:
    """[measured, planned]. With `selective` without attention: it keeps the output of the fused kernel, which is not counted."""
    layout, length = case.layout, LENGTH
    kernel = SDPBackend.MATH
    if layout.activation_checkpointing == "selective":
        kernel, length = SDPBackend.FLASH_ATTENTION, 0
    with FlopCounterMode(display=False) as counter, sdpa_kernel(kernel):
        step()
    a_token = flops_per_token(case.shape, length, MASKED) + recomputed_flops_per_token(case.shape, length, layout)
    return [float(counter.get_total_flops()), MICROBATCHES * MICRO * LENGTH * a_token / layout.tensor]


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    results = {name: measure(*CASES[name]) for name in names or CASES}
    rank = build_mesh(timeout_seconds=60).rank
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
