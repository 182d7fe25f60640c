"""How long a step takes: compute at a given rate, the communication that it cannot hide, and the pipeline's bubble.

A model, not a measurement. What it takes for granted: matrix work runs at one rate (`mfu` of the peak, recomputation being work
too); a collective runs at its link's bus bandwidth; what the engines start ahead hides under the pass that it runs in, at most
that pass long, but for its first or last unit; all else is waited for. The optimizer's own arithmetic and the data are taken to
cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.layout_rules import Case
from pretrain.flops import flops_per_token, recomputed_flops_per_token
from pretrain.memory_activations import tokens_of
from pretrain.planning.cluster import Cluster, link_of
from pretrain.planning.communication import (
    AXES,
    BACKWARD,
    EXPOSED,
    FORWARD,
    LAST_BACKWARD,
    WEIGHT_GRADIENT,
    Traffic,
    blocks_of,
    messages,
    traffic_of,
)


@dataclass(frozen=True)
class Work:
    """What depends on the objective and not on the layout.

    seen: tokens that a column attends to. masked: share of the columns whose logits are computed. rate: FLOP/s of one GPU.
    """

    seen: float
    masked: float
    rate: float


@dataclass(frozen=True)
class AxisTime:
    """One axis in one step on one rank. wire: bytes it sends. exposed: the part of `seconds` that nothing hides."""

    wire: float
    buffer: float
    calls: float
    link: str
    seconds: float
    exposed: float

    @property
    def hidden(self) -> bool:
        """All of it but what starts or ends a pass: less than a hundredth of it is waited for."""
        return self.exposed <= 0.01 * self.seconds


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of the pipeline rank that takes longest, and the traffic of that rank."""

    pp_rank: int
    compute: float
    exposed: float
    bubble: float
    axes: dict[str, AxisTime]
    traffic: tuple[Traffic, ...]

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.bubble


def step_time(case: Case, cluster: Cluster, work: Work) -> StepTime:
    """Of a legal case. Pipeline ranks that do and send the same take the same time: one of each kind is looked at."""
    kinds: dict[tuple, int] = {}
    for rank in range(case.layout.pipeline):
        chunks = case.layout.chunks_of(rank)
        kind = (blocks_of(case, rank), 0 in chunks, case.layout.chunks - 1 in chunks, messages(case, rank))
        kinds.setdefault(kind, rank)
    return max((_rank_time(case, cluster, work, rank) for rank in kinds.values()), key=lambda time: time.total)


def idle_microbatches(case: Case) -> float:
    """How many microbatches' work a pipeline rank could have done while it waits for others.

    gpipe and 1f1b: P - 1; interleaved with two chunks a rank: half of that (Narayanan et al., arXiv 2104.04473, section 2.2).
    The zero-bubble schedules (Qi et al., arXiv 2401.10241) as torch runs them, if forward, input and weight gradients take
    alike. tests/pretrain/planning/test_step_time.py plays torch's own schedules against this, fewer microbatches than ranks
    included.
    """
    ranks, count, schedule = case.layout.pipeline, case.accumulation, case.layout.schedule
    short = max(0, ranks - count)
    if not case.pipelined:
        return 0.0
    if schedule == "interleaved":
        return (ranks - 1 + short) / 2
    if schedule == "interleaved_zb":
        return (ranks - 1 + 2 * short + max(0, ranks - 2 * count)) / 6
    if schedule == "zbv":
        return max(ranks - 1, 2 * (ranks - 1) + 2 * (ranks - count)) / 6
    return float(ranks - 1)


def _rank_time(case: Case, cluster: Cluster, work: Work, pp_rank: int) -> StepTime:
    traffic = tuple(traffic_of(case, pp_rank, work.masked))
    compute = case.accumulation * _microbatch_seconds(case, work, pp_rank)
    axes, waits = _axes(case, cluster, work, traffic, compute)
    # What a rank waits for in each microbatch makes the others wait in the bubble as well.
    busy = (compute + waits) / case.accumulation
    exposed = sum(axis.exposed for axis in axes.values())
    return StepTime(pp_rank, compute, exposed, idle_microbatches(case) * busy, axes, traffic)


def _microbatch_seconds(case: Case, work: Work, pp_rank: int) -> float:
    """Forward, backward and recomputation of a microbatch in the chunks of one rank."""
    shape, layout = case.shape, case.layout
    whole = flops_per_token(shape, work.seen, 0.0)
    again = recomputed_flops_per_token(shape, work.seen, layout)
    flops = (whole + again) * blocks_of(case, pp_rank) / shape.num_layers
    if layout.chunks - 1 in layout.chunks_of(pp_rank):
        flops += _head_flops(case, work)
    return tokens_of(case).inside * flops / layout.tensor / work.rate


def _head_flops(case: Case, work: Work) -> float:
    """Of the output matrix, padding included, a column."""
    return 6 * case.shape.padded_vocab(case.layout.tensor) * case.shape.hidden_size * work.masked


def _axes(
    case: Case, cluster: Cluster, work: Work, traffic: Sequence[Traffic], compute: float
) -> tuple[dict[str, AxisTime], float]:
    """(axis -> its time, seconds of a step that are waited for within microbatches)."""
    spare = _passes(case, work, compute)
    found: dict[str, AxisTime] = {}
    waits = 0.0
    for axis in AXES:
        mine = [one for one in traffic if one.axis == axis]
        if not mine:
            continue
        seconds = exposed = 0.0
        hiding: dict[str, float] = {}
        for one in mine:
            link = link_of(cluster, one.ranks, one.stride)
            takes = link.seconds(one.wire, one.calls)
            alone = takes if one.beside == EXPOSED else one.alone * takes
            seconds, exposed = seconds + takes, exposed + alone
            hiding[one.beside] = hiding.get(one.beside, 0.0) + takes - alone
        exposed += sum(max(0.0, takes - spare[beside]) for beside, takes in hiding.items())
        found[axis] = AxisTime(
            wire=sum(one.wire for one in mine), buffer=sum(one.buffer for one in mine),
            calls=sum(one.calls for one in mine), link=link.name, seconds=seconds, exposed=exposed,
        )  # fmt: skip
        if axis in ("tensor", "loss", "pipeline"):
            waits += exposed
    return found, waits


def _passes(case: Case, work: Work, compute: float) -> dict[str, float]:
    """Seconds of a step's compute that a collective may run beside. Backward is what forward (a third of the FLOPs that are not
    recomputed) leaves."""
    useful = flops_per_token(case.shape, work.seen, work.masked)
    again = recomputed_flops_per_token(case.shape, work.seen, case.layout)
    forward = compute * useful / 3 / (useful + again)
    head = case.accumulation * tokens_of(case).inside * _head_flops(case, work) / 3 / case.layout.tensor / work.rate
    backward = compute - forward
    return {
        EXPOSED: 0.0,
        FORWARD: forward,
        BACKWARD: backward,
        LAST_BACKWARD: backward / case.accumulation,
        WEIGHT_GRADIENT: head,
    }
