"""One rank of: python -m tests.distributed.visibility_worker FOLDER CELLS.json - visibility through layouts and engines.

Every cell solves each kind of case: FOLDER/CELL-RANK.pt holds the token losses and, without an engine, this rank's gradients, with
one the norm of the whole gradient.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from parallel.engine import AdamWOptions, model_inputs
from parallel.engines import build_engine
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh, leave
from parallel.pipeline import Pipeline
from pretrain.model import build_chunks, model_shape
from tests.distributed import visibility_case as case


def without_engine(mesh: Mesh, layout: Layout, microbatches: list) -> dict[str, Any]:
    chunks = build_chunks(case.MODEL, mesh, layout, case.SEED)
    normalizer = torch.tensor(case.NORMALIZER, dtype=torch.float64)
    if layout.pipeline > 1:
        pipeline = Pipeline(
            {chunk.chunk: chunk for chunk in chunks},
            layout,
            mesh,
            micro_batch_size=case.SAMPLES,
            accumulation=len(microbatches),
            sequence_length=case.LENGTH,
            hidden_size=case.MODEL.hidden_size,
        )
        outputs = pipeline.train(microbatches, normalizer)
        alone = pipeline.forward(microbatches[-1])
    else:
        outputs = [chunks[0](**model_inputs(m, mesh.device, normalizer)) for m in microbatches]
        for output in outputs:
            output.loss.backward()
        alone = outputs[-1]
    gradients = {name: p.grad for chunk in chunks for name, p in chunk.named_parameters()}
    return {"gradients": gradients, "ce": torch.stack([o.ce.detach() for o in outputs]), "alone": alone.ce.detach()}


def with_engine(mesh: Mesh, layout: Layout, microbatches: list, compiled: bool) -> dict[str, Any]:
    chunks = build_chunks(case.MODEL, mesh, layout, case.SEED)
    if compiled:
        for chunk in chunks:
            chunk.compiled = True
            for block in chunk.blocks.values():
                block.compute = torch.compile(block.compute, backend="aot_eager")
    engine = build_engine(
        chunks,
        model_shape(case.MODEL),
        mesh,
        layout,
        optimizer=AdamWOptions("torch"),
        micro_batch_size=case.SAMPLES,
        accumulation=len(microbatches),
        sequence_length=case.LENGTH,
        grad_clip=1.0,
        bf16=False,
    )
    alone = engine.forward(microbatches[-1]).ce
    step = engine.train_step(microbatches, case.NORMALIZER, 1e-3)
    engine.close()
    return {"norm": step.grad_norm, "ce": torch.stack([o.ce for o in step.outputs]), "alone": alone}


def main() -> None:
    torch.set_num_threads(1)
    folder, cells = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, fields in cells.items():
        engine, compiled = fields.get("engine"), fields.pop("compiled", False)
        layout = Layout(**fields)
        mesh = build_mesh(layout.tensor, layout.pipeline, timeout_seconds=60)
        found: dict[str, Any] = {"place": [mesh.pp_rank, mesh.dp_rank, mesh.tp_rank]}
        for kind in case.KINDS:
            share = case.MICROBATCHES // mesh.dp
            mine = case.microbatches(kind)[mesh.dp_rank * share :][:share]
            if engine:
                found[kind] = with_engine(mesh, layout, mine, compiled)
            else:
                found[kind] = without_engine(mesh, layout, mine)
        torch.save(found, folder / f"{name}-{torch.distributed.get_rank()}.pt")
    leave(0)


if __name__ == "__main__":
    main()
