"""The DeepSpeed engine beside the parity matrix: what it moves, how it sums, what it skips, hands over and lets go of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.launch import run

pytestmark = [pytest.mark.parity, pytest.mark.timeout(600)]

STAGES = ("z0", "z1", "z2", "z3")
PIPELINED = (*STAGES, "z3 interleaved")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


def results(folder: Path, world: int) -> list[dict]:
    run("tests.distributed.deepspeed_worker", [str(folder)], world, timeout=600)
    return [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
    return results(folder, 2)


@pytest.fixture(scope="module")
def four(folder) -> list[dict]:
    return results(folder, 4)


def skips(*worlds: list[dict]) -> Iterator[tuple[str, dict]]:
    return ((name, f) for ranks in worlds for rank in ranks for name, f in rank.items() if name.startswith("skipped"))


# Pipelines: gathered once, reduced once.


@pytest.mark.parametrize("name", PIPELINED)
@pytest.mark.parametrize("microbatches", [2, 4])
def test_a_pipelined_step_reduces_its_stage_once_however_many_microbatches(four, name, microbatches):
    reduce = "reduce_scatter_tensor" if name.startswith("z3") else "all_reduce"
    for rank in four:
        found = rank[f"traffic {name} x{microbatches}"]
        assert found["microbatches"] == microbatches
        assert found["moved"][reduce] == [1, found["stage"]]


@pytest.mark.parametrize("name", ["z3", "z3 interleaved"])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_a_pipelined_zero3_step_gathers_its_stage_once_and_drops_it(four, name, microbatches):
    for rank in four:
        found = rank[f"traffic {name} x{microbatches}"]
        assert found["moved"]["all_gather_into_tensor"][1] == found["stage"]
        assert found["held after"] == 0


def test_without_gathered_once_every_microbatch_gathers_the_stage_again(four):
    for rank in four:
        found = rank["traffic z3 x4 without gathered_once"]
        assert found["moved"]["all_gather_into_tensor"][1] > 4 * found["stage"]


def test_without_a_pipeline_zero3_gathers_by_layer_and_holds_nothing_between_steps(two):
    for rank in two:
        found = rank["per layer"]
        calls, elements = found["moved"]["all_gather_into_tensor"]
        assert 5 < calls < found["parameters"] * found["microbatches"], "blocks are fetched whole, one after another"
        assert found["stage"] < elements <= 2 * found["microbatches"] * found["stage"], "what is reused soon stays"
        assert found["held after"] == 0


# bf16: sums in float32.


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["dp2", "pp2", "pp2 interleaved"])
def test_bf16_gradients_of_microbatches_add_up_in_float32(two, stage, name):
    for rank in two:
        found = rank[f"sums z{stage} {name}"]
        assert found["off"] < 1e-6
        assert found["bf16 sums would be off"] > 1e-3


def test_without_accumulate_in_float32_a_pipeline_adds_in_bf16(two):
    for rank in two:
        assert rank["sums z3 pp2 without accumulate_in_float32"]["off"] > 1e-4


# Steps that are skipped.


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(two, four):
    """One data-parallel, tensor-parallel or pipeline rank alone; ZeRO-0 to 3, fp32 and bf16."""
    seen = set()
    for name, found in skips(two, four):
        seen.add(name)
        assert found["culprits"] == 1, name
        assert not found["applied"], name
        assert found["unchanged"], f"{name}: weights, moments or step counters moved"
    assert len(seen) == 11 + len(PIPELINED)


def test_nothing_of_a_skipped_step_is_left_in_the_next_gradient(two, four):
    for name, found in skips(two, four):
        assert found["gradients again"], name
        assert found["goes on"], name


# Hand-over between stages.


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_handed_through_zero_stages_and_pipelines_keeps_every_bit_of_its_state(two, precision):
    links = two[0][f"chain {precision}"]["links"]
    assert all(link["complete"] and link["applied"] for link in links)
    assert all(link["state kept"] for link in links[1:])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_float32_weights_begin_at_the_drawn_values_to_the_bit(two, precision):
    assert two[0][f"chain {precision}"]["links"][0]["drawn"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_forward_follows_the_weights_that_were_written(two, precision):
    assert all(link["forward off"] < 1e-6 for link in two[0][f"chain {precision}"]["links"][1:])


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_a_run_handed_on_after_each_step_ends_like_an_unbroken_one(two, precision, bound):
    """Adam's step counter too: with a wrong one the bias correction, and so every update, would differ."""
    assert two[0][f"chain {precision}"]["end off"] < bound


# Between steps, and after the last.


@pytest.mark.parametrize("name", ["z3 dp2", "z3 pp2"])
def test_forwards_between_steps_do_not_disturb_training(two, name):
    assert two[0][f"undisturbed {name}"]


def test_a_closed_engine_leaves_nothing_of_its_model_behind(two, four):
    for rank in (*two, *four):
        assert rank["kept"] == []
    assert two[0]["kept without forget"] == 1


def test_replicas_of_a_shard_clip_by_one_norm(four):
    for found in four:
        assert found["replicas alike"] == {"pairs": True, "clipped": True, "norms": True, "state": True}
        alone = found["replicas alike without one_norm_for_replicas"]
        assert alone == {"pairs": True, "clipped": True, "norms": False, "state": False}
