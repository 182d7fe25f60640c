"""Which legal layouts run the same code paths: what the parity matrix has to cover, each at least once."""

from __future__ import annotations

from parallel.layout import Layout
from parallel.layout_rules import Case


def engine_kind(layout: Layout) -> str:
    """z0, z1, z2, z3 (DeepSpeed's ZeRO stages) or fsdp2."""
    return layout.engine if layout.engine == "fsdp2" else f"z{layout.zero_stage}"


def equivalence_class(layout: Layout) -> tuple[str, str, str]:
    """(engine kind, schedule, tensor mode): the matrix has a cell of every class that has a legal layout.

    schedule is "-" without a pipeline; the tensor mode is none, tp, or sp (tensor plus sequence parallelism).
    """
    mode = "none" if layout.tensor == 1 else "sp" if layout.sequence_parallel else "tp"
    return engine_kind(layout), layout.schedule if layout.pipeline > 1 else "-", mode


def features(case: Case) -> set[tuple[str, str]]:
    """(engine kind, feature) of what a legal case uses beside its class: the matrix has a cell of every such pair."""
    layout = case.layout
    recompute = layout.activation_checkpointing
    used = {
        "data parallel": case.dp > 1,
        "data x tensor parallel": case.dp > 1 and layout.tensor > 1,
        "data x pipeline parallel": case.dp > 1 and case.pipelined,
        "data x tensor x pipeline parallel": case.dp > 1 and layout.tensor > 1 and case.pipelined,
        "more than two stages": layout.pipeline > 2,
        "uneven chunks": len({len(layers) for layers in layout.layers(case.shape.num_layers)}) > 1,
        "one microbatch": case.accumulation == 1,
        "accumulation": case.accumulation > 1,
        f"recompute {recompute}": recompute != "none",
        "hybrid shards": layout.shard_group not in (0, case.dp),
        "hybrid shards x pipeline parallel": layout.shard_group not in (0, case.dp) and case.pipelined,
        "tied embeddings": case.shape.tie_embeddings,
    }
    return {(engine_kind(layout), name) for name, present in used.items() if present}
