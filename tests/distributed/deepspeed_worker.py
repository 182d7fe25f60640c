"""What the DeepSpeed engine does beside solving a step: python -m tests.distributed.deepspeed_worker FOLDER [SCENARIO ...].

Two ranks and four ranks each run their own scenarios (or those named); every rank writes FOLDER/WORLD-RANK.json.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from parallel import deepspeed_fixes, deepspeed_state
from parallel.engine import AdamWOptions
from parallel.engine_deepspeed import DeepSpeedEngine
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh, leave
from parallel.shape import parameter_table
from pretrain.model import build_chunks, model_shape
from tests.distributed import chunks_case, training_case

MODEL = chunks_case.MODEL
NORMALIZERS = training_case.normalizer(training_case.batches(steps=8))
Whole = dict[str, torch.Tensor]

# Collectives that move parameters and gradients: calls and elements of each, by process group.
COUNTED = {
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
    "all_reduce": 0,
}  # -> which argument is the whole tensor
moved: dict[str, list[int]] = {}
kept: list[str] = []  # layouts whose model was still there after the engine was closed


def count_collectives() -> None:
    """Wraps torch.distributed's functions, before DeepSpeed looks at them. Numbers of one to 16 elements are not parameters."""

    def counting(name: str, place: int) -> Callable:
        original = getattr(dist, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
            if tensors[place].numel() > 16:
                calls = moved.setdefault(name, [0, 0])
                calls[0] += 1
                calls[1] += tensors[place].numel()
            return original(*arguments, **options)

        return counted

    for name, place in COUNTED.items():
        setattr(dist, name, counting(name, place))


@contextlib.contextmanager
def engine_of(layout: Layout, *, micro_batch: int = 1, bf16: bool = False, seed: int = 3) -> Iterator[Any]:
    """(engine, microbatches of each step) for one layout; closed and forgotten at the end."""
    mesh = build_mesh(layout.tensor, layout.pipeline, layout.shard_group, timeout_seconds=60)
    groups = [
        [b.tensors() for b in group]
        for group in training_case.batches(mesh.dp_rank, mesh.dp, steps=8, micro_batch=micro_batch)
    ]
    engine = DeepSpeedEngine(
        build_chunks(MODEL, mesh, layout, seed),
        model_shape(MODEL),
        mesh,
        layout,
        optimizer=AdamWOptions("torch", training_case.BETAS, training_case.EPS, training_case.DECAY),
        micro_batch_size=micro_batch,
        accumulation=len(groups[0]),
        sequence_length=training_case.LENGTH,
        grad_clip=training_case.CLIP,
        bf16=bf16,
    )
    yield engine, groups
    model = weakref.ref(engine.chunks[0])
    engine.close()
    gc.collect()
    if model() is not None:
        kept.append(repr(layout))
    dist.barrier()


def gathered(boxes: dict) -> Whole:
    """Full tensors put together from the boxes of all ranks, without torch.distributed.checkpoint; nan where nobody holds one."""
    mine = {name: (tuple(b.shape), [(tuple(o), v.clone()) for o, v in b.parts]) for name, b in boxes.items()}
    full: Whole = {}
    for held in everywhere(mine):
        for name, (shape, parts) in held.items():
            whole = full.setdefault(name, torch.full(shape, float("nan")))
            for offset, values in parts:
                whole[tuple(slice(o, o + s) for o, s in zip(offset, values.shape))] = values
    return full


def hand_over(full: Whole, engine: DeepSpeedEngine, steps: int) -> None:
    """Writes full tensors into the engine's boxes, as a checkpoint load does."""
    for name, boxes in engine.state().items():
        for offset, view in boxes.parts:
            view.copy_(full[name][tuple(slice(o, o + s) for o, s in zip(offset, view.shape))])
    engine.state_written(steps)


def same(a: Whole, b: Whole) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def off(a: Whole, b: Whole) -> float:
    """Largest relative error of any tensor."""
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm().clamp_min(1e-30)) for n in b)


def chain(layouts: list[Layout], bf16: bool) -> dict[str, Any]:
    """One run handed from layout to layout, one step each, against one engine that takes all steps."""
    with engine_of(layouts[0], bf16=bf16) as (engine, groups):
        for step in range(len(layouts)):
            engine.train_step(groups[step], NORMALIZERS[step], training_case.LR)
        unbroken = gathered(engine.state())
    links: list[dict[str, Any]] = []
    full: Whole = {}
    ce = torch.empty(0)
    for step, layout in enumerate(layouts):
        with engine_of(layout, bf16=bf16, seed=3 if step == 0 else 90 + step) as (engine, groups):
            probe = max((b.tensors() for b in training_case.batches(micro_batch=1)[0]), key=lambda m: m["masked"].sum())
            link: dict[str, Any] = {}
            if not full:
                drawn = training_case.full_weights(model_shape(MODEL))
                begun = {n: t for n, t in gathered(engine.state()).items() if n.startswith("weight/")}
                link["drawn"] = same(begun, {f"weight/{n}": w.detach().float() for n, w in drawn.items()})
            if full:
                hand_over(full, engine, step)
                link["state kept"] = same(gathered(engine.state()), full)
                link["forward off"] = off({"ce": engine.forward(probe).ce}, {"ce": ce})
            result = engine.train_step(groups[step], NORMALIZERS[step], training_case.LR)
            link["applied"] = result.applied
            full, ce = gathered(engine.state()), engine.forward(probe).ce.clone()
            link["complete"] = not any(t.isnan().any() for t in full.values())
            links.append(link)
    return {"links": links, "end off": off(full, unbroken)}


