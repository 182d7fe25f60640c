"""Engines with and without a flipped bit: python -m tests.distributed.corruption_worker FOLDER [SCENARIO ...].

Two ranks and four ranks each run their own scenarios (or those named); every rank writes FOLDER/WORLD-RANK.json.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from parallel import corruption
from parallel.corruption import CorruptionCheck, Finding
from parallel.engine import AdamWOptions
from parallel.engines import build_engine
from parallel.layout import Layout
from parallel.mesh import build_mesh, leave
from parallel.shape import parameter_table
from pretrain.model import build_chunks, model_shape
from tests.distributed import training_case

MODEL = replace(training_case.MODEL, num_layers=4)
SHAPE = model_shape(MODEL)
TABLE = parameter_table(SHAPE)
NORMALIZERS = training_case.normalizer(training_case.batches(steps=8))
Who = Callable[[Any], bool]  # of a mesh
MICRO_BATCH, STEPS = 2, 2


@contextlib.contextmanager
def engine_of(layout: Layout, bf16: bool = False) -> Iterator[Any]:
    """(engine, microbatches of each step) for one layout; closed at the end."""
    mesh = build_mesh(layout.tensor, layout.pipeline, layout.shard_group, timeout_seconds=60)
    groups = [
        [b.tensors() for b in group]
        for group in training_case.batches(mesh.dp_rank, mesh.dp, steps=8, micro_batch=MICRO_BATCH)
    ]
    engine = build_engine(
        build_chunks(MODEL, mesh, layout, training_case.SEED),
        SHAPE,
        mesh,
        layout,
        optimizer=AdamWOptions("torch", training_case.BETAS, training_case.EPS, training_case.DECAY),
        micro_batch_size=MICRO_BATCH,
        accumulation=len(groups[0]),
        sequence_length=training_case.LENGTH,
        grad_clip=training_case.CLIP,
        bf16=bf16,
    )
    yield engine, groups
    engine.close()
    dist.barrier()


def bits(engine: Any) -> dict[str, list[torch.Tensor]]:
    return {key: [view.clone() for _, view in boxes.parts] for key, boxes in engine.state().items()}


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The float32 weights put together from the boxes of all ranks."""
    mine = {
        key: [(tuple(offset), view.clone()) for offset, view in boxes.parts] for key, boxes in engine.state().items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    full = {f"weight/{name}": torch.full(spec.shape, float("nan")) for name, spec in TABLE.items()}
    for held in everyone:
        for key, parts in held.items():
            for offset, values in parts:
                if key in full:
                    full[key][tuple(slice(o, o + n) for o, n in zip(offset, values.shape))] = values
    return full


def whole_as_expected(engine: Any, bf16: bool) -> bool:
    """Are the whole parameters this rank's tensor-parallel shares of the float32 weights, rounded, each once?"""
    full, mesh = full_weights(engine), engine.mesh
    names = []
    for name, whole in engine.whole_parameters():
        spec, wanted = TABLE[name], full[f"weight/{name}"]
        local = spec.local_shape(mesh.tp, SHAPE.padded_vocab(mesh.tp))
        if spec.tp_dim is not None:
            wanted = wanted.narrow(
                spec.tp_dim,
                min(mesh.tp_rank * local[spec.tp_dim], spec.shape[spec.tp_dim]),
                max(0, min(local[spec.tp_dim], spec.shape[spec.tp_dim] - mesh.tp_rank * local[spec.tp_dim])),
            )
        padded = torch.zeros(local)
        padded[tuple(slice(n) for n in wanted.shape)] = wanted
        if not torch.equal(whole, padded.to(torch.bfloat16 if bf16 else torch.float32)):
            return False
        names.append(name)
    held = [name for chunk in engine.chunks for name, _ in chunk.named_parameters()]
    return sorted(names) == sorted(held) and len(names) == len(set(names))


def held(engine: Any) -> int:
    """Elements of parameters that are in memory as a forward would find them."""
    local = (p.to_local() if isinstance(p, DTensor) else p for chunk in engine.chunks for p in chunk.parameters())
    return sum(p.numel() for p in local)


def clean(layout: Layout, bf16: bool = False) -> dict[str, Any]:
    """Some steps without a look, then the same with every check between them, and forwards, and looks that end early."""
    with engine_of(layout, bf16) as (engine, groups):
        for step in range(STEPS):
            engine.train_step(groups[step], NORMALIZERS[step], training_case.LR)
        expected, norms = bits(engine), []
    found: list[Finding] = []
    with engine_of(layout, bf16) as (engine, groups):
        check = CorruptionCheck(engine, SHAPE)
        whole: list[bool] = []
        released: list[bool] = []

        def look() -> None:
            found.extend(check.compare_own())

        for step in range(STEPS):
            found += check.compare_copies()
            if step:
                engine.forward(groups[step][0])
            check.remember()
            before = held(engine)
            whole.append(whole_as_expected(engine, bf16))
            released.append(held(engine) == before)
            next(iter(engine.whole_parameters()))  # dropped at once
            released.append(held(engine) == before)
            result = engine.train_step(groups[step], NORMALIZERS[step], training_case.LR, before_update=look)
            norms.append(result.applied)
        found += check.compare_copies()
        after = bits(engine)
        forgotten = not check.remembers
    same = all(torch.equal(a, b) for key in expected for a, b in zip(expected[key], after[key], strict=True))
    return {
        "findings": said(found),
        "undisturbed": everywhere(same and all(norms)),
        "whole": everywhere(all(whole)),
        "released": everywhere(all(released)),
        "forgotten": forgotten,
    }


def said(found: list[Finding]) -> list[list[Any]]:
    return [[f.what, f.tensor, list(f.ranks), f.copies, str(f)] for f in found]


def everywhere(fine: bool) -> bool:
    agreed = torch.tensor(int(fine))
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed)


