"""Bytes of a step's collectives: against those that the engines enter on four real ranks, and against a ring by hand."""

from __future__ import annotations

import json

import pytest

from parallel.layout import Layout
from parallel.layout_rules import Case
from parallel.shape import ModelShape, parameter_counts
from pretrain.planning.communication import Traffic, traffic_of
from tests.distributed.launch import run
from tests.pretrain.planning.communication_worker import CASES

LLADA_8B = ModelShape(32, 4096, 32, 32, 12288, 126464)
RANKS = 4
SMALL = 64  # bytes that are not planned: the gradient norm, flags


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[dict[str, dict[str, list[float]]]]:
    """Of each rank."""
    folder = tmp_path_factory.mktemp("communication")
    run("tests.pretrain.planning.communication_worker", [str(folder)], RANKS, timeout=280)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parity
def test_planned_bytes_are_those_that_every_rank_communicates_but_for_a_few_of_norms(measured, name):
    for found in measured:
        assert sum(seen for kind, (seen, _) in found[name].items() if kind != "flops") > 1000 * SMALL
        for kind, (bytes_seen, planned) in found[name].items():
            if kind == "flops":
                continue
            assert planned == pytest.approx(bytes_seen, rel=0, abs=SMALL), kind


@pytest.mark.parametrize("name", [name for name, (layout, _) in CASES.items() if layout.pipeline == 1])
@pytest.mark.parity
def test_a_step_of_a_whole_engine_does_the_flops_that_are_planned(measured, name):
    for found in measured:
        counted, planned = found[name]["flops"]
        assert counted == planned > 0


def wire(kind: str, buffer: float, ranks: int) -> float:
    return Traffic("data", kind, "", 1, buffer, ranks, 1).wire


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_rank_of_a_ring_sends_every_chunk_but_one_and_an_all_reduce_does_it_twice(ranks):
    chunk = 100.0
    assert wire("all-gather", ranks * chunk, ranks) == pytest.approx((ranks - 1) * chunk)
    assert wire("reduce-scatter", ranks * chunk, ranks) == pytest.approx((ranks - 1) * chunk)
    assert wire("all-reduce", ranks * chunk, ranks) == pytest.approx(2 * (ranks - 1) * chunk)
    assert wire("point-to-point", chunk, ranks) == chunk


def sent(case: Case, axis: str, rank: int = 0) -> float:
    return sum(one.wire for one in traffic_of(case, rank, 0.5) if one.axis == axis)


def test_zero_3_sends_half_as_much_again_as_zero_1_in_one_microbatch():
    """Rajbhandari et al., arXiv 1910.02054, section 7: 3 and 2 times the parameters; gradients count in float32 here."""
    parameters = parameter_counts(LLADA_8B)["total"]
    case = Case(LLADA_8B, 64, Layout(), 64, 1, 4096, bf16=True)
    share = 63 / 64 * parameters
    assert sent(case, "data") == pytest.approx((2 + 2 + 4) * share, rel=0.13)  # the head and a few blocks stay gathered
    assert sent(case.with_change({"parallel.engine": "fsdp2"}), "data") == pytest.approx((2 + 2 + 4) * share, rel=0.04)
    assert sent(case.with_change({"parallel.zero_stage": 1}), "data") == pytest.approx((2 + 2 * 4) * share)


def test_with_a_pipeline_weights_and_gradients_travel_once_however_many_microbatches():
    few = Case(LLADA_8B, 16, Layout(pipeline=4), 16, 1, 4096, bf16=True)
    many = few.with_change({"train.global_batch_size": 160})
    assert sent(few, "data") == sent(many, "data") > 0
    assert 10 * sent(few, "pipeline") == pytest.approx(sent(many, "pipeline"), rel=1e-6)
    alone = few.with_change({"parallel.pipeline": 1})
    assert sent(alone.with_change({"train.global_batch_size": 160}), "data") == 10 * sent(alone, "data")


def test_sequence_parallelism_sends_as_much_as_tensor_parallelism_but_at_the_ends():
    """Korthikanti et al., arXiv 2205.05198, section 4.2.2: an all-gather and a reduce-scatter are an all-reduce."""
    case = Case(LLADA_8B, 8, Layout(tensor=8), 8, 1, 4096, bf16=True)
    sequence = case.with_change({"parallel.sequence_parallel": True})
    assert sent(sequence, "tensor") == pytest.approx(sent(case, "tensor"), rel=0.02)


def test_shard_groups_bound_how_far_gathers_reach_and_replicas_sum_shards():
    case = Case(LLADA_8B, 64, Layout(shard_group=8), 64, 1, 4096, bf16=True)
    traffic = traffic_of(case, 0, 0.5)
    assert {(one.axis, one.ranks, one.stride) for one in traffic} == {("data", 8, 1), ("replica", 8, 8)}
    parameters = parameter_counts(LLADA_8B)["total"]
    assert sent(case, "replica") == pytest.approx(2 * 7 / 8 * 4 * parameters / 8)


def test_a_single_rank_sends_nothing():
    assert traffic_of(Case(LLADA_8B, 1, Layout(), 8, 1, 4096, bf16=True), 0, 0.5) == []