def emptied(microbatch: Whole) -> Whole:
    """Without any masked token: its gradient is zero."""
    return microbatch | {name: torch.zeros_like(microbatch[name]) for name in ("masked", "weight")}


def float32_sums(layout: Layout) -> dict[str, float]:
    """The gradient of all microbatches in bf16 against the float64 sum of each microbatch's own gradient."""
    alone: list[Whole] = []
    with engine_of(layout, bf16=True) as (engine, groups):
        for chosen in (None, *range(len(groups[0]))):  # all of them, then each with the others emptied
            step = [m if chosen in (None, k) else emptied(m) for k, m in enumerate(groups[0])]
            engine._backward(step, NORMALIZERS[0])
            alone.append(gathered(engine.local_gradients()))
            engine._apply(0.0)  # moments move, weights do not
    summed = alone.pop(0)
    exact = {name: torch.stack([one[name].double() for one in alone]).sum(0) for name in summed}
    rounded = {}
    for name in summed:
        total = torch.zeros_like(summed[name], dtype=torch.bfloat16)
        for one in alone:
            total += one[name].bfloat16()
        rounded[name] = total
    return {"off": off(summed, exact), "bf16 sums would be off": off(rounded, exact)}


def skipped(layout: Layout, culprit: Callable[[Mesh], bool], parameter: str, bf16: bool = False) -> dict[str, Any]:
    """A gradient that is not finite on one rank alone, between two backwards of the same microbatches."""
    with engine_of(layout, bf16=bf16) as (engine, groups):

        def gradients() -> Whole:
            engine._backward(groups[2], NORMALIZERS[2])
            found = gathered(engine.local_gradients())
            engine._apply(0.0)  # moments move, weights do not
            return found

        first = gradients()
        before, steps = gathered(engine.state()), adam_steps(engine)
        hooks = [
            p.register_hook(lambda gradient: gradient * float("nan"))
            for chunk in engine.chunks
            for name, p in chunk.named_parameters()
            if name == parameter and culprit(engine.mesh)
        ]
        result = engine.train_step(groups[1], NORMALIZERS[1], training_case.LR)
        for hook in hooks:
            hook.remove()
        return {
            "applied": result.applied,
            "culprits": sum(everywhere(len(hooks))),
            "unchanged": same(gathered(engine.state()), before) and adam_steps(engine) == steps,
            "gradients again": same(gradients(), first),
            "goes on": engine.train_step(groups[0], NORMALIZERS[0], training_case.LR).applied,
        }


def adam_steps(engine: Any) -> list[float]:
    return [float(state["step"]) for state in deepspeed_state.adam(engine._zero).state.values()]


def everywhere(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def traffic(layout: Layout, micro_batch: int) -> dict[str, Any]:
    """Collectives of the third step (the first two may record traces), of this rank's stage."""
    with engine_of(layout, micro_batch=micro_batch) as (engine, groups):
        for step in range(3):
            moved.clear()
            engine._backward(groups[step], NORMALIZERS[step])
            found = {name: list(calls) for name, calls in moved.items()}
            engine._apply(training_case.LR)
        padded = model_shape(MODEL).padded_vocab(layout.tensor)
        table = parameter_table(model_shape(MODEL))
        names = [n for chunk in engine.chunks for n, _ in chunk.named_parameters()]
        shapes = [torch.Size(table[n].local_shape(layout.tensor, padded)) for n in names]
        numel = sum(shape.numel() for shape in shapes)
        held = sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())
    return {
        "moved": found,
        "stage": numel,
        "held after": held,
        "microbatches": len(groups[0]),
        "parameters": len(names),
    }


def undisturbed(layout: Layout) -> bool:
    """Training with forwards in between ends bit-equal to training without."""
    ends = []
    for looks in (False, True):
        with engine_of(layout) as (engine, groups):
            for step in range(3):
                if looks and step:
                    engine.forward(groups[step][0])
                engine.train_step(groups[step], NORMALIZERS[step], training_case.LR)
            ends.append(gathered(engine.state()))
    return same(*ends)


