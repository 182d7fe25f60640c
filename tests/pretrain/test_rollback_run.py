"""Whole runs of two ranks in trouble: back to before it, on behind what was read, the same after a resume, and not for ever."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from parallel import checkpoint
from pretrain.checkpoint_command import describe
from pretrain.tracking.metric_log import read_metrics
from tests.distributed.launch import start
from tests.pretrain.test_training_run import arguments

STEPS, BATCH = 36, 8
# Broken in three steps in a row, of which the first is the third behind a checkpoint; spikes around one that is due.
NAN, SPIKES = [7, 8, 9], [27, 29]
BROKEN = {"gradient": NAN[:1], "loss": NAN[1:]}
BOTH = BROKEN | {"spike": [call + 5 for call in SPIKES]}  # five calls are taken again


def launch(corpus: Path, runs: Path, name: str, faults: dict, **options) -> tuple[list[int], str]:
    """(exit codes, what rank 0 said) of a run of two ranks."""
    values = {
        "parallel.engine": "fsdp2",
        "train.steps": STEPS,
        "train.checkpoint_every": 4,
        "train.validate_every": 0,
        "train.max_skipped": 3,
        "health.spike_window": 40,
        "health.spike_patience": 2,
        "health.check_every": 5,
        **{key.replace("__", "."): value for key, value in options.items()},
    }
    ranks = start("tests.pretrain.rollback_worker", [json.dumps(faults), *arguments(corpus, runs, name, **values)], 2)
    try:
        said = [p.communicate(timeout=120)[0] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    return [p.returncode for p in ranks], said[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(corpus, runs) -> dict[int, int]:
    """The data digest of every step of a run without trouble."""
    codes, said = launch(corpus, runs, "straight", {})
    assert codes == [0, 0], said
    assert "rolling back" not in said and "spike" not in said
    return {line["step"]: line["data/digest"] for line in read_metrics(runs / "straight")}


@pytest.fixture(scope="module")
def troubled(corpus, runs, straight) -> tuple[Path, str]:
    """A run with three broken steps and, later, three spikes."""
    codes, said = launch(corpus, runs, "troubled", BOTH)
    assert codes == [0, 0], said
    return runs / "troubled", said


def trainer(folder: Path, step: int) -> dict:
    return checkpoint.read_trainer(folder / "checkpoints" / f"step-{step:08d}")


def numbers(folder: Path) -> dict[int, dict]:
    """Metrics by step, without what depends on the clock."""
    return {
        line["step"]: {k: v for k, v in line.items() if k == "step" or k.startswith(("train/", "data/"))}
        for line in read_metrics(folder)
    }


@pytest.mark.fault(
    "losses and gradients of one rank that are not finite for several steps, and later a loss that is a spike several times",
    happens="the run rolls back to its newest checkpoint from before them and goes on behind the samples it has read",
    lost="the steps since that checkpoint, and their samples",
)
def test_the_run_goes_back_and_on_behind_the_samples_that_it_read(troubled, straight):
    folder, said = troubled
    digests = {line["step"]: line["data/digest"] for line in read_metrics(folder)}
    assert list(digests) == list(range(1, STEPS + 1)), "every step is there once, in order"
    # Back from 9 to 4: step 5 reads what step 10 would have; back from 29 to 24: what five steps read is read no more.
    taken = [*range(1, 5), *range(10, 30), 35, 36]
    assert [digests[step] for step in range(1, 27)] == [straight[step] for step in taken]
    assert said.count("rolling back") == 2
    assert "3 steps in a row were not finite" in said and "2 losses of the last 4 steps were spikes" in said


def test_what_was_skipped_is_in_every_later_checkpoint_and_inspect_tells_it(troubled):
    folder, _ = troubled
    stream = trainer(folder, STEPS)["stream"]
    assert [(skip["step"], skip["samples"]) for skip in stream["skips"]] == [(4, [32, 71]), (24, [232, 271])]
    assert (stream["step"], stream["sample"]) == (24, 272)
    assert trainer(folder, STEPS)["samples_consumed"] == (STEPS + 5 + 5) * BATCH
    records = trainer(folder, STEPS)["skipped"]["records"]
    assert [record["step"] for record in records] == NAN
    assert records[0]["samples"] == [[48, 55]] and "gradient is not finite although" in records[0]["reason"]
    for record in records[1:]:  # one sample's loss: the whole first microbatch of the second rank
        first = (record["step"] - 1) * BATCH + BATCH // 2
        assert record["samples"] == [[first, first + 1]]
        assert re.fullmatch(r"the loss of sample \d+ \(ranks \[1\]\) is not finite.*", record["reason"])
    found = describe(folder / "checkpoints" / f"step-{STEPS:08d}")
    assert found["skipped_steps"].startswith("3: step 7") and found["skipped_samples"].startswith("2: 32-71")


def test_no_checkpoint_was_made_in_the_trouble(troubled):
    folder, said = troubled
    assert "step-00000028" not in said.split("rolling back")[1], "due between the spikes"
    assert [trainer(folder, step)["step"] for step in range(4, STEPS + 1, 4)] == list(range(4, STEPS + 1, 4))


@pytest.mark.parity
def test_the_numbers_after_it_are_those_of_the_checkpoint_and_of_the_samples_that_follow(troubled, corpus, runs):
    """A run that finds checkpoint 4 with the record in it, and never had any trouble itself, goes the same way to the bit."""
    folder, _ = troubled
    other = runs / "told"
    shutil.copytree(folder, other)
    for path in (other / "checkpoints").iterdir():
        if path.name not in ("latest", "step-00000004"):
            shutil.rmtree(path)
    edit(other / "checkpoints" / "step-00000004", {"stream": trainer(folder, 8)["stream"]})
    codes, said = launch(corpus, runs, "told", {}, train__stop_at=23)
    assert codes == [0, 0], said
    told, known = numbers(other), numbers(folder)
    assert {step: told[step] for step in range(5, 24)} == {step: known[step] for step in range(5, 24)}


def edit(folder: Path, changes: dict) -> None:
    """Changes keys of a checkpoint's trainer.json."""
    text = json.dumps(json.loads((folder / "trainer.json").read_text()) | changes)
    (folder / "trainer.json").write_text(text)
    files = json.loads((folder / "files.json").read_text())
    files["trainer.json"] = [len(text), hashlib.sha256(text.encode()).hexdigest()]
    (folder / "files.json").write_text(json.dumps(files))


