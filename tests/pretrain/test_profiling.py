"""A profile shows what the steps did, changes no number, costs nothing where there is none, and never ends a run."""

from __future__ import annotations

import gzip
import json
import timeit
from pathlib import Path

import pytest
import torch

from data.errors import InputError
from pretrain.loop.profiling import OFF, ProfileOptions, Profiler, profile_options, profiler_for
from pretrain.watching.rank_log import log_path
from tests.distributed.launch import ROOT, run
from tests.pretrain.test_training_run import arguments, metrics, stored_state

LABELS = ("waiting for data", "train_step", "agreement")
WIRED = "profile" in (ROOT / "pretrain" / "train.py").read_text()


def train(profiler, steps: int) -> list[torch.Tensor]:
    """A loop as training's: what is recorded of it is known."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.GELU(), torch.nn.Linear(96, 48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        profiler.mark(LABELS[0])
        x = torch.randn(16, 48)
        profiler.mark(LABELS[1])
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        profiler.mark(LABELS[2])
        torch.ones(1).add_(1)
        profiler.step()
    profiler.close()
    return [p.detach().clone() for p in model.parameters()]


def trace(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> tuple[Path, list[str], list[torch.Tensor]]:
    folder, said = tmp_path_factory.mktemp("run"), []
    options = ProfileOptions(steps=3, warmup=2, wait=4, memory=True, flops=True, stacks=True)
    weights = train(Profiler(folder, 0, 100, options, said.append), 15)
    return folder, said, weights


def test_exactly_the_chosen_steps_are_recorded_with_labels_and_shapes(profiled):
    folder = profiled[0] / "profile" / "step-00000107"  # behind 100 steps, 4 that are left out and 2 of warm-up
    assert sorted(p.name for p in folder.iterdir()) == ["rank-00000.json.gz", "top.txt"]
    events = [e for e in trace(folder / "rank-00000.json.gz") if e.get("ph") == "X"]
    by_name: dict[str, list[dict]] = {}
    for event in events:
        by_name.setdefault(event["name"], []).append(event)
    for label in LABELS:
        spans = [e for e in by_name[label] if e.get("cat") == "user_annotation"]
        assert len(spans) == 3 and all(e["dur"] > 0 for e in spans)
    steps = [e for name in by_name if name.startswith("ProfilerStep#") for e in by_name[name]]
    assert len(steps) == 3
    for event in (e for label in LABELS for e in by_name[label]):
        assert sum(s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"] for s in steps) == 1
    assert len(by_name["Optimizer.step#AdamW.step"]) == 3
    products = [e for e in by_name["aten::addmm"] if [16, 48] in e["args"]["Input Dims"]]
    assert len(products) == 3
    inside = by_name[LABELS[1]]
    assert all(any(s["ts"] <= e["ts"] <= s["ts"] + s["dur"] for s in inside) for e in by_name["aten::addmm"])
    assert any("test_profiling.py" in e["name"] for e in events), "stacks were asked for"


def test_the_table_divides_the_step_among_labels_and_lists_operations(profiled):
    folder, said, _ = profiled
    text = (folder / "profile" / "step-00000107" / "top.txt").read_text()
    assert said[0] == text and "perfetto" in said[1] and len(said) == 2
    head, _, *rest = text.splitlines()
    assert head.startswith("steps 107 to 109 of rank 0: ")
    shares = {line[:26].strip(): float(line.split()[-1].rstrip("%")) for line in rest[:4]}
    assert list(shares) == [*LABELS, "(between them)"]
    assert sum(shares.values()) == pytest.approx(100, abs=3) and shares["train_step"] > 30
    for words in ("aten::addmm", "Self CPU", "MFLOPs" if "MFLOPs" in text else "FLOPs", "CPU Mem"):
        assert words in text
    assert "ProfilerStep" not in text


def test_no_number_changes(profiled):
    for a, b in zip(profiled[2], train(OFF, 15)):
        assert torch.equal(a, b)


def test_without_a_profile_a_mark_costs_next_to_nothing(tmp_path):
    over = Profiler(tmp_path, 0, 0, ProfileOptions(wait=100))
    for mark in (OFF.mark, over.mark):  # switched off, and before it begins
        seconds = min(timeit.repeat(lambda mark=mark: mark("train_step"), number=20_000, repeat=5)) / 20_000
        assert seconds < 2e-6


def test_only_the_chosen_ranks_have_one(tmp_path):
    chosen = profile_options("ranks=0+2-3,steps=1,warmup=1")
    made = [profiler_for(chosen, tmp_path, rank, 0, print) for rank in range(5)]
    assert [p is not OFF for p in made] == [True, False, True, True, False]
    assert profiler_for(None, tmp_path, 0, 0, print) is OFF
    for p in made:
        p.close()
    train(profiler_for(profile_options("ranks=all,steps=1,wait=0"), tmp_path, 3, 0, print), 4)
    folder = tmp_path / "profile" / "step-00000003"
    assert sorted(p.name for p in folder.iterdir()) == ["rank-00003.json.gz", "top-rank-00003.txt"]
    assert any("Input Dims" in e.get("args", {}) for e in trace(folder / "rank-00003.json.gz"))


def test_a_run_that_ends_too_early_leaves_nothing_half_written(tmp_path):
    said: list[str] = []
    for steps in (0, 3, 6):
        train(Profiler(tmp_path, 0, 0, ProfileOptions(wait=2, warmup=2, steps=3), said.append), steps)
    assert said == ["profile: the run ended before step 7: nothing was written"] * 3
    assert not list(tmp_path.rglob("*.*"))


def test_a_disk_that_takes_no_profile_does_not_end_the_run(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    said: list[str] = []
    train(Profiler(tmp_path, 0, 0, ProfileOptions(wait=0, warmup=1, steps=1), said.append), 6)
    assert len(said) == 1 and said[0].startswith("WARNING: the profile was not written")


@pytest.mark.parametrize("text", ["steps=0", "warmup=0", "steps=x", "ranks=", "ranks=a", "memory=1", "speed", "steps"])
def test_bad_options_are_one_line(text):
    with pytest.raises(InputError, match="--profile"):
        profile_options(text)


def test_options_are_read():
    assert profile_options("") == ProfileOptions()
    read = profile_options("steps=5,warmup=1,wait=0,ranks=0+3-5,stacks,memory,flops")
    assert read == ProfileOptions(5, 1, 0, "0,3-5", True, True, True)


@pytest.mark.skipif(not WIRED, reason="train has no --profile")
@pytest.mark.parity
def test_a_profiled_run_ends_in_the_same_bits(corpus, tmp_path):
    sizes = {"train.steps": 16, "train.validate_every": 8, "train.checkpoint_every": 16}
    run("pretrain", arguments(corpus, tmp_path, "plain", **sizes), 2)
    said = run("pretrain", [*arguments(corpus, tmp_path, "profiled", **sizes), "--profile", "steps=3,ranks=all"], 2)
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "profiled")
    assert metrics(tmp_path / "plain", "val/") == metrics(tmp_path / "profiled", "val/")
    plain, profiled = stored_state(tmp_path / "plain"), stored_state(tmp_path / "profiled")
    assert not [name for name in plain if not torch.equal(plain[name], profiled[name])]
    folder = tmp_path / "profiled" / "profile" / "step-00000005"
    names = {e["name"] for rank in (0, 1) for e in trace(folder / f"rank-{rank:05d}.json.gz")}
    assert {"waiting for data", "counting tokens", "forward, backward, update", "agreeing"} <= names
    assert "steps 5 to 7 of rank 0" in log_path(tmp_path / "profiled", 0).read_text()
    assert "profiler_start" not in "".join(said), "the recorder's own words"
