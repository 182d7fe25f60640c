"""The parity matrix: cells (a layout on a number of ranks) that together run every class and feature of legal layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parallel.equivalence import engine_kind, equivalence_class, features
from parallel.layout import SCHEDULES, ZERO_BUBBLE, Layout
from parallel.layout_rules import Case
from tests.distributed import matrix_case

KINDS = ("z0", "z1", "z2", "z3", "fsdp2")


@dataclass(frozen=True)
class Cell:
    """One layout to prove.

    micro_batch: samples a rank computes at once. packed: several isolated documents in every sample. kind: the objective, of
    matrix_case.FORMS.
    """

    world: int
    layout: Layout
    micro_batch: int = 1
    tied: bool = False
    packed: bool = False
    kind: str = "masked"

    @property
    def name(self) -> str:
        """What distinguishes it: "z3 pp2 dp2 interleaved"."""
        lay, case = self.layout, self.case
        sizes = [("pp", lay.pipeline), ("dp", case.dp), ("sp" if lay.sequence_parallel else "tp", lay.tensor)]
        words = [engine_kind(lay), *(f"{axis}{size}" for axis, size in sizes if size > 1)]
        words += [lay.schedule] if lay.pipeline > 1 else []
        words += [f"stages {'-'.join(map(str, lay.layers_per_stage))}"] if lay.layers_per_stage else []
        words += [f"shard {lay.shard_group}"] if lay.shard_group else []
        words += [f"recompute {lay.activation_checkpointing}"] if lay.activation_checkpointing != "none" else []
        words += ["tied"] if self.tied else []
        words += ["packed"] if self.packed else []
        words += [self.kind] if self.kind != "masked" else []
        return " ".join([*words, f"x{case.accumulation}"])

    @property
    def case(self) -> Case:
        """As the legality table sees it."""
        return Case(
            matrix_case.shape_of(self.tied),
            self.world,
            self.layout,
            matrix_case.GLOBAL_BATCH,
            self.micro_batch,
            matrix_case.columns(self.kind),
        )

    def covers(self) -> set[tuple[str, ...]]:
        """Its class and its features."""
        return {equivalence_class(self.layout), *features(self.case)}


def _layout(kind: str, **fields: Any) -> Layout:
    if kind == "fsdp2":
        return Layout(engine="fsdp2", **fields)
    return Layout(zero_stage=int(kind[1]), **fields)


SP = {"tensor": 2, "sequence_parallel": True}


def _one_stage(kind: str) -> list[Cell]:
    """Every tensor mode without a pipeline; the features spread over them."""
    return [
        Cell(1, _layout(kind, activation_checkpointing="selective"), micro_batch=8, tied=True),
        Cell(2, _layout(kind), micro_batch=2),
        Cell(2, _layout(kind, tensor=2), micro_batch=4),
        Cell(2, _layout(kind, **SP, activation_checkpointing="full"), micro_batch=4),
        Cell(4, _layout(kind, tensor=2), micro_batch=2),
    ]


def _pipelined(kind: str, schedule: str) -> list[Cell]:
    """One schedule in every tensor mode, with recomputation where it may have it."""
    common: dict[str, Any] = {"pipeline": 2, "schedule": schedule}
    recompute = {} if schedule in ZERO_BUBBLE else {"activation_checkpointing": "full"}
    return [
        Cell(4, _layout(kind, **common)),
        Cell(4, _layout(kind, **common, tensor=2), micro_batch=2),
        Cell(4, _layout(kind, **common, **SP, **recompute), micro_batch=2),
    ]


def _special(kind: str) -> list[Cell]:
    """Deep pipelines, all three axes at once, replicas of shards."""
    deep = {"pipeline": 4, "layers_per_stage": (1, 1, 2, 1)}
    three = {"pipeline": 2, "schedule": "interleaved", **SP, "activation_checkpointing": "selective"}
    cells = [Cell(4, _layout(kind, **deep), micro_batch=2), Cell(8, _layout(kind, **three))]
    if kind in ("z3", "fsdp2"):
        cells += [
            Cell(4, _layout(kind, shard_group=2)),
            Cell(8, _layout(kind, shard_group=2, pipeline=2, schedule="1f1b")),
        ]
    if kind == "fsdp2":
        cells += [
            Cell(4, _layout(kind, pipeline=4, schedule="gpipe", layers_per_stage=(2, 1, 1, 1)), micro_batch=4),
            Cell(8, _layout(kind, pipeline=2, schedule="zbv", tensor=2)),
        ]
    return cells


def _packed() -> list[Cell]:
    """Documents must reach every tensor-parallel rank and every stage; the first two run in `make test`."""
    both = {"pipeline": 2, "schedule": "interleaved", **SP, "activation_checkpointing": "selective"}
    return [
        Cell(2, _layout("z3", tensor=2), micro_batch=4, packed=True),
        Cell(2, _layout("fsdp2", pipeline=2), micro_batch=2, packed=True),
        *(Cell(4, _layout(kind, **both), micro_batch=2, packed=True) for kind in ("z3", "fsdp2")),
    ]


def _objectives() -> list[Cell]:
    """Every objective under both engines, over tensor parallel ranks and stages; the first cell of each runs in `make test`."""
    both = {"pipeline": 2, "schedule": "interleaved", **SP, "activation_checkpointing": "selective"}
    kinds = [kind for kind in matrix_case.FORMS if kind != "masked"]
    first = {kind: ("z3", "fsdp2")[i % 2] for i, kind in enumerate(kinds)}
    return [
        cell
        for kind in kinds
        for cell in (
            Cell(2, _layout(first[kind], tensor=2), micro_batch=4, kind=kind),
            Cell(2, _layout("fsdp2", pipeline=2), micro_batch=2, kind=kind),
            *(Cell(4, _layout(engine, **both), micro_batch=2, kind=kind) for engine in ("z3", "fsdp2")),
        )
    ]


def schedules_of(kind: str) -> tuple[str, ...]:
    return SCHEDULES if kind == "fsdp2" else tuple(s for s in SCHEDULES if s not in ZERO_BUBBLE)


CELLS: tuple[Cell, ...] = tuple(
    cell
    for kind in KINDS
    for cell in (
        *_one_stage(kind),
        *(cell for schedule in schedules_of(kind) for cell in _pipelined(kind, schedule)),
        *_special(kind),
    )
) + tuple(_packed() + _objectives())


def everyday() -> list[Cell]:
    """The cells of `make test`, at most four ranks, chosen greedily: each engine kind, schedule, tensor mode and feature once."""
    small = [cell for cell in CELLS if cell.world <= 4]
    wanted = {piece for cell in small for piece in _pieces(cell)}
    chosen: list[Cell] = []
    while wanted:
        best = max(small, key=lambda cell: len(_pieces(cell) & wanted) / cell.world)
        chosen.append(best)
        wanted -= _pieces(best)
    return chosen


def _pieces(cell: Cell) -> set[tuple[str, ...]]:
    kind, schedule, mode = equivalence_class(cell.layout)
    return {
        ("engine", kind),
        ("schedule", schedule),
        ("tensor", mode),
        *(("feature", f) for _, f in features(cell.case)),
        *([("packed", cell.name)] if cell.packed and cell.world == 2 else []),
        *([("objective", cell.kind)] if cell.layout.tensor == 2 and cell.world == 2 else []),
    }
