"""One rank of: python -m tests.distributed.fsdp2_worker FOLDER CHECK ... - what the parity matrix does not ask of the FSDP2 engine.

Each check returns plain data, written as FOLDER/CHECK-RANK.pt.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.boxes import Boxes
from parallel.engine import AdamWOptions
from parallel.engine_fsdp2 import Fsdp2Engine
from parallel.grad_norm import global_grad_norm
from parallel.layout import SCHEDULES, Layout
from parallel.mesh import Mesh, build_mesh, leave
from parallel.shape import parameter_table
from pretrain.model import build_chunks, model_shape
from tests.distributed import matrix_case as case

NORMALIZER = 50.3
Fields = dict[str, Any]  # of a Layout, or options of `engine`


def microbatches(count: int, seed: int, samples: int = 1) -> list[dict[str, torch.Tensor]]:
    """Random ones, without padding, half masked."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(2, case.MODEL.vocab_size, (samples, case.LENGTH), generator=draw)
        masked = torch.rand(ids.shape, generator=draw) < 0.5
        found.append(
            {
                "noisy_ids": torch.where(masked, 0, ids),
                "target_ids": ids,
                "masked": masked,
                "weight": 1 + torch.rand(ids.shape, generator=draw),
                "position_ids": torch.arange(case.LENGTH).expand(samples, -1),
                "document_ids": torch.zeros(samples, case.LENGTH, dtype=torch.int32),
            }
        )
    return found


@contextmanager
def engine(
    *,
    accumulation: int = 2,
    samples: int = 1,
    bf16: bool = False,
    compiled: bool = False,
    ffn: int = 48,
    clip: float = case.CLIP,
    impl: str = "torch",
    **fields: Any,
):
    """A fresh engine of `Layout(engine="fsdp2", **fields)` on all ranks."""
    layout = Layout(engine="fsdp2", **fields)
    mesh = build_mesh(layout.tensor, layout.pipeline, layout.shard_group, timeout_seconds=60)
    config = replace(case.MODEL, ffn_hidden_size=ffn)
    chunks = build_chunks(config, mesh, layout, case.SEED)
    if compiled:  # not by inductor: a C++ compiler takes half a minute, and the hooks around the graphs are the same
        with patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
            for chunk in chunks:
                chunk.compile_blocks()
    made = Fsdp2Engine(
        chunks,
        model_shape(config),
        mesh,
        layout,
        optimizer=AdamWOptions(impl, case.BETAS, case.EPS, case.DECAY),
        micro_batch_size=samples,
        accumulation=accumulation,
        sequence_length=case.LENGTH,
        grad_clip=clip,
        bf16=bf16,
    )
    yield made
    made.close()


def plain(boxes: dict[str, Boxes]) -> dict[str, list]:
    """name -> [(offset, values)], copied."""
    return {name: [(list(offset), view.clone()) for offset, view in held.parts] for name, held in boxes.items()}


def gradients(made: Fsdp2Engine, batches: list[dict[str, torch.Tensor]]) -> dict[str, list]:
    """What this rank holds of the reduced gradient; the engine is left as before."""
    made._backward(batches, NORMALIZER)
    found = plain(made.local_gradients())
    made._optimizer.zero_grad()
    return found


class _Collectives(TorchDispatchMode):
    """Counts gathers and reduce-scatters by the dispatcher, whatever they are called above it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for kind in ("allgather", "reduce_scatter"):
            if kind in str(function):
                self.calls[kind] += 1
                whole = max((a for a in args if isinstance(a, torch.Tensor)), key=torch.Tensor.numel)
                self.bytes[kind] += whole.numel() * whole.element_size()
        return function(*args, **(kwargs or {}))


def traffic() -> dict[str, Any]:
    """Gathers and reduces of one step, by layout and number of microbatches (2 in fp32, 4 in bf16); this rank's parameters."""
    found: dict[str, Any] = {}
    for schedule in ("none", *SCHEDULES):
        fields: Fields = {"pipeline": 2, "schedule": schedule} if schedule != "none" else {}
        for count, bf16 in ((2, False), (4, True)):
            with engine(accumulation=count, bf16=bf16, **fields) as made:
                batches = microbatches(count, seed=made.mesh.dp_rank)
                made.train_step(batches, NORMALIZER, case.LR)  # the first one also sets up
                with _Collectives() as seen:
                    made.train_step(batches, NORMALIZER, case.LR)
                sizes = {name: p.numel() for name, p in made._parameters.items()}
                found[f"{schedule} x{count}"] = {"calls": dict(seen.calls), "bytes": dict(seen.bytes), "sizes": sizes}
    return found