def flip(values: torch.Tensor, bit: int = 0) -> None:
    """One bit of the middle element; bit 0 is the lowest of the mantissa."""
    flat = values.view(-1).view(torch.int32 if values.element_size() == 4 else torch.int16)
    flat[len(flat) // 2] ^= 1 << bit


def swap(values: torch.Tensor) -> None:
    """The first element and the last one that is another."""
    flat = values.view(-1)
    other = int((flat != flat[0]).nonzero()[-1])
    flat[[0, other]] = flat[[other, 0]]


def state_of(key: str, damage: Callable[[torch.Tensor], None] = flip) -> Callable[[Any], None]:
    return lambda engine: damage(engine.state()[key].parts[0][1])


def forward_copy(name: str) -> Callable[[Any], None]:
    return lambda engine: flip(engine._parameters[name].data)


def planted(layout: Layout, who: Who, plant: Callable[[Any], None], bf16: bool = False) -> dict[str, Any]:
    """What is found when something is planted after a step: between copies, and by a rank in its own memory before an update."""
    with engine_of(layout, bf16) as (engine, groups):
        check = CorruptionCheck(engine, SHAPE)
        engine.train_step(groups[0], NORMALIZERS[0], training_case.LR)
        before, own = check.compare_copies(), []
        check.remember()

        def damage() -> None:
            if who(engine.mesh):
                plant(engine)
            own.extend(check.compare_own())

        copies: list[Finding] = []
        engine.train_step(groups[1], 1e30, 0.0, before_update=lambda: (damage(), copies.extend(check.compare_copies())))
        return {"before": said(before), "own": said(own), "copies": said(copies)}


def without_places() -> dict[str, Any]:
    """The swap of `planted`, looked for by a checksum that only adds up."""

    def plain(parts: Any) -> torch.Tensor:
        return sum((p.contiguous().view(torch.int32).sum() for p in parts), torch.zeros((), dtype=torch.int64))

    with patch.object(corruption, "checksum", plain):
        return planted(Layout(), lambda m: m.rank == 1, state_of("exp_avg/head.weight", swap))


def two_ranks() -> dict[str, Callable[[], Any]]:
    second: Who = lambda m: m.rank == 1  # noqa: E731
    z1, fsdp2 = Layout(zero_stage=1), Layout(engine="fsdp2")
    found: dict[str, Callable[[], Any]] = {}
    for z in range(4):
        found[f"clean z{z}"] = partial(clean, Layout(zero_stage=z))
        if z:
            found[f"clean z{z} bf16"] = partial(clean, Layout(zero_stage=z), True)
    found |= {
        "clean z3 tp2": partial(clean, Layout(tensor=2)),
        "clean z3 pp2": partial(clean, Layout(pipeline=2)),
        "clean z1 pp2 interleaved bf16": partial(clean, Layout(zero_stage=1, pipeline=2, schedule="interleaved"), True),
        "clean z3 pp2 interleaved bf16": partial(clean, Layout(pipeline=2, schedule="interleaved"), True),
        "clean fsdp2": partial(clean, fsdp2),
        "clean fsdp2 bf16": partial(clean, fsdp2, True),
        "clean fsdp2 tp2": partial(clean, Layout(engine="fsdp2", tensor=2)),
        "clean fsdp2 pp2": partial(clean, Layout(engine="fsdp2", pipeline=2)),
        "clean fsdp2 pp2 zbv bf16": partial(clean, Layout(engine="fsdp2", pipeline=2, schedule="zbv"), True),
        "gain of a tp rank": partial(planted, Layout(tensor=2), second, state_of("weight/final_norm.weight")),
        "gain of a tp rank, fsdp2": partial(
            planted, Layout(engine="fsdp2", tensor=2), second, state_of("weight/blocks.1.ffn_norm.weight")
        ),
        "master shard z3": partial(planted, Layout(), second, state_of("weight/blocks.2.up_proj.weight")),
        "master shard z3 bf16": partial(planted, Layout(), second, state_of("weight/blocks.2.up_proj.weight"), True),
        "moment z3": partial(planted, Layout(), second, state_of("exp_avg_sq/blocks.0.q_proj.weight")),
        "moment fsdp2": partial(planted, fsdp2, second, state_of("exp_avg_sq/blocks.0.q_proj.weight")),
        "moment z0": partial(planted, Layout(zero_stage=0), second, state_of("exp_avg_sq/blocks.0.q_proj.weight")),
        "swap z3": partial(planted, Layout(), second, state_of("exp_avg/head.weight", swap)),
        "swap z3 without places": without_places,
        "forward copy z1 bf16": partial(planted, z1, second, forward_copy("blocks.3.down_proj.weight"), True),
        "gathered z3 bf16": partial(planted, Layout(), second, shard_of("blocks.3.down_proj.weight"), True),
    }
    return found


def shard_of(name: str) -> Callable[[Any], None]:
    """What ZeRO-3 gathers from this rank, not the float32 weights behind it."""
    return lambda engine: flip(engine._parameters[name].ds_tensor.data)


def four_ranks() -> dict[str, Callable[[], Any]]:
    third: Who = lambda m: m.rank == 2  # noqa: E731
    groups = Layout(shard_group=2)
    return {
        "clean shard_group": partial(clean, groups, True),
        "clean fsdp2 shard_group": partial(clean, Layout(engine="fsdp2", shard_group=2)),
        "clean z3 tp2": partial(clean, Layout(tensor=2)),
        "clean z1 tp2 bf16": partial(clean, Layout(zero_stage=1, tensor=2), True),
        "clean z3 pp2 interleaved": partial(clean, Layout(pipeline=2, schedule="interleaved")),
        "clean fsdp2 pp2": partial(clean, Layout(engine="fsdp2", pipeline=2), True),
        "forward copy z1 bf16": partial(
            planted, Layout(zero_stage=1), third, forward_copy("blocks.0.down_proj.weight"), True
        ),
        "gain of a tp rank": partial(
            planted, Layout(zero_stage=1, tensor=2), third, forward_copy("blocks.3.attention_norm.weight")
        ),
        "moment of a replica": partial(planted, groups, third, state_of("exp_avg_sq/head.weight")),
        "master of a replica, fsdp2": partial(
            planted, Layout(engine="fsdp2", shard_group=2), third, state_of("weight/head.weight")
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    mesh = build_mesh(timeout_seconds=60)
    rank, world = mesh.rank, mesh.world_size
    found = {}
    for name, scenario in {2: two_ranks, 4: four_ranks}[world]().items():
        if not sys.argv[2:] or name in sys.argv[2:]:
            found[name] = scenario()
    (Path(sys.argv[1]) / f"{world}-{rank}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