@pytest.mark.parity
def test_a_resumed_run_goes_the_same_way_as_the_unbroken_one(troubled, corpus, runs):
    """Stopped between the two roll-backs, at a step that is no multiple of checkpoint_every."""
    folder, _ = troubled
    codes, said = launch(corpus, runs, "resumed", BROKEN, train__stop_at=18)
    assert codes == [0, 0], said
    codes, said = launch(corpus, runs, "resumed", {"spike": [call - 18 for call in SPIKES]})
    assert codes == [0, 0], said
    assert numbers(runs / "resumed") == numbers(folder)


@pytest.mark.parity
def test_without_a_checkpoint_the_run_begins_anew_with_nothing_left_of_its_first_try(corpus, runs):
    """Two updates are undone, moments and all: as if none of the five steps had been taken."""
    found = []
    for name, calls, most in (("after two", [3, 4, 5], 3), ("at once", [1, 2, 3, 4, 5], 5)):
        folder = name.replace(" ", "-")
        options = {"train__checkpoint_every": 0, "train__max_skipped": most, "train__steps": 12}
        options["optimizer__decay_steps"] = 5
        codes, said = launch(corpus, runs, folder, {"gradient": calls}, parallel__engine="deepspeed", **options)
        assert codes == [0, 0] and said.count("rolling back") == 1, said
        found.append(numbers(runs / folder))
    assert found[0] == found[1]
    assert [skip["samples"] for skip in trainer(runs / "at-once", 12)["stream"]["skips"]] == [[0, 39]]


@pytest.mark.parity
@pytest.mark.fault(
    "trouble that comes back after every roll-back",
    happens="behind health.max_rollbacks of them the run ends with the reason",
    lost="the steps since the newest checkpoint, which is from before the trouble",
)
def test_trouble_that_comes_back_ends_the_run_and_keeps_the_checkpoint_from_before(corpus, runs):
    options = {"health__max_rollbacks": 1, "train__max_skipped": 2}
    codes, said = launch(corpus, runs, "hopeless", {"gradient": list(range(6, 99))}, **options)
    assert codes == [1, 1]
    assert said.count("rolling back") == 1 and "health.max_rollbacks 1" in said.splitlines()[-1]
    assert checkpoint.latest(runs / "hopeless" / "checkpoints").name == "step-00000004"


@pytest.mark.fault(
    "the lowest bit of one number in one rank's optimizer state flips while it waits for the next update",
    happens="the run ends before that update; the error names the tensor, the rank and its host",
    lost="the steps since the newest checkpoint, whose copies were compared before it was made",
)
@pytest.mark.parity
def test_a_flipped_bit_ends_the_run_before_it_is_saved_and_names_the_rank(corpus, runs):
    codes, said = launch(corpus, runs, "looked", {"flip": [6]}, health__check_every=5)
    assert codes == [1, 1]
    assert "exp_avg_sq/head.weight of rank 1 on " in said.splitlines()[-1]
    assert checkpoint.latest(runs / "looked" / "checkpoints").name == "step-00000004"
