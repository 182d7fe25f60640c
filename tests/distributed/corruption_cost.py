"""What looking for corruption costs beside a step: python -m tests.distributed.corruption_cost [RANKS].

Gloo ranks of one thread each, ZeRO-3, the default model, 2048 tokens a rank and step. Processor seconds of rank 0, the least of
three, so that a machine that is busy elsewhere does not count; they include what a rank does while it waits for another.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from parallel.corruption import CorruptionCheck
from parallel.engine import AdamWOptions
from parallel.engines import build_engine
from parallel.layout import Layout
from parallel.mesh import build_mesh, leave
from pretrain.config import ModelConfig
from pretrain.model import build_chunks, model_shape
from tests.distributed.launch import run

LENGTH, BATCH, TIMES = 256, 8, 3


def main() -> None:
    torch.set_num_threads(1)
    model, layout, mesh = ModelConfig(), Layout(), build_mesh(timeout_seconds=300)
    shape = model_shape(model)
    engine = build_engine(
        build_chunks(model, mesh, layout, 0),
        shape,
        mesh,
        layout,
        optimizer=AdamWOptions(),
        micro_batch_size=BATCH,
        accumulation=1,
        sequence_length=LENGTH,
        grad_clip=1.0,
        bf16=False,
    )
    ids = torch.randint(model.vocab_size, (BATCH, LENGTH))
    masked = torch.rand(BATCH, LENGTH) < 0.5
    batch = {
        "noisy_ids": ids.where(~masked, 0),
        "target_ids": ids,
        "masked": masked,
        "weight": 2.0 * masked,
        "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH),
    }
    check = CorruptionCheck(engine, shape)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> None:
        began = time.process_time()
        function()
        seconds[name] = min(seconds.get(name, 1e9), time.process_time() - began)

    for _ in range(TIMES):
        timed("step", lambda: engine.train_step([batch], BATCH * LENGTH * mesh.dp, 1e-4))
        timed("compare copies", check.compare_copies)
        timed("remember", check.remember)
        timed("compare with it", check.compare_own)
    if mesh.rank == 0:
        parameters = sum(p.ds_numel for chunk in engine.chunks for p in chunk.parameters())
        print(f"{parameters:,} parameters, ZeRO-3 over {mesh.dp} ranks")
        for name, value in seconds.items():
            print(f"{name:<16} {value:8.3f} s  {100 * value / seconds['step']:6.1f} % of a step")
    leave(0)


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        said = run("tests.distributed.corruption_cost", [], int(sys.argv[1]) if len(sys.argv) > 1 else 2, timeout=500)[
            0
        ]
        print("\n".join(line for line in said.splitlines() if " s  " in line or "parameters," in line))
