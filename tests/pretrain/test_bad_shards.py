"""A run goes on without a bad shard alike on all ranks, whoever cannot read it; and stops, with its name, when it may not."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.launch import run, start
from tests.pretrain.test_training_run import arguments, metrics


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A set of about eight shards."""
    from data.prepare import prepare
    from data.prepare_options import PrepareOptions

    folder = tmp_path_factory.mktemp("shards")
    text = Path(argparse.__file__).read_text()
    lines = [json.dumps({"text": text[i : i + 700]}) for i in range(0, len(text), 400)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    out = folder / "set"
    options = PrepareOptions(
        out=str(out), inputs=[str(folder / "text.jsonl")], vocab_size=400, val_fraction=0.02, processes=1,
        shard_tokens=9000, chunk_tokens=1000,
    )  # fmt: skip
    prepare(options, progress=False)
    assert len(list((out / "train").glob("*.tar"))) >= 6
    return out


@pytest.fixture(scope="module")
def peers(shards, tmp_path_factory) -> list[dict]:
    """What two tensor-parallel ranks end up with, of which only the second lacks a shard."""
    folder = tmp_path_factory.mktemp("peers")
    for name in ("whole", "rank0", "rank1"):
        shutil.copytree(shards / "train", folder / name)
    run("tests.pretrain.bad_shards_worker", [str(folder), str(folder)], 2, timeout=120)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_nothing_changes_while_all_is_well(peers):
    for one in peers:
        assert one["whole"] == one["none allowed"] and sum(one["whole"]["lost"]) == 0
        assert one["whole"] == peers[0]["whole"] and one["whole"]["saved"] == []


@pytest.mark.parametrize("case", ["lost on the way", "lost before the start"])
@pytest.mark.fault(
    "a shard that one rank cannot read, within data.max_bad_shards",
    happens="its samples count for nothing on every rank alike; nothing is renumbered",
    lost="those samples",
)
def test_ranks_that_read_the_same_samples_lose_the_same_ones_though_only_one_cannot_read_them(peers, case):
    first, second = (one[case] for one in peers)
    assert {**first, "said": 0} == {**second, "said": 0} and "error" not in first
    lost = [sample == 0 for step in first["digests"] for sample in step]
    assert 5 < sum(lost) < len(lost) / 2 and sum(lost) == sum(first["lost"])
    whole = [sample for step in peers[0]["whole"]["digests"] for sample in step]
    got = [sample for step in first["digests"] for sample in step]
    assert all(gone or here == there for gone, here, there in zip(lost, got, whole)), "nothing else changed"
    assert [entry["shard"] for entry in first["saved"]] == ["shard-000002.tar"]
    assert len(first["said"]) == 1 and "shard-000002.tar" in first["said"][0] and "rank 1" in first["said"][0]


def test_what_one_rank_finds_bad_at_opening_all_ranks_know_before_the_first_sample(peers):
    """Else a rank of another host would train on bytes whose damage only this one's check has seen."""
    for one in peers:
        assert one["lost before the start"]["at the start"] == ["shard-000002.tar"]
        assert one["lost on the way"]["at the start"] == [] == one["whole"]["at the start"]


def test_a_resume_goes_on_without_the_shard_and_reads_the_same(peers):
    for one in peers:
        assert one["resumed"]["digests"] == one["lost on the way"]["digests"][3:]
        assert one["resumed"]["saved"] == one["lost on the way"]["saved"]
        assert len(one["resumed"]["said"]) == 1 and "going on without shard-000002.tar" in one["resumed"]["said"][0]
        assert "bad_shards" in one["limit gone"]["error"] and "shard-000002.tar" in one["limit gone"]["error"]
        assert one["moved"]["digests"] == one["resumed"]["digests"], (
            "known by its content, wherever it lies and whole again"
        )


def test_more_than_allowed_stops_all_ranks_with_their_names(peers):
    """Each rank alone lacks no more than it may: the first shard 4, the second shard 2."""
    for one in peers:
        said = one["too many"].get("error", "")
        assert "data.max_bad_shards" in said and "shard-000004.tar" in said and "shard-000002.tar" in said


@pytest.fixture(scope="module")
def damaged(shards, tmp_path_factory) -> Path:
    """The set with ids outside the vocabulary in one shard, whose size and headers are right."""
    folder = tmp_path_factory.mktemp("damaged") / "set"
    shutil.copytree(shards, folder)
    tar = folder / "train" / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[2048 : len(content) // 2] = b"\xff" * (len(content) // 2 - 2048)
    tar.write_bytes(content)
    return folder


def command(corpus: Path, runs: Path, name: str, **more) -> list[str]:
    values = {
        "data.verify": "size", "data.max_bad_shards": 1, "train.steps": 8, "train.checkpoint_every": 4,
        "train.validate_every": 0, "optimizer.warmup_steps": 0, "optimizer.decay_steps": 0, **more,
    }  # fmt: skip
    return arguments(corpus, runs, name, **values)


@pytest.mark.parity
def test_a_run_goes_on_without_a_shard_counts_it_and_is_the_same_at_another_layout_and_after_a_resume(
    damaged, tmp_path
):
    said = run("pretrain", command(damaged, tmp_path, "two"), 2)
    assert "shard-000001.tar" in said[0] and "WARNING" in said[0]
    run("pretrain", command(damaged, tmp_path, "one", **{"train.stop_at": 4}), 1)
    run("pretrain", command(damaged, tmp_path, "one", **{"train.micro_batch_size": 4}), 1)
    two, one = (metrics(tmp_path / name, "data/") for name in ("two", "one"))
    assert [line["data/digest"] for line in two] == [line["data/digest"] for line in one]
    assert sum(line["data/lost_samples"] for line in two) > 0 and two[-1]["data/bad_shards"] == 1
    assert [line["data/lost_samples"] for line in two] == [line["data/lost_samples"] for line in one]
    losses = [[line["train/loss"] for line in metrics(tmp_path / name)] for name in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    saved = json.loads((tmp_path / "one" / "checkpoints" / "step-00000008" / "trainer.json").read_text())
    assert [entry["shard"] for entry in saved["bad_shards"]] == ["shard-000001.tar"]


@pytest.mark.parity
def test_one_more_ends_every_rank_with_2_and_one_line(damaged, tmp_path):
    (damaged / "train" / "shard-000003.tar").write_bytes(b"")
    ranks = start("pretrain", command(damaged, tmp_path, "none"), 2)
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert all("data.max_bad_shards" in text and "Traceback" not in text for text in said), said
