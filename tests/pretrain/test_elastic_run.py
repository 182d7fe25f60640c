"""Real runs of a mixture, killed with -9 and gone on with at other layouts and engines: every step reads and draws the same."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from data.loader import Slice, training_batches
from parallel.checkpoint import latest
from pretrain.load_config import load_config
from pretrain.training_data import open_training_data, stage_options
from tests.data.fault_server import FaultServer
from tests.distributed.launch import run, start, wait
from tests.pretrain.test_training_run import arguments, metrics

pytestmark = pytest.mark.parity

STEPS, EVERY = 30, 4
LIVES = [  # (ranks, killed once this many steps are recorded, what is different)
    (4, 7, {"train.micro_batch_size": 1, "parallel.engine": "fsdp2"}),
    (1, 14, {"train.micro_batch_size": 8, "data.workers": 2}),
    (2, 21, {"parallel.tensor": 2, "data.workers": 1}),
    (2, STEPS, {"parallel.pipeline": 2, "train.micro_batch_size": 4}),
]


def command(corpus: Path, runs: Path, name: str, **more) -> list[str]:
    sources = [
        {"path": str(corpus / "train"), "weight": 0.7, "name": "text"},
        {"path": str(corpus / "val"), "weight": 0.3, "name": "more", "epochs": 0.05},  # ends on the way
    ]
    values = {
        "train.steps": STEPS, "train.checkpoint_every": EVERY, "train.validate_every": 10, "train.val_samples": 3,
        "data.shards": json.dumps(sources),
        "data.packing": "isolate", "data.random_length_prob": 0.2, "data.cfg_dropout": 0.3, "data.cfg_condition": "prefix",
        "data.shuffle_window": 3000, **more,
    }  # fmt: skip
    return arguments(corpus, runs, name, **values)


def killed(words: list[str], ranks: int, folder: Path, behind: int) -> str:
    """Starts the run and kills all ranks with -9 once `behind` steps are recorded and the newest due of them is saved.

    What rank 0 said.
    """
    processes = start("pretrain", words, ranks)
    deadline = time.monotonic() + 120
    saved = folder / "checkpoints" / f"step-{behind // EVERY * EVERY:08d}" / "trainer.json"
    while time.monotonic() < deadline and not (saved.exists() and len(metrics(folder)) >= behind):
        assert all(p.poll() is None for p in processes), processes[0].communicate()[0]
        time.sleep(0.01)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    return [process.communicate()[0] for process in processes][0]


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    run("pretrain", command(corpus, folder, "straight"), 2)
    for ranks, behind, more in LIVES:
        words = command(corpus, folder, "lives", **more)
        if behind < STEPS:
            said = killed(words, ranks, folder / "lives", behind)
        else:
            said = run("pretrain", words, ranks)[0]
        (folder / f"said-{behind}").write_text(said)
    return folder


def test_every_step_of_every_life_reads_what_the_uninterrupted_run_reads(runs):
    straight, lives = (metrics(runs / name, "data/") for name in ("straight", "lives"))
    assert [line["step"] for line in lives] == list(range(1, STEPS + 1))
    for here, there in zip(straight, lives, strict=True):
        assert here == there
    assert len({line["data/digest"] for line in straight}) == STEPS


def test_every_life_but_the_first_went_on_where_a_checkpoint_of_the_one_before_was(runs):
    for (_, before, _), (_, behind, _) in zip(LIVES, LIVES[1:]):
        resumed = re.search(r"resumed .* at step (\d+) ", (runs / f"said-{behind}").read_text())
        assert resumed and before // EVERY * EVERY <= int(resumed[1]) < behind


def test_the_losses_agree_too(runs):
    straight, lives = ([line["train/loss"] for line in metrics(runs / name)] for name in ("straight", "lives"))
    assert lives == pytest.approx(straight, rel=2e-4)
    assert latest(runs / "lives" / "checkpoints").name == f"step-{STEPS:08d}"


def test_a_validation_set_smaller_than_the_ranks_is_counted_once_at_every_layout(runs):
    """Three blocks: on four ranks of microbatch 1 one rank has none."""
    straight, lives = (metrics(runs / name, "val/") for name in ("straight", "lives"))
    assert [line["step"] for line in lives] == [line["step"] for line in straight] == [10, 20, 30]
    for here, there in zip(straight, lives, strict=True):
        assert there == pytest.approx(here, rel=2e-4)


def test_the_digests_and_epochs_are_those_of_the_stream_itself(runs, corpus):
    """Recomputed in this process, without a trainer."""
    config = load_config(command(corpus, runs, "straight")[1:])
    data = open_training_data(config, "size")
    blocks = data.blocks(config)
    part = Slice(config.train.global_batch_size, config.train.global_batch_size)
    source = training_batches(blocks, stage_options(config), part, data.first.special.pad, steps=STEPS)
    digests = [int(sum(c.digest.sum() for c in group)) for group in source]
    recorded = metrics(runs / "straight", "data/")
    assert [line["data/digest"] for line in recorded] == digests
    given = np.array([blocks.source(g)[0] for g in range(STEPS * config.train.global_batch_size)])
    for number, name in enumerate(("text", "more")):
        read = (given == number).sum() * config.data.sequence_length / data.sets[number].tokens
        assert recorded[-1][f"data/epoch/{name}"] == pytest.approx(read)
    assert (given[-40:] == 0).all() and (given == 1).any(), "the second source has ended"


def test_two_runs_at_once_on_one_host_do_not_meet(corpus, tmp_path):
    short = {
        "train.steps": 6,
        "optimizer.warmup_steps": 0,
        "optimizer.decay_steps": 0,
        "data.workers": 1,
        "train.validate_every": 6,
    }
    both = {
        name: start("pretrain", arguments(corpus, tmp_path, name, **{**short, "run.seed": seed}), 2)
        for seed, name in enumerate(("a", "b"))
    }
    for processes in both.values():
        wait(processes, 180)
    run("pretrain", arguments(corpus, tmp_path, "alone", **{**short, "run.seed": 1}), 2)
    digests = {
        name: [line["data/digest"] for line in metrics(tmp_path / name, "data/")] for name in ("a", "b", "alone")
    }
    assert digests["b"] == digests["alone"] != digests["a"]
    assert metrics(tmp_path / "b") == metrics(tmp_path / "alone")


def test_a_reset_begins_a_new_stream_behind_the_samples_already_read_and_is_recorded(corpus, tmp_path):
    short = {"train.steps": 8, "optimizer.warmup_steps": 0, "optimizer.decay_steps": 0, "train.validate_every": 0}
    run("pretrain", arguments(corpus, tmp_path, "r", **short, **{"train.stop_at": 3}), 1)
    larger = {**short, "train.global_batch_size": 10}
    refused = start("pretrain", arguments(corpus, tmp_path, "r", **larger), 1)[0]
    assert "data.reset_stream" in refused.communicate(timeout=60)[0] and refused.returncode == 2
    said = run(
        "pretrain", arguments(corpus, tmp_path, "r", **larger, **{"data.reset_stream": "true", "train.stop_at": 6}), 1
    )
    assert (
        "a new stream begins at sample 30; changed: train.global_batch_size" in said[0]
    )  # 3 steps of 8, up to whole steps of 10
    other = {**larger, "train.micro_batch_size": 5}
    run("pretrain", arguments(corpus, tmp_path, "r", **other), 2)  # and goes on, at another layout, without the flag
    config = load_config(arguments(corpus, tmp_path, "r", **larger)[1:])
    data = open_training_data(config, "size")
    source = training_batches(
        data.blocks(config), stage_options(config), Slice(10, 10), data.first.special.pad, consumed=30, steps=5
    )
    expected = [int(sum(c.digest.sum() for c in group)) for group in source]
    assert [line["data/digest"] for line in metrics(tmp_path / "r", "data/")][3:] == expected
    saved = json.loads((tmp_path / "r" / "checkpoints" / "step-00000008" / "trainer.json").read_text())
    assert saved["samples_consumed"] == 80 and saved["stream"]["step"] == 3 and saved["stream"]["sample"] == 30
    assert saved["stream"]["resets"][0]["changed"] == {"train.global_batch_size": [8, 10]}


def test_a_run_that_reads_from_an_unreliable_address_reads_what_the_folder_holds(corpus, tmp_path):
    """Two ranks with a worker each share one cache; connections break and the server fails on the way."""
    short = {
        "train.steps": 6, "optimizer.warmup_steps": 0, "optimizer.decay_steps": 0, "train.validate_every": 0,
        "data.shuffle_window": 4000, "data.workers": 1, "data.val_shards": "",
    }  # fmt: skip
    run("pretrain", arguments(corpus, tmp_path, "folder", **short), 2)
    server = FaultServer(corpus / "train")
    server.faults["shard-000000.tar"] = ["500", "drop 100000", "truncate 5000", "wrong"]
    try:
        remote = {**short, "data.shards": server.url + "/train", "data.cache_dir": tmp_path / "cache"}
        run("pretrain", arguments(corpus, tmp_path, "address", **remote), 2)
    finally:
        server.close()
    here, there = (metrics(tmp_path / name, "data/") for name in ("folder", "address"))
    assert [line["data/digest"] for line in here] == [line["data/digest"] for line in there] and len(there) == 6
    assert not server.faults["shard-000000.tar"], "all faults were met"
