"""One rank that solves cells of the parity matrix one after another: python -m tests.distributed.matrix_worker FOLDER.

FOLDER/cells.json: a list of {"layout": Layout fields, "micro_batch", "tied", "packed", "kind", "bf16", "mutant"}. For cell I rank R
writes FOLDER/I-R.pt: its place, losses, norms, masks, every gradient and the end state as the boxes it holds; or, if anything is
raised, FOLDER/I-R.error and ends: its peers may wait in a collective that it never entered.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.boxes import Boxes
from parallel.engine import AdamWOptions
from parallel.engines import build_engine
from parallel.layout import Layout
from parallel.mesh import build_mesh, leave
from pretrain import metrics
from pretrain.model import build_chunks
from tests.distributed import matrix_case as case
from tests.distributed.matrix_faults import MUTANTS, list_mutants


def written(boxes: dict[str, Boxes]) -> dict[str, list]:
    """name -> [(offset, values)] as plain data, copied."""
    return {
        name: [(list(offset), view.detach().clone().contiguous()) for offset, view in held.parts]
        for name, held in boxes.items()
    }


def solve(cell: dict[str, Any], timeout_seconds: int) -> dict[str, Any]:
    """The three steps of one cell, as this rank sees them."""
    fields = cell["layout"]
    layout = Layout(**fields | {"layers_per_stage": tuple(fields.get("layers_per_stage", ()))})
    mesh = build_mesh(layout.tensor, layout.pipeline, layout.shard_group, timeout_seconds=timeout_seconds)
    micro_batch = cell["micro_batch"]
    groups = case.batches(mesh.dp_rank, mesh.dp, micro_batch, packed=cell["packed"], kind=cell["kind"])
    engine: Any = build_engine(
        build_chunks(
            replace(case.MODEL, tie_embeddings=cell["tied"]), mesh, layout, case.SEED, case.row_loss_of(cell["kind"])
        ),
        case.shape_of(cell["tied"]),
        mesh,
        layout,
        optimizer=AdamWOptions("torch", case.BETAS, case.EPS, case.DECAY),
        micro_batch_size=micro_batch,
        accumulation=len(groups[0]),
        sequence_length=case.columns(cell["kind"]),
        grad_clip=case.CLIP,
        bf16=cell["bf16"],
    )
    gradients = _observe_gradients(engine)
    losses, norms, applied = [], [], []
    for group in groups:
        eligible, _ = metrics.global_counts(group, mesh)
        result = engine.train_step([b.tensors() for b in group], eligible, case.LR)
        losses.append(sum(float(o.loss) for o in result.outputs))
        norms.append(float(result.grad_norm))
        applied.append(bool(result.applied))
    found = {
        "place": [mesh.pp_rank, mesh.dp_rank, mesh.tp_rank],
        "losses": losses,
        "norms": norms,
        "applied": applied,
        "masked": torch.stack([torch.cat([b.masked for b in group]) for group in groups]),
        "gradients": gradients,
        "state": written(engine.state()),
    }
    engine.close()
    del engine
    gc.collect()
    dist.barrier()
    return found


def _observe_gradients(engine: Any) -> list[dict[str, list]]:
    """A list that every step of `engine` appends its reduced, unclipped gradients to."""
    seen: list[dict[str, list]] = []
    apply = engine._apply

    def observed(*args: Any, **options: Any) -> Any:
        seen.append(written(engine.local_gradients()))
        return apply(*args, **options)

    engine._apply = observed
    return seen


def import_engines() -> None:
    """What the first cell would otherwise wait for."""
    from parallel import engine_deepspeed, engine_fsdp2  # noqa: F401

    engine_deepspeed.import_deepspeed()


def _end_with(parent: int) -> None:
    """Ends this rank when the process that started it is gone: nobody else would stop a rank that waits for its peers."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    task = json.loads((folder / "cells.json").read_text())
    list_mutants()
    rank = int(os.environ["RANK"])
    said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)  # a pipe that nobody empties would block
    os.dup2(said, 1)
    os.dup2(said, 2)
    import_engines()
    (folder / f"ready-{rank}.pt").touch()
    for cell in task["cells"]:
        target = folder / f"{cell['index']}-{rank}.pt"
        try:
            mutant = MUTANTS[cell["mutant"]].broken() if cell["mutant"] else contextlib.nullcontext()
            with mutant:
                found = solve(cell, task["timeout_seconds"])
        except BaseException:  # whatever it was is the result of this cell
            target.with_suffix(".error").write_text(traceback.format_exc())
            leave(1, together=False)
        torch.save(found, target.with_suffix(".part"))
        target.with_suffix(".part").rename(target)
    leave(0)


if __name__ == "__main__":
    main()
