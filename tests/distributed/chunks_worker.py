"""One rank of: python -m tests.distributed.chunks_worker FOLDER CELLS.json - chunks and pipeline without any engine.

For each cell: the first step's outputs and every gradient of this rank's parameters, as FOLDER/CELL-RANK.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from parallel.engine import model_inputs
from parallel.layout import Layout
from parallel.mesh import build_mesh, leave
from parallel.pipeline import Pipeline
from pretrain.model import build_chunks
from tests.distributed import chunks_case as case


def run_cell(layout: Layout) -> dict:
    mesh = build_mesh(layout.tensor, layout.pipeline, timeout_seconds=60)
    chunks = build_chunks(case.MODEL, mesh, layout, case.SEED)
    groups, eligible = case.batches(mesh.dp_rank, mesh.dp)
    microbatches = [b.tensors() for b in groups]
    normalizer = torch.tensor(eligible, dtype=torch.float64)
    unmasked = {k: microbatches[0][k][:1] for k in ("noisy_ids", "position_ids")}
    if layout.pipeline > 1:
        pipeline = Pipeline(
            {c.chunk: c for c in chunks},
            layout,
            mesh,
            micro_batch_size=case.MICRO_BATCH,
            accumulation=len(groups),
            sequence_length=case.LENGTH,
            hidden_size=case.MODEL.hidden_size,
        )
        outputs = pipeline.train(microbatches, normalizer, loss_scale=1.0)
        alone = pipeline.forward(microbatches[-1])
        logits = pipeline.forward(unmasked)
    else:
        outputs = []
        for microbatch in microbatches:
            output = chunks[0](**model_inputs(microbatch, mesh.device, normalizer))
            output.loss.backward()
            outputs.append(output)
        with torch.no_grad():
            one = torch.ones(())
            alone = chunks[0](**model_inputs(microbatches[-1], mesh.device, one))
            logits = chunks[0](**model_inputs(unmasked, mesh.device, one))
    result = {
        "place": [mesh.pp_rank, mesh.dp_rank, mesh.tp_rank],
        "gradients": {n: p.grad for c in chunks for n, p in c.named_parameters()},
        "loss": sum(o.loss.detach().double() for o in outputs),
        "ce": torch.cat([o.ce.detach() for o in outputs]),
        "alone": alone.ce,
        "logits": logits,
    }
    return result


def main() -> None:
    torch.set_num_threads(1)
    folder, cells = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, fields in cells.items():
        fields["layers_per_stage"] = tuple(fields.get("layers_per_stage", ()))
        result = run_cell(Layout(**fields))
        torch.save(result, folder / f"{name}-{torch.distributed.get_rank()}.pt")
    leave(0)


if __name__ == "__main__":
    main()
