"""`plan search`: what it ranks is legal, fits, is as fast as `plan` says, and nothing it could have found is faster."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from data.errors import InputError
from parallel.legality import first_broken
from pretrain.load_config import load_config
from pretrain.memory import GIB, memory_per_gpu
from pretrain.planning.case import case_of
from pretrain.planning.cluster import read_cluster
from pretrain.planning.command import plan
from pretrain.planning.plan import Question, plan_of, work_of
from pretrain.planning.search import _cases, _kind, search
from pretrain.planning.step_time import step_time

ROOT = Path(__file__).resolve().parents[3]
# A batch with few divisors: few microbatches to look at.
LLADA_8B = ["--config", str(ROOT / "configs" / "llada_8b.yaml"), "--train.global_batch_size", "32"]
QUICKSTART = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
H800 = read_cluster("h800")
PAIRS = dataclasses.replace(H800, gpus_per_node=2)  # tensor parallelism of two at most: fewer layouts


@pytest.fixture(scope="module")
def ranked() -> dict:
    return search(load_config(LLADA_8B), Question(PAIRS, 8))


def test_overrides_pasted_behind_the_config_give_a_plan_that_is_legal_fits_and_is_as_fast(ranked):
    assert len(ranked["layouts"]) == 10
    for row in ranked["layouts"]:
        found = plan_of(load_config([*LLADA_8B, *shlex.split(row["overrides"])]), Question(PAIRS, 8))
        assert found["memory"]["fits"] and found["memory"]["total"] == row["memory_bytes"]
        assert found["time"]["tokens_per_second"] == pytest.approx(row["tokens_per_second"])
        assert found["time"]["mfu"] == pytest.approx(row["mfu"])


def test_the_ranking_is_what_looking_at_every_layout_gives(ranked):
    """The fastest that fits of each kind, all of them estimated and none left out early."""
    config = load_config(LLADA_8B)
    base, question = case_of(config, 8), Question(PAIRS, 8)
    best: dict[tuple, float] = {}
    legal = illegal = 0
    for case in _cases(base, PAIRS):
        if first_broken(case):
            illegal += 1
            continue
        legal += 1
        if memory_per_gpu(case).total <= 80 * GIB:
            seconds = step_time(case, PAIRS, work_of(config, question)).total
            best[_kind(case)] = min(seconds, best.get(_kind(case), seconds))
    assert [row["step_seconds"] for row in ranked["layouts"]] == pytest.approx(sorted(best.values())[:10])
    assert (ranked["legal"], ranked["tried"]) == (legal, legal + illegal)
    assert sum(ranked["illegal"].values()) == illegal


def test_what_is_faster_and_left_out_does_not_fit_and_says_by_how_much(ranked):
    assert ranked["do_not_fit"] >= len(ranked["fastest_that_do_not_fit"]) > 0
    slowest = ranked["layouts"][-1]["step_seconds"]
    for row in ranked["fastest_that_do_not_fit"]:
        found = plan_of(load_config([*LLADA_8B, *shlex.split(row["overrides"])]), Question(PAIRS, 8))["memory"]
        assert not found["fits"] and row["over_bytes"] == found["total"] - 80 * GIB
        assert row["step_seconds"] <= slowest


def test_one_gpu_is_searched_too_and_where_nothing_fits_that_is_said(capsys):
    assert plan(["search", *LLADA_8B, "--gpus", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "legal layouts fits" in said[0] and "none of" in said[0] and "do not fit" in said[1]
    assert plan(["search", *QUICKSTART, "--gpus", "1"]) == 0
    assert "fastest that fit" in capsys.readouterr().out


def test_where_memory_is_short_slower_layouts_are_left_and_all_of_them_fit(ranked):
    short = search(load_config(LLADA_8B), Question(dataclasses.replace(PAIRS, memory=30), 8))
    assert short["layouts"] and all(row["memory_bytes"] <= 30 * GIB for row in short["layouts"])
    assert short["layouts"][0]["step_seconds"] > ranked["layouts"][0]["step_seconds"]
    assert short["do_not_fit"] > ranked["do_not_fit"]


def test_a_batch_that_no_layout_can_share_is_a_mistake_in_one_line():
    with pytest.raises(
        InputError, match="plan search: no layout of 7 GPUs is legal: train.global_batch_size 16"
    ) as caught:
        search(load_config(QUICKSTART), Question(H800, 7))
    assert "\n" not in str(caught.value)


def test_a_config_with_stages_of_its_own_gets_even_ones_and_the_override_says_so():
    stages = ["--parallel.pipeline", "2", "--parallel.layers_per_stage", "[20, 12]"]
    rows = search(load_config([*LLADA_8B, *stages]), Question(PAIRS, 8))["layouts"]
    assert all("--parallel.layers_per_stage '[]'" in row["overrides"] for row in rows)
    assert any("--parallel.pipeline 1" in row["overrides"] for row in rows)
