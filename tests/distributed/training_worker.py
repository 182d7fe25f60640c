"""One rank of a training parity run: python -m tests.distributed.training_worker TP FOLDER [tied] [checkpointing] [compile] [bf16].

Rank 0 writes FOLDER/steps.json: the loss and gradient norm of every step; all ranks save a checkpoint of the end state.
Before that, on a model without any engine: every gradient of the first step, this rank's shares, as FOLDER/grads-R.pt.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from parallel import checkpoint
from parallel.engine import AdamWOptions, model_inputs
from parallel.engine_deepspeed import DeepSpeedEngine
from parallel.layout import Layout
from parallel.mesh import build_mesh, leave
from pretrain.metrics import sum_over_ranks
from pretrain.model import build_chunks, model_shape
from tests.distributed import training_case as case


def main() -> None:
    torch.set_num_threads(1)
    tensor, folder, flags = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    mesh = build_mesh(tensor, timeout_seconds=60)
    config = replace(case.MODEL, tie_embeddings="tied" in flags)
    layout = Layout(tensor=tensor, activation_checkpointing="full" if "checkpointing" in flags else "none")
    normalizers = case.normalizer(case.batches())
    groups = case.batches(mesh.dp_rank, mesh.dp)

    (model,) = build_chunks(config, mesh, layout, case.SEED)
    denominator = torch.tensor(normalizers[0], dtype=torch.float64)
    for batch in groups[0]:
        model(**model_inputs(batch.tensors(), mesh.device, denominator)).loss.backward()
    torch.save({n: p.grad for n, p in model.named_parameters()}, folder / f"grads-{mesh.rank}.pt")
    model.zero_grad()

    if "compile" in flags:
        model.compile_blocks()
    engine = DeepSpeedEngine(
        [model],
        model_shape(config),
        mesh,
        layout,
        optimizer=AdamWOptions("torch", case.BETAS, case.EPS, case.DECAY),
        micro_batch_size=case.MICRO_BATCH,
        accumulation=case.GLOBAL_BATCH // mesh.dp // case.MICRO_BATCH,
        sequence_length=case.LENGTH,
        grad_clip=case.CLIP,
        bf16="bf16" in flags,
    )
    steps = []
    for group, count in zip(groups, normalizers):
        result = engine.train_step([b.tensors() for b in group], count, case.LR)
        loss = sum_over_ranks(torch.stack([o.loss.double() for o in result.outputs]).sum().reshape(1), mesh)
        steps.append({"loss": float(loss), "norm": result.grad_norm, "applied": result.applied})
    checkpoint.save(folder / "checkpoints", len(steps), engine.state(), {"layout": [mesh.dp, mesh.tp]})

    # A gradient that is not finite leaves every parameter and moment as it was, on every rank.
    before = {name: [view.clone() for _, view in boxes.parts] for name, boxes in engine.state().items()}
    poisoned = [b.tensors() for b in groups[0]]
    if mesh.dp_rank == 0:
        poisoned[0]["weight"] = poisoned[0]["weight"].clone()
        poisoned[0]["weight"][poisoned[0]["masked"]] = float("nan")
    result = engine.train_step(poisoned, normalizers[0], case.LR)
    after = engine.state()
    unchanged = all(torch.equal(old, new) for name in before for old, (_, new) in zip(before[name], after[name].parts))
    agree = torch.tensor([float(unchanged and not result.applied)])
    dist.all_reduce(agree, op=dist.ReduceOp.MIN)
    recovered = engine.train_step([b.tensors() for b in groups[0]], normalizers[0], case.LR)
    if mesh.rank == 0:
        (folder / "steps.json").write_text(
            json.dumps(
                {
                    "steps": steps,
                    "poison_skipped": bool(agree.item()),
                    "recovered": recovered.applied,
                }
            )
        )
    leave(0)


if __name__ == "__main__":
    main()
