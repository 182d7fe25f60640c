"""One rank of: python -m tests.distributed.chain_worker FOLDER LEGS.json - one run handed from layout to layout.

Each leg, in order: an engine with other initial weights loads the newest checkpoint, writes what it now holds to
LEG-loaded-RANK.pt, takes its steps, writes what it holds to LEG-saved-RANK.pt, and saves. Rank 0 writes LEG.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from parallel import checkpoint
from parallel.engine import AdamWOptions, Engine
from parallel.engines import build_engine
from parallel.layout import Layout
from parallel.mesh import build_mesh, leave
from pretrain.metrics import sum_over_ranks
from pretrain.model import build_chunks, model_shape
from tests.distributed import chunks_case, training_case

MODEL = chunks_case.MODEL


def held(engine: Engine) -> dict[str, list]:
    """Logical name -> (offset, values) of the boxes of this rank, copied."""
    return {n: [(list(offset), view.clone()) for offset, view in b.parts] for n, b in engine.state().items()}


def run_leg(folder: Path, name: str, leg: dict) -> None:
    layout = Layout(**leg["layout"] | {"layers_per_stage": tuple(leg["layout"].get("layers_per_stage", ()))})
    mesh = build_mesh(layout.tensor, layout.pipeline, layout.shard_group, timeout_seconds=60)
    newest = checkpoint.latest(folder / "checkpoints")
    chunks = build_chunks(MODEL, mesh, layout, seed=training_case.SEED if newest is None else 99)
    accumulation = training_case.GLOBAL_BATCH // mesh.dp // training_case.MICRO_BATCH
    engine = build_engine(
        chunks,
        model_shape(MODEL),
        mesh,
        layout,
        optimizer=AdamWOptions("torch", training_case.BETAS, training_case.EPS, training_case.DECAY),
        micro_batch_size=training_case.MICRO_BATCH,
        accumulation=accumulation,
        sequence_length=training_case.LENGTH,
        grad_clip=training_case.CLIP,
        bf16=leg.get("bf16", False),
    )
    start = 0
    if newest is not None:
        checkpoint.load(newest, engine.state())
        start = checkpoint.read_trainer(newest)["step"]
        engine.state_written(start)
    torch.save(held(engine), folder / f"{name}-loaded-{mesh.rank}.pt")
    normalizers = training_case.normalizer(training_case.batches())
    groups = training_case.batches(mesh.dp_rank, mesh.dp)
    losses = []
    for step in range(start, start + leg["steps"]):
        result = engine.train_step([b.tensors() for b in groups[step]], normalizers[step], training_case.LR)
        assert result.applied
        losses.append(float(sum_over_ranks(sum(o.loss.double() for o in result.outputs).reshape(1), mesh)))
    torch.save(held(engine), folder / f"{name}-saved-{mesh.rank}.pt")
    checkpoint.save(folder / "checkpoints", start + leg["steps"], engine.state(), {"leg": name}, keep=100)
    if mesh.rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(losses))
    engine.close()


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, leg in json.loads(Path(sys.argv[2]).read_text()).items():
        run_leg(folder, name, leg)
    leave(0)


if __name__ == "__main__":
    main()
