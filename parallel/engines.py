"""Picks the engine that a layout names; the same blocks, loss, schedules and loop run under each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.shape import ModelShape


def build_engine(chunks: Sequence[nn.Module], shape: ModelShape, mesh: Mesh, layout: Layout, **options: Any) -> Engine:
    """The engine of `layout.engine` over this rank's chunks; `options` as the engines' constructors take them. Collective."""
    if layout.engine == "fsdp2":
        from parallel.engine_fsdp2 import Fsdp2Engine

        return Fsdp2Engine(chunks, shape, mesh, layout, **options)
    from parallel.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(chunks, shape, mesh, layout, **options)
