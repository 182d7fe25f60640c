"""Where the wall time of one training step goes on this rank, from a torch.profiler trace of its main thread.

Every recorded range belongs to one part: `model`, `collectives`, `optimizer` or `rest`. A range takes the part that its name says,
else that of the range around it, and counts with what no range inside it covers; time in no range at all is `rest`. So the
engine's Python, its copies and its hooks are `rest`, wherever they run.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from parallel.block import TransformerBlock

PARTS = ("model", "collectives", "optimizer", "rest")
_STEP, _MODEL, _WAIT = "bench::step", "bench::model", "bench::wait"
_NODE = "autograd::engine::evaluate_function: "
# Nodes of the backward graph that are an engine's, or the gate where its gradient hooks hang.
_ENGINE_NODES = ("AccumulateGrad", "PostBackward", "PreBackward", "UnshardBackward", "ReshardBackward")


@dataclass
class StepTrace:
    """Seconds by part, and what the rest consists of (range name -> seconds, without the ranges inside it)."""

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    rest: dict[str, float] = field(default_factory=dict)


def mark_model(module: nn.Module) -> None:
    """Wraps the arithmetic of a chunk, inside of where an engine puts its hooks; to be called before one is built."""
    for child in module.children():
        if isinstance(child, TransformerBlock):
            child.compute = _recorded(child.compute)
        elif next(child.parameters(recurse=False), None) is not None:
            child.forward = _recorded(child.forward)  # type: ignore[method-assign]
        else:
            mark_model(child)


def _recorded(function: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MODEL):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _waits_recorded() -> Iterator[None]:
    """Inside, every wait for a collective is a range."""
    wait = dist.Work.wait

    def recorded(work: Any, *args: Any, **kwargs: Any) -> Any:
        with record_function(_WAIT):
            return wait(work, *args, **kwargs)

    dist.Work.wait = recorded  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]


def trace_step(step: Callable[[], object]) -> StepTrace:
    """Runs `step` once under the profiler."""
    with _waits_recorded(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function(_STEP):
            step()
    (root,) = [event for event in profiler.events() if event.name == _STEP]
    parts = dict.fromkeys(PARTS, 0.0)
    rest: defaultdict[str, float] = defaultdict(float)
    _add_up(root, "rest", parts, rest)
    most = sorted(rest.items(), key=lambda item: -item[1])[:12]
    return StepTrace(_seconds(root), parts, dict(most))


def _add_up(event: Any, around: str, parts: dict[str, float], rest: dict[str, float]) -> None:
    part = _part(event.name) or around
    own = _seconds(event) - sum(_seconds(inner) for inner in event.cpu_children)
    parts[part] += own
    if part == "rest":
        rest[event.name] += own
    for inner in event.cpu_children:
        _add_up(inner, part, parts, rest)


def _part(name: str) -> Optional[str]:
    """The part that a range's name says; None: that of the range around it."""
    if name.startswith(("c10d::", "gloo:", "nccl:")) or name == _WAIT:
        return "collectives"
    if name.startswith("Optimizer.step"):
        return "optimizer"
    if name.startswith("fsdp::"):
        return "rest"
    if name.startswith(_NODE):
        return "rest" if any(node in name for node in _ENGINE_NODES) else "model"
    return "model" if name == _MODEL else None


def _seconds(event: Any) -> float:
    return event.time_range.elapsed_us() / 1e6


def supported() -> bool:
    """On a GPU the backward has a thread of its own and kernels overlap: ranges of one thread do not tell where time goes."""
    return not torch.cuda.is_available()