def float32_sums() -> dict[str, Any]:
    """Under bf16: the gradient of four microbatches at once, and of each one alone (the others weigh nothing); their losses."""
    found: dict[str, Any] = {}
    layouts: dict[str, Fields] = {
        "hybrid": {"shard_group": 2},
        **{name: {"pipeline": 2, "schedule": name} for name in ("1f1b", "interleaved_zb", "zbv")},
    }
    for name, fields in layouts.items():
        with engine(accumulation=4, bf16=True, **fields) as made:
            batches = microbatches(4, seed=made.mesh.dp_rank)
            angles: list[str] = []  # dtypes of cos and sin, as blocks get them
            block = next(iter(made.chunks[0].blocks.values()))
            block.register_forward_pre_hook(lambda _, given, seen=angles: seen.extend(str(x.dtype) for x in given[1:3]))
            alone = []
            for i in range(4):
                muted = [b | {"weight": b["weight"] * (j == i)} for j, b in enumerate(batches)]
                alone.append(gradients(made, muted))
            outputs = made._backward(batches, NORMALIZER)
            found[name] = {
                "together": plain(made.local_gradients()),
                "alone": alone,
                "losses": [o.loss for o in outputs],
                "ce": [o.ce for o in outputs],
                "masked weight": [b["weight"] * b["masked"] for b in batches],
                "angles": sorted(set(angles)),
            }
    return found


def skipped_steps() -> dict[str, Any]:
    """A gradient that is not finite on one rank only: state before and after, and whether ranks skipped."""
    found: dict[str, Any] = {}
    layouts: dict[str, Fields] = {
        "data parallel": {},
        "hybrid": {"shard_group": 2},
        "pipeline": {"pipeline": 2, "schedule": "1f1b"},
        "zero bubble": {"pipeline": 2, "schedule": "zbv"},
        "tensor": {"tensor": 2},
    }
    for name, fields in layouts.items():
        with engine(**fields) as made:
            batches = microbatches(2, seed=made.mesh.dp_rank)
            first = made.train_step(batches, NORMALIZER, case.LR)
            before, steps = plain(made.state()), _steps(made)
            if name == "tensor":  # a norm gain, which every tensor-parallel rank holds: only one of them is hit
                broken = _broken_gain(made, batches)
            else:  # one microbatch of one data-parallel rank
                spoiled = [dict(b) for b in batches]
                if made.mesh.dp_rank == 1:
                    spoiled[1]["weight"] = torch.full_like(spoiled[1]["weight"], torch.inf)
                broken = made.train_step(spoiled, NORMALIZER, case.LR).applied
            after, steps_after = plain(made.state()), _steps(made)
            again = made.train_step(batches, NORMALIZER, case.LR)
            found[name] = {
                "applied": [first.applied, broken, again.applied],
                "unchanged": steps == steps_after and _same(before, after),
                "moved": not _same(before, plain(made.state())),
                "norm": again.grad_norm,
            }
    return found


def _broken_gain(made: Fsdp2Engine, batches: list) -> bool:
    made._backward(batches, NORMALIZER)
    if made.mesh.rank == 1:
        gradient = made._parameters["final_norm.weight"].grad
        assert isinstance(gradient, DTensor)
        gradient.to_local()[0] = torch.nan
    return made._apply(case.LR)[1]


def _steps(made: Fsdp2Engine) -> list[float]:
    return [float(state["step"]) for state in made._optimizer.state.values()]


def _same(one: dict[str, list], other: dict[str, list]) -> bool:
    return all(torch.equal(a, b) for name in one for (_, a), (_, b) in zip(one[name], other[name], strict=True))


def forwards_after_writes() -> dict[str, Any]:
    """Losses of a forward before and after `state()` is written, and after it is written back."""
    found: dict[str, Any] = {}
    layouts: dict[str, Fields] = {"data parallel": {}, "pipeline": {"pipeline": 2}, "bf16": {"bf16": True}}
    for name, fields in layouts.items():
        with engine(**fields) as made:
            batch = microbatches(1, seed=made.mesh.dp_rank)[0]
            losses = [float(made.forward(batch).loss)]
            for factor in (2.0, 0.5):
                with torch.no_grad():
                    for key, boxes in made.state().items():
                        for _, view in boxes.parts if key.startswith("weight/") else ():
                            view.mul_(factor)
                made.state_written(5)
                losses.append(float(made.forward(batch).loss))
            trained = made.train_step(microbatches(2, seed=7), NORMALIZER, 0.0)
            found[name] = {"losses": losses, "norm": trained.grad_norm, "steps": _steps(made)}
        with engine(**fields) as made:
            found[name]["norm of a fresh engine"] = made.train_step(microbatches(2, seed=7), NORMALIZER, 0.0).grad_norm
    return found


