"""One rank of: python -m tests.distributed.row_losses_worker FOLDER - row losses and soft inputs under both engines.

FOLDER/cells.json: name -> {"layout", "row_loss", "soft", "tied"}. For each cell: outputs, what a forward alone gives, and the
boxes of the reduced gradient that this rank holds, as FOLDER/NUMBER-RANK.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.engine import AdamWOptions
from parallel.engines import build_engine
from parallel.layout import Layout
from parallel.mesh import build_mesh, leave
from pretrain.model import build_chunks, model_shape
from tests.distributed import row_losses_case as case
from tests.distributed.matrix_worker import written


def solve(cell: dict[str, Any]) -> dict[str, Any]:
    layout = Layout(**cell["layout"])
    mesh = build_mesh(layout.tensor, layout.pipeline, layout.shard_group, timeout_seconds=60)
    config = case.model(cell["tied"])
    accumulation = 4 // mesh.dp
    mine = case.batches(cell["soft"])[mesh.dp_rank * accumulation : (mesh.dp_rank + 1) * accumulation]
    engine: Any = build_engine(
        build_chunks(config, mesh, layout, case.SEED, case.ROW_LOSSES[cell["row_loss"]]),
        model_shape(config),
        mesh,
        layout,
        optimizer=AdamWOptions(),
        micro_batch_size=1,
        accumulation=accumulation,
        sequence_length=case.LENGTH,
        grad_clip=1.0,
        bf16=False,
    )
    alone = engine.forward(mine[0])
    outputs = engine._backward(mine, case.NORMALIZER)
    found = {
        "dp_rank": mesh.dp_rank,
        "loss": sum(o.loss.double() for o in outputs),
        "value": [o.value for o in outputs],
        "ce": [o.ce for o in outputs],
        "alone": alone.value,
        "gradients": written(engine.local_gradients()),
        "shapes": {name: list(boxes.shape) for name, boxes in engine.local_gradients().items()},
    }
    engine.close()
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for number, cell in enumerate(json.loads((folder / "cells.json").read_text()).values()):
        torch.save(solve(cell), folder / f"{number}-{dist.get_rank()}.pt")
    leave(0)


if __name__ == "__main__":
    main()
