"""Time of a step: the bubble against torch's own schedules, and laws that hold whatever the rates are."""

from __future__ import annotations

import dataclasses
import math

import pytest

from parallel.layout import Layout
from parallel.layout_rules import Case
from parallel.legality import first_broken
from parallel.shape import ModelShape
from pretrain.flops import flops_per_token
from pretrain.planning.cluster import read_cluster
from pretrain.planning.step_time import Work, idle_microbatches, step_time
from tests.pretrain.test_memory import torch_schedule

LLADA_8B = ModelShape(32, 4096, 32, 32, 12288, 126464)
H800 = read_cluster("h800")
NO_LINKS = dataclasses.replace(H800, nvlink=math.inf, network=math.inf, latency=0.0)
WORK = Work(4096, 0.5, 0.4 * H800.flops)
PART = 1 / 6  # a chunk's forward, input gradient or weight gradient: a rank's two chunks make 1 a microbatch


def idle_by_torch(case: Case) -> float:
    """Longest a rank has nothing to do, if the ranks run torch's orders as early as what they wait for is there."""
    ranks, last = case.layout.pipeline, case.layout.chunks - 1
    orders = [torch_schedule(case, rank) for rank in range(ranks)]
    done: dict[tuple[str, int, int], float] = {}
    clock, at, busy = [0.0] * ranks, [0] * ranks, [0.0] * ranks
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                action = order[at[rank]]
                kind, chunk, batch = action.computation_type.name, action.stage_index, action.microbatch_index
                if kind == "FORWARD":
                    key, needs, takes = ("F", chunk, batch), [("F", chunk - 1, batch)] if chunk else [], PART
                elif kind == "BACKWARD_WEIGHT":
                    key, needs, takes = ("W", chunk, batch), [("B", chunk, batch)], PART
                else:
                    key = ("B", chunk, batch)
                    needs = [("B", chunk + 1, batch)] if chunk < last else [("F", chunk, batch)]
                    takes = 2 * PART if kind == "FULL_BACKWARD" else PART
                if batch >= case.accumulation:  # zbv fills up short batches, and drops what it filled in
                    needs, takes = [], 0.0
                if any(need not in done for need in needs):
                    break
                clock[rank] = max([clock[rank], *(done[need] for need in needs)]) + takes
                done[key], busy[rank], at[rank], moved = clock[rank], busy[rank] + takes, at[rank] + 1, True
    assert all(place == len(order) for place, order in zip(at, orders)), "the orders wait for each other"
    return max(clock) - max(busy)


@pytest.mark.parametrize("ranks", [2, 3, 4, pytest.param(8, marks=pytest.mark.parity)])
@pytest.mark.parametrize("schedule", ["interleaved", "interleaved_zb", "zbv"])
def test_the_bubble_is_what_torchs_own_schedules_leave_idle(schedule, ranks):
    seen = 0
    for count in [*range(1, 2 * ranks + 2), 4 * ranks, 8 * ranks]:
        layout = Layout("fsdp2", pipeline=ranks, schedule=schedule)
        case = Case(LLADA_8B, ranks, layout, count, 1, 4096, bf16=True)
        if first_broken(case):
            continue
        seen += 1
        assert idle_microbatches(case) == pytest.approx(idle_by_torch(case)), count
    assert seen >= 4


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_bubble_of_gpipe_and_1f1b_is_ranks_less_one_microbatches(schedule):
    """Narayanan et al., arXiv 2104.04473, section 2.2: (p - 1) / m of the ideal time."""
    case = Case(LLADA_8B, 8, Layout("fsdp2", pipeline=8, schedule=schedule), 32, 1, 4096, bf16=True)
    assert idle_microbatches(case) == 7
    assert idle_microbatches(dataclasses.replace(case, layout=Layout(schedule=schedule))) == 0


def case_8b(gpus: int = 64, micro: int = 4, batch: int = 1280, **layout) -> Case:
    case = Case(LLADA_8B, gpus, Layout(**layout), batch, micro, 4096, bf16=True)
    assert first_broken(case) is None
    return case


def test_without_links_to_wait_for_compute_is_flops_by_rate():
    time = step_time(case_8b(), NO_LINKS, WORK)
    tokens = 1280 * 4096 / 64
    assert time.total == time.compute == pytest.approx(tokens * flops_per_token(LLADA_8B, 4096, 0.5) / WORK.rate)
    assert time.exposed == time.bubble == 0