def dropped_weights() -> dict[str, Any]:
    """The zero-bubble V schedule as it is, and with blocks dropped after their forwards."""
    found: dict[str, Any] = {}
    for reshard in (False, True):
        with patch.object(Fsdp2Engine, "reshard_with_pipeline", reshard):
            with engine(pipeline=2, schedule="zbv") as made:
                batches = microbatches(2, seed=made.mesh.dp_rank)
                found["dropped" if reshard else "kept"] = gradients(made, batches)
    return found


def uneven_shards() -> dict[str, Any]:
    """Four ranks share matrices of 50 rows: 13, 13, 13 and 11."""
    found: dict[str, Any] = {}
    layouts: dict[str, Fields] = {"shards": {}, "replicas of one shard": {"shard_group": 1}}
    for name, fields in layouts.items():
        with engine(ffn=50, accumulation=1, samples=2, **fields) as made:
            batches = microbatches(1, seed=made.mesh.dp_rank, samples=2)
            made._backward(batches, NORMALIZER)
            reduced = plain(made.local_gradients())
            norm, applied = made._apply(case.LR)
            found[name] = {"gradients": reduced, "norm": norm, "applied": applied, "state": plain(made.state())}
    return found


def compiled_blocks() -> dict[str, Any]:
    """By plain blocks and by compiled ones: loss and gradients after one step, and how many graphs were compiled until then."""
    found: dict[str, Any] = {}
    for compiled in (False, True):
        with engine(compiled=compiled, accumulation=2) as made:
            batches = microbatches(2, seed=made.mesh.dp_rank)
            made.train_step(batches, NORMALIZER, case.LR)
            found["compiled" if compiled else "plain"] = {
                "loss": float(made.forward(batches[0]).loss),
                "gradients": gradients(made, batches),
                "graphs": int(torch._dynamo.utils.counters["stats"]["unique_graphs"]),
            }
    return found


def norms() -> dict[str, Any]:
    """The global norm of known local gradients, on every rank of several meshes, and of one that is not finite somewhere."""
    found: dict[str, Any] = {}
    shape = model_shape(case.MODEL)
    table = parameter_table(shape)
    for name, (tensor, pipeline, shard, sharded) in {
        "dp4": (1, 1, 0, True),
        "dp4 replicated": (1, 1, 0, False),
        "dp4 shard 2": (1, 1, 2, True),
        "dp2 tp2": (2, 1, 0, True),
        "pp2 tp2": (2, 2, 0, True),
        "pp2 dp2": (1, 2, 0, True),
    }.items():
        mesh = build_mesh(tensor, pipeline, shard, timeout_seconds=60)
        local = [(n, g * 1e25) for n, g in _local_parts(mesh, table, sharded)]
        norm = global_grad_norm(local, table, mesh, sharded)
        spoiled = [(n, g.clone()) for n, g in local]
        if mesh.rank == 3:
            spoiled[0][1].view(-1)[0] = torch.inf
        found[name] = {
            "norm": norm,
            "spoiled": global_grad_norm(spoiled, table, mesh, sharded),
            "none": global_grad_norm(iter(()), table, mesh, sharded),
        }
    return found


def whole_gradients() -> dict[str, torch.Tensor]:
    """A made-up gradient of a few parameters, on two pipeline stages."""
    draw = torch.Generator().manual_seed(1)
    table = parameter_table(model_shape(case.MODEL))
    names = ("blocks.0.q_proj.weight", "blocks.0.attention_norm.weight", "blocks.4.o_proj.weight", "final_norm.weight")
    return {name: torch.randn(table[name].shape, generator=draw) for name in names}


def _local_parts(mesh: Mesh, table: dict, sharded: bool) -> list[tuple[str, torch.Tensor]]:
    found = []
    for name, gradient in whole_gradients().items():
        stage = 0 if name.startswith("blocks.0") or mesh.pp == 1 else 1
        if stage != mesh.pp_rank:
            continue
        if table[name].tp_dim is not None:
            gradient = gradient.chunk(mesh.tp, table[name].tp_dim)[mesh.tp_rank]
        if sharded:
            gradient = gradient.chunk(mesh.shard)[mesh.shard_rank]
        found.append((name, gradient))
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder, *checks = sys.argv[1:]
    for check in checks:
        found = globals()[check]()
        torch.save(found, Path(folder) / f"{check}-{torch.distributed.get_rank()}.pt")
    leave(0)


if __name__ == "__main__":
    main()
