"""A save that is killed at any point, finds no room, or cannot write on one rank costs nothing that was there before."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.distributed.launch import run

SUITES = ("alone", "pair", "full")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """Each suite is one process that forks its ranks; in memory where there is such a folder: a kill does not lose what was
    written, so a disk would only be slower.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        for suite in SUITES:
            run("tests.parallel.checkpoint_faults", [folder + "/" + suite, suite], 1, timeout=240)
        return {suite: json.loads((Path(folder) / suite / f"{suite}.json").read_text()) for suite in SUITES}


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.fault(
    "SIGKILL at every point of a save",
    happens="the newest complete checkpoint loads, the next save works",
    lost="the save that was under way",
)
def test_kill_9_at_every_point_leaves_a_newest_checkpoint_that_loads_and_the_next_save_works(results, how):
    found = results["alone"][how]
    assert found["wrong"] == [] and found["last"] == [0]
    assert set(found["newest"]) == {3, 4} and found["newest"] == sorted(found["newest"]), (
        "older, older, ... newer, newer"
    )
    assert found["points"] > 25


@pytest.mark.parametrize("how", ["sync again", "async again"])
def test_kill_9_while_the_only_checkpoint_is_replaced_never_leaves_none(results, how):
    found = results["alone"][how]
    assert found["wrong"] == [] and found["last"] == [0]
    assert set(found["newest"]) == {3, 7} and found["newest"] == sorted(found["newest"])


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
@pytest.mark.fault(
    "SIGKILL of one or both ranks at every point of a save",
    happens="the other rank ends with an error; the newest complete checkpoint loads",
    lost="the save that was under way",
)
def test_kill_9_of_one_rank_or_both_at_every_point_is_no_worse_and_the_other_ends_with_an_error(results, how, victims):
    found = results["pair"][f"{how} {victims}"]
    assert found["wrong"] == [] and found["last"] == [0, 0]
    assert set(found["newest"]) == {3, 4} and found["newest"] == sorted(found["newest"])
    assert found["points"] > (8 if victims == [1] else 25)
    # 3: the other rank is gone, in one line. 0: the victim had done its part. Never a hang (99) or anything else.
    assert set(found["survivors"]) <= {0, 3} and (len(victims) == 2 or 3 in found["survivors"])


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("poor", [0, 1])
@pytest.mark.fault(
    "one rank cannot write its part of a checkpoint",
    happens="the save fails on all ranks alike and leaves nothing; the next one works",
    lost="the save that was under way",
)
def test_a_rank_that_cannot_write_fails_the_save_on_all_and_leaves_nothing_and_the_next_save_works(results, how, poor):
    found = results["full"][f"{how} {poor}"]
    assert found["codes"] == [0, 0] and found["next"]
    said = [told["said"] for told in found["told"]]
    assert said[0] == said[1] and f"__{poor}_0.distcp cannot be written: File too large" in said[0]
    for told in found["told"]:
        assert told["left"] == ["latest", "step-00000003"] and told["kept"]


@pytest.mark.fault(
    "no room for a checkpoint",
    happens="nothing is written, all ranks say the same",
    lost="that save",
)
def test_without_room_nothing_is_written_and_all_ranks_say_the_same(results):
    mishaps = results["full"]["mishaps"]
    assert mishaps["codes"] == [0, 0]
    for told in mishaps["told"]:
        for name in ("room", "room behind"):
            assert told[name] == mishaps["told"][0]["room"] and "GiB free: free some space" in told[name]
        assert told["left"] == ["latest", "step-00000003"] and told["waits once"]


def test_ranks_that_do_not_share_the_folder_publish_nothing(results):
    for told in results["full"]["mishaps"]["told"]:
        assert "run.dir must be a folder that all nodes share" in told["not shared"]


def test_a_checkpoint_that_one_rank_cannot_read_is_refused_by_all_before_a_value_is_written(results):
    for told in results["full"]["mishaps"]["told"]:
        assert "broken: trainer.json cannot be read" in told["load"] and told["untouched"] and told["loaded"]