def test_tensor_and_pipeline_share_the_work_and_the_slowest_stage_sets_the_pace():
    whole = step_time(case_8b(micro=1), NO_LINKS, WORK).compute
    split = step_time(case_8b(micro=1, tensor=4), NO_LINKS, WORK)
    assert split.compute == pytest.approx(whole)  # a quarter of the work of four times the microbatches
    staged = step_time(case_8b(micro=1, pipeline=4), NO_LINKS, WORK)
    assert staged.pp_rank == 3 and staged.compute > whole  # the head is in the last stage
    assert staged.bubble == pytest.approx(staged.compute * 3 / 80)
    balanced = case_8b(micro=1, pipeline=4, layers_per_stage=(9, 8, 8, 7))
    assert step_time(balanced, NO_LINKS, WORK).total < staged.total


def test_recomputation_costs_about_a_third_more():
    plain = step_time(case_8b(), NO_LINKS, WORK).compute
    full = step_time(case_8b(activation_checkpointing="full"), NO_LINKS, WORK).compute
    selective = step_time(case_8b(activation_checkpointing="selective"), NO_LINKS, WORK).compute
    assert 1.2 < full / plain < 1.34 and plain < selective < full


LAYOUTS = [
    {}, {"engine": "fsdp2"}, {"zero_stage": 1}, {"zero_stage": 2}, {"shard_group": 8}, {"tensor": 2},
    {"tensor": 8, "sequence_parallel": True}, {"pipeline": 4}, {"pipeline": 2, "schedule": "interleaved", "tensor": 2},
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_slower_links_never_make_a_step_faster_and_what_hides_is_less_than_there_is(layout):
    case, last = case_8b(micro=1, **layout), 0.0
    for slower in (1e-3, 1, 3, 10, 100, 1000):
        cluster = dataclasses.replace(H800, nvlink=H800.nvlink / slower, network=H800.network / slower)
        time = step_time(case, cluster, WORK)
        assert time.total >= last
        assert all(0 <= axis.exposed <= axis.seconds * (1 + 1e-12) for axis in time.axes.values())
        assert time.total == pytest.approx(time.compute + time.exposed + time.bubble)
        last = time.total
    assert last > 3 * step_time(case, NO_LINKS, WORK).total


def test_gathers_hide_under_a_long_microbatch_and_not_under_a_short_one():
    long = step_time(case_8b(micro=20), H800, WORK).axes["data"]
    short = step_time(dataclasses.replace(case_8b(micro=1), sequence=128), H800, WORK).axes["data"]
    assert long.exposed < 0.1 * long.seconds and short.exposed > 0.9 * short.seconds


def test_tensor_parallel_ranks_wait_for_their_collectives_and_more_so_across_nodes():
    inside = step_time(case_8b(micro=1, tensor=8), H800, WORK).axes["tensor"]
    assert inside.link == "nvlink" and inside.exposed == inside.seconds > 0
    small_nodes = dataclasses.replace(H800, gpus_per_node=4)
    across = step_time(case_8b(micro=1, tensor=8), small_nodes, WORK).axes["tensor"]
    assert across.link == "network" and across.seconds >= inside.seconds


def test_the_first_unit_to_be_gathered_and_the_last_to_be_reduced_are_waited_for_in_every_microbatch():
    """By hand, without latency: the head is the largest unit, in bf16 gathered and in float32 reduced; four microbatches."""
    cluster = dataclasses.replace(H800, latency=0.0, efficiency=1.0)
    case = case_8b(micro=5, activation_checkpointing="full", engine="fsdp2")
    axis = step_time(case, cluster, WORK).axes["data"]
    head = LLADA_8B.vocab_size * LLADA_8B.hidden_size + LLADA_8B.hidden_size
    assert axis.exposed == pytest.approx(4 * 63 / 64 * head * (2 + 4) / 200e9, rel=1e-3)
    assert not axis.hidden and axis.exposed < 0.1 * axis.seconds


def test_what_overflows_a_pass_is_waited_for_and_no_more():
    """On a slow network gathers fill the forward, and gathers and reductions the backward pass: compute is all that hides."""
    slow = dataclasses.replace(H800, nvlink=1e9, network=1e9)
    case = case_8b(micro=5)
    time = step_time(case, slow, WORK)
    assert time.axes["data"].exposed == pytest.approx(time.axes["data"].seconds - time.compute)


@pytest.mark.parametrize("layout", [{"zero_stage": 1}, {"pipeline": 4}])
def test_what_comes_behind_the_last_backward_is_waited_for(layout):
    """ZeRO-1 in bf16 reduces there; a pipeline gathers before its first microbatch too."""
    axis = step_time(case_8b(micro=1, **layout), H800, WORK).axes["data"]
    assert axis.exposed == axis.seconds > 0
