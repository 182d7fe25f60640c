"""Measures what engines hold between backward and step: python -m tests.pretrain.memory_worker FOLDER [LAYOUT ...], on two ranks.

Rank 0 writes FOLDER/states.json: layout -> [measured bytes, estimated bytes].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from parallel.engine import AdamWOptions
from parallel.engines import build_engine
from parallel.layout import Layout
from parallel.layout_rules import Case
from parallel.mesh import build_mesh, leave
from pretrain.config import ModelConfig
from pretrain.memory import REDUCE_BUCKET, held_by, model_states
from pretrain.model import build_chunks, model_shape
from tests.pretrain.live_storage import storages

# Wide and flat: the states are large beside everything else, activations above all.
MODEL = ModelConfig(
    num_layers=3, hidden_size=256, num_heads=4, num_kv_heads=2, ffn_hidden_size=640, vocab_size=2048, init_std=0.02
)
LENGTH, MICRO = 8, 1
LAYOUTS = {
    "deepspeed 3 bf16": (Layout(zero_stage=3), True),
    "deepspeed 2": (Layout(zero_stage=2), False),
    "deepspeed 1": (Layout(zero_stage=1), False),
    "deepspeed 1 bf16": (Layout(zero_stage=1), True),
    "deepspeed 0": (Layout(zero_stage=0), False),
    "deepspeed 3 tensor": (Layout(zero_stage=3, tensor=2), False),
    "deepspeed 3 pipeline bf16": (Layout(zero_stage=3, pipeline=2), True),
    "fsdp2 bf16": (Layout("fsdp2"), True),
    "fsdp2 tensor bf16": (Layout("fsdp2", tensor=2), True),
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


def measure(layout: Layout, bf16: bool) -> tuple[int, int]:
    """(bytes of every tensor of this rank between backward and step, what pretrain.memory says)."""
    mesh = build_mesh(layout.tensor, layout.pipeline, layout.shard_group, timeout_seconds=60)
    before = storages(mesh.device)  # held, so that no address comes again
    accumulation = layout.pipeline
    engine = build_engine(
        build_chunks(MODEL, mesh, layout, seed=1),
        model_shape(MODEL),
        mesh,
        layout,
        optimizer=AdamWOptions(),
        micro_batch_size=MICRO,
        accumulation=accumulation,
        sequence_length=LENGTH,
        grad_clip=1.0,
        bf16=bf16,
    )
    engine.train_step([microbatch()] * accumulation, 8.0, 1e-3)
    engine._backward([microbatch()] * accumulation, 8.0)  # type: ignore[attr-defined]
    new = [storage.nbytes() for address, storage in storages(mesh.device).items() if address not in before]
    measured = sum(size for size in new if size != 4 * REDUCE_BUCKET)
    engine._apply(1e-3)  # type: ignore[attr-defined]
    engine.close()
    case = Case(model_shape(MODEL), mesh.world_size, layout, mesh.dp * MICRO * accumulation, MICRO, LENGTH, bf16)
    return measured, sum(model_states(case, held_by(case, mesh.pp_rank)).values())


def main(folder: Path, names: list[str]) -> None:
    results = {name: measure(*LAYOUTS[name]) for name in names or LAYOUTS}
    if build_mesh(timeout_seconds=60).rank == 0:
        (folder / "states.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