def replicas_alike() -> dict[str, bool]:
    """After three clipped steps: do replicas of a shard report the same norm and hold the same weights, although the second
    replica's own norm comes out a little larger?
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero3

    own = Zero3._get_norm_groups
    replica = 0

    def larger(zero: Any) -> list[torch.Tensor]:
        return [norm * (1 + 1e-3 * replica) for norm in own(zero)]

    with patch.object(Zero3, "_get_norm_groups", larger), engine_of(Layout(shard_group=2)) as (engine, groups):
        replica = engine.mesh.dp_rank // engine.mesh.shard
        norms = [engine.train_step(groups[s], NORMALIZERS[s], training_case.LR).grad_norm for s in range(3)]
        mine = {name: [v.clone() for _, v in boxes.parts] for name, boxes in engine.state().items()}
        everyone = everywhere((engine.mesh.shard_rank, norms, mine))
    pairs = [(a, b) for i, a in enumerate(everyone) for b in everyone[:i] if a[0] == b[0]]
    return {
        "pairs": len(pairs) == 2,
        "clipped": any(norm > training_case.CLIP for norm in norms),
        "norms": all(a[1] == b[1] for a, b in pairs),
        "state": all(torch.equal(x, y) for a, b in pairs for name in a[2] for x, y in zip(a[2][name], b[2][name])),
    }


def remembered() -> int:
    """How many models outlive their engine when DeepSpeed is not told to forget them."""
    before = len(kept)
    with patch.object(deepspeed_fixes, "forget", lambda module: None), engine_of(Layout()) as (engine, groups):
        for step in range(3):
            engine.train_step(groups[step], NORMALIZERS[step], training_case.LR)
    found = len(kept) - before
    del kept[before:]
    return found


def two_ranks() -> dict[str, Callable[[], Any]]:
    pipe: dict[str, Any] = {"pipeline": 2}
    looped: dict[str, Any] = {"pipeline": 2, "schedule": "interleaved"}
    alone: dict[str, Any] = {}
    stages = [Layout(zero_stage=z) for z in range(4)]
    full = [stages[3], stages[1], stages[0], stages[2], *(Layout(zero_stage=z, **pipe) for z in (3, 0, 2, 1))]
    half = [stages[3], stages[1], stages[2], *(Layout(zero_stage=z, **looped) for z in (3, 1, 2))]
    found: dict[str, Callable[[], Any]] = {
        "chain fp32": lambda: chain(full, False),
        "chain bf16": lambda: chain(half, True),
        "per layer": lambda: traffic(stages[3], 2),
        "undisturbed z3 dp2": lambda: undisturbed(stages[3]),
        "undisturbed z3 pp2": lambda: undisturbed(Layout(**pipe)),
    }
    for z in (1, 2, 3):
        for name, fields in {"dp2": alone, "pp2": pipe, "pp2 interleaved": looped}.items():
            found[f"sums z{z} {name}"] = partial(float32_sums, Layout(zero_stage=z, **fields))

    def rounded_sums() -> dict[str, float]:
        with patch.object(deepspeed_fixes, "accumulate_in_float32", lambda parameters: None):
            return float32_sums(Layout(pipeline=2))

    found["sums z3 pp2 without accumulate_in_float32"] = rounded_sums
    found["kept without forget"] = remembered
    for z in range(4):
        split = Layout(zero_stage=z, tensor=2)
        found[f"skipped z{z} dp2"] = partial(skipped, stages[z], lambda m: m.dp_rank == 1, "final_norm.weight")
        found[f"skipped z{z} tp2"] = partial(skipped, split, lambda m: m.tp_rank == 1, "blocks.1.q_proj.weight")
        if z:
            found[f"skipped z{z} bf16"] = partial(skipped, stages[z], lambda m: m.dp_rank == 1, "head.weight", True)
    return found


def four_ranks() -> dict[str, Callable[[], Any]]:
    stages = {f"z{z}": Layout(zero_stage=z, pipeline=2) for z in range(4)}
    stages["z3 interleaved"] = Layout(pipeline=2, schedule="interleaved")
    found: dict[str, Callable[[], Any]] = {}
    for name, layout in stages.items():
        found |= {f"traffic {name} x{4 // micro}": partial(traffic, layout, micro) for micro in (1, 2)}
        found[f"skipped {name}"] = partial(
            skipped, layout, lambda m: m.pp_rank == 1 and m.dp_rank == 1, "final_norm.weight"
        )

    def by_layer() -> dict[str, Any]:
        with patch.object(deepspeed_fixes, "gathered_once", lambda zero, modules: contextlib.nullcontext()):
            return traffic(stages["z3"], 1)

    def norm_by_replica() -> dict[str, bool]:
        with patch.object(deepspeed_fixes, "one_norm_for_replicas", lambda zero, mesh: None):
            return replicas_alike()

    found |= {"replicas alike": replicas_alike, "replicas alike without one_norm_for_replicas": norm_by_replica}
    return found | {"traffic z3 x4 without gathered_once": by_layer}


def main() -> None:
    torch.set_num_threads(1)
    count_collectives()
    mesh = build_mesh(timeout_seconds=60)
    rank, world = mesh.rank, mesh.world_size
    found = {}
    for name, scenario in {2: two_ranks, 4: four_ranks}[world]().items():
        if not sys.argv[2:] or name in sys.argv[2:]:
            found[name] = scenario()
    (Path(sys.argv[1]) / f"{world}-{rank}.json").write_text(json.dumps({**found, "kept": kept}))
    leave(0)


if __name__ == "__main__":
    main()
