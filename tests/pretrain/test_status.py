"""`status` says how a run is from what lies in its folder, whole or damaged, and asks for nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import InputError
from parallel.checkpoint import complete_checkpoints
from pretrain.status.command import look, status
from pretrain.status.display import screen, table
from pretrain.status.records import Job, holder, queue, read_records
from pretrain.status.report import describe
from tests.distributed.launch import ROOT, environment, run
from tests.pretrain.run_folders import NOW, RunFolder
from tests.pretrain.test_training_run import arguments

STEPS = 12


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A real run of one process, at its end."""
    runs = tmp_path_factory.mktemp("runs")
    every = {"train.validate_every": 6, "train.checkpoint_every": 5, "health.beat_seconds": 1}
    rate = {"optimizer.warmup_steps": 2, "optimizer.decay_steps": 2}
    run("pretrain", arguments(corpus, runs, "small", **{"train.steps": STEPS}, **every, **rate), 1)
    return runs / "small"


def report(folder: Path, jobs=None) -> dict:
    found = describe(read_records(folder, NOW), jobs)
    json.dumps(found, allow_nan=False)  # whatever it found, it can be written down
    assert screen(found, colours=True) and table([found], colours=False)
    return found


def test_a_run_that_reached_its_end_is_described_by_what_it_wrote(trained, tmp_path):
    assert status(str(trained), json_file=str(tmp_path / "status.json")) == 0
    found = json.loads((tmp_path / "status.json").read_text())
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    bounds = [line for line in lines if "val/nelbo" in line]
    newest = complete_checkpoints(trained / "checkpoints")[-1]
    assert found["state"] == "finished" and found["step"] == STEPS and found["tokens"] == STEPS * 8 * 32
    assert found["loss"]["steps"] == 6 and found["loss"]["loss"] == pytest.approx(statistics.fmean(losses[6:]))
    assert found["loss"]["change"] == pytest.approx(statistics.fmean(losses[6:]) - statistics.fmean(losses[:6]))
    assert found["validation"]["nelbo"] == bounds[-1]["val/nelbo"] and found["validation"]["before"]["step"] == 6
    assert found["checkpoint"]["path"] == str(newest) and found["checkpoint"]["steps_since"] == 0
    assert found["checkpoint"]["bytes"] == sum(file.stat().st_size for file in newest.iterdir())
    assert found["speed"]["step_seconds"] > 0 and found["skipped_steps"] == 0 and not found["roll_backs"]


def test_the_next_checkpoint_is_as_large_as_expected_before_there_is_one(trained, tmp_path):
    young = tmp_path / "young"
    shutil.copytree(trained, young)
    stored = report(young)["disk"]["next_checkpoint"]
    shutil.rmtree(young / "checkpoints")
    expected = report(young)["disk"]["next_checkpoint"]
    assert expected < stored < 1.5 * expected  # headers of a hundred small tensors


def test_it_starts_without_torch_in_well_under_a_second(trained):
    code = (
        "import sys, time\n"
        "from pretrain.status.command import status\n"
        f"status({str(trained)!r})\n"
        "print(time.process_time())\n"
        "print([name for name in ('torch', 'numpy', 'mlflow', 'jsonargparse', 'rich') if name in sys.modules])\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        *_, took, heavy = done.stdout.splitlines()
        assert heavy == "[]"
        seconds.append(float(took))
    assert min(seconds) < 0.5


def test_a_spool_of_a_million_lines_is_read_from_its_end(tmp_path):
    folder = RunFolder(tmp_path / "long", steps=2_000_000, checkpoint_every=0, validate_every=1000)
    with open(folder.path / "metrics.jsonl", "w") as file:
        for step in range(1, 1_000_001):
            at = NOW - (1_000_000 - step) * 2
            file.write(
                f'{{"step": {step}, "time": {at}, "train/loss": 3.5, "perf/step_time": 2.0, "train/tokens": 1}}\n'
            )
            if step == 900_000:
                file.write(f'{{"step": {step}, "time": {at}, "val/nelbo": 3.25, "val/nelbo_se": 0.5}}\n')
    folder.rank(0, world=1)
    began = time.process_time()  # of this process: the machine may be busy
    found = report(folder.path)
    assert time.process_time() - began < 0.5
    assert found["step"] == 1_000_000 and found["validation"]["step"] == 900_000
    assert found["left"]["step_seconds"] == pytest.approx(2.0)


CASES = {
    "running": lambda f: (f.start(600), [f.rank(r, age=r) for r in range(4)]),
    "running: a long save is no stall": lambda f: (
        f.start(9000),
        [f.rank(r, phase="save", idle=1000) for r in range(4)],
    ),
    "running: a fault of another start is history": lambda f: (
        f.start(9000, launch="a"),
        f.fault(8000, launch="a"),
        f.start(600, attempt=2, launch="b"),
        [f.rank(r, launch="b") for r in range(4)],
    ),
    "running: a launch name that came again, its old fault and end are history": lambda f: (
        f.start(9000),
        f.fault(8000),
        f.end(7990, 76),
        f.start(600, attempt=2),
        [f.rank(r) for r in range(4)],
    ),
    "stalled: rank 2 on n1": lambda f: (
        f.start(9000),
        [f.rank(r, idle=400, collectives={"world": 9 if r == 2 else 10}) for r in range(4)],
    ),
    "ended with a fault: rank 3 on n1 stalled in phase step, step 7": lambda f: (
        f.start(600),
        f.fault(20),
        [f.rank(r) for r in range(4)],
    ),
    "ended with a fault: exit code 1": lambda f: (f.start(600), f.end(100, 1, decision="restart now")),
    "stopped: ended 1 min 40 s ago: asked to leave": lambda f: (f.start(600), f.end(100, 75)),
    "stopped: nothing runs": lambda f: (f.start(9000), [f.rank(r, age=3600) for r in range(4)]),
    "finished": lambda f: (f.start(9000), f.checkpoint(20), f.end(100, 0)),
    "finished: the checkpoint of step 20": lambda f: (f.start(9000), f.checkpoint(20), f.rank(0, world=1, phase="end")),
    "never started": lambda f: None,
}


@pytest.mark.parametrize("expected", CASES)
def test_the_state_of_a_run(tmp_path, expected):
    folder = RunFolder(tmp_path / "run", steps=20)
    CASES[expected](folder)
    found = report(folder.path)
    kind, _, why = expected.partition(": ")
    assert found["state"] == kind, found["why"]
    if kind not in ("running",):
        assert why in found["why"]
    if kind in ("stalled", "ended with a fault"):
        assert found["warnings"][0].startswith(kind), "what matters most comes first"


def test_the_ranks_of_an_earlier_start_are_of_no_account(tmp_path):
    """They were more, and their records are nearly as young as the new start."""
    folder = RunFolder(tmp_path / "run", steps=20)
    folder.start(9000, launch="a")
    folder.start(600, attempt=2, launch="b")
    for rank in range(4):
        folder.rank(rank, launch="b" if rank < 2 else "a", age=1 if rank < 2 else 605, world=2 if rank < 2 else 4)
    found = report(folder.path)
    assert found["state"] == "running" and found["ranks"]["world"] == 2 and not found["warnings"]


@pytest.mark.parametrize(
    "queued, silent, expected",
    [
        ("PENDING", None, "waiting in the queue"),
        ("PENDING", 3600, "waiting in the queue"),
        ("RUNNING", 3600, "stalled"),
        ("RUNNING", 2, "running"),
    ],
)
def test_what_slurm_knows_counts(tmp_path, queued, silent, expected):
    folder = RunFolder(tmp_path / "run", steps=20)
    folder.start(9000, job="812")
    if silent:
        for rank in range(4):
            folder.rank(rank, age=silent)
    found = report(folder.path, {"812": Job("812", queued, "Priority", "N/A", "n[0-1]")})
    assert found["state"] == expected and (expected == "running" or "812" in found["why"])


def test_slurm_that_is_absent_fails_or_hangs_delays_nothing_for_long(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue(["812"]) is None
    program = tmp_path / "squeue"
    for script, bound, answer in (("exit 1", 2, None), ("exec /bin/sleep 60", 8, None), ("exit 0", 2, {})):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        began = time.monotonic()
        assert queue(["812"]) == answer
        assert time.monotonic() - began < bound
    assert queue([]) == {} and queue(["8; rm -rf /"]) == {}


def test_a_submitted_run_names_its_job_before_its_first_start(tmp_path):
    folder = RunFolder(tmp_path / "run", steps=20)
    packed = folder.path / "submitted" / "2026-hash"
    packed.mkdir(parents=True)
    (folder.path / "config.yaml").rename(packed / "config.yaml")
    (packed / "job").write_text("4711\n")
    records = read_records(folder.path, NOW)
    assert records.jobs == ["4711"] and records.get("train", "steps", 0) == 20
    assert (
        report(folder.path, {"4711": Job("4711", "PENDING", "Resources", "N/A", "")})["state"] == "waiting in the queue"
    )


def test_a_process_that_holds_the_folder_is_found_without_touching_its_lock(tmp_path):
    lock = tmp_path / ".lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom data.durable import take_lock\n"
        f"take_lock(Path({str(lock)!r})); print('held', flush=True); time.sleep(60)"
    )
    assert holder(lock) is None
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        assert holder(lock) == process.pid
    finally:
        process.kill()
        process.communicate()
    assert holder(lock) is None


def test_the_time_left_counts_what_comes_between_steps_and_no_restart(tmp_path):
    """Steps of 2 s, a validation of 10 s after every 10th, a save of 30 s after every 25th; an hour's pause at a restart."""
    folder = RunFolder(tmp_path / "run", steps=1000, validate_every=10, checkpoint_every=25)
    at, lines = NOW - 100_000, []
    folder.metrics([{"step": 1, "time": at, "train/loss": 4.0}])
    for step in range(1, 181):
        if step == 101:
            at += 3600.0
        at += 2.0
        lines.append({"step": step, "time": at, "train/loss": 4.0})
        if step % 10 == 0:
            at += 10.0
            lines.append({"step": step, "time": at, "val/nelbo": 4.0})
        if step % 25 == 0:
            at += 30.0
    (folder.path / "metrics.jsonl").unlink()
    folder.metrics([{**line, "time": line["time"] + NOW - at} for line in lines])
    folder.start(NOW - (lines[0]["time"] + NOW - at), launch="a")
    restart = next(line["time"] for line in lines if line["step"] == 101) + NOW - at
    folder.start(NOW - restart + 10, attempt=2, step=100)
    for rank in range(4):
        folder.rank(rank)
    left = report(folder.path)["left"]
    # From step 101 to 180: validations behind 110, 120, ... 170, saves behind 125, 150, 175.
    expected = (79 * 2 + 7 * 10 + 3 * 30) / 79
    assert left["step_seconds"] == pytest.approx(expected)
    assert left["seconds"] == pytest.approx(820 * expected)
    assert "the last 79 steps" in left["assumes"] and "7 validations and 3 saves included" in left["assumes"]
    assert left["ends_at"] == NOW + left["seconds"]


def test_a_trend_is_a_mean_against_the_mean_before_with_its_error(tmp_path):
    draw = random.Random(0)
    folder = RunFolder(tmp_path / "run", steps=1000)
    losses = [draw.gauss(5, 0.5) for _ in range(100)] + [draw.gauss(4, 0.5) for _ in range(100)]
    lines = [{"step": i + 1, "time": NOW - 500 + i, "train/loss": loss} for i, loss in enumerate(losses)]
    lines[150]["train/loss"] = "nan"
    lines[160] |= {"train/loss": 0.0, "train/num_masked_tokens": 0.0}  # nothing was masked: no loss
    folder.metrics(lines)
    found = report(folder.path)
    finite = [loss for i, loss in enumerate(losses) if i not in (150, 160)]
    new, old = finite[-99:], finite[-198:-99]
    assert found["loss"]["loss"] == pytest.approx(statistics.fmean(new)) and found["loss"]["broken"] == 1
    assert found["loss"]["change"] == pytest.approx(statistics.fmean(new) - statistics.fmean(old))
    error = (statistics.variance(new) / 99 + statistics.variance(old) / 99) ** 0.5
    assert found["loss"]["error"] == pytest.approx(error)
    assert "falls" in screen(found, False) and any("not finite" in w for w in found["warnings"])


def test_outliers_do_not_move_the_speed(tmp_path):
    folder = RunFolder(tmp_path / "run", steps=1000)
    folder.steps(1, 50, end=400, seconds=3.0)
    folder.start(300, attempt=2, step=50)
    folder.steps(51, 150, end=1, seconds=2.0)
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    for slow in (51, 90, 149):
        line = json.loads(lines[slow])
        lines[slow] = json.dumps(line | {"perf/step_time": 500.0, "perf/tokens_per_second": 0.5})
    (folder.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert report(folder.path)["speed"] == {
        "tokens_per_second": 128.0,
        "step_seconds": 2.0,
        "mfu": None,
        "steps": 99,
    }


def test_warnings_name_what_a_person_must_look_at(tmp_path):
    folder = RunFolder(tmp_path / "run", steps=1000, checkpoint_every=100, max_skipped=10)
    for attempt in (1, 2, 3):
        folder.start(9000 - attempt, attempt=attempt, launch=f"l{attempt}", step=100)
    for rank in (0, 1, 3):
        folder.rank(rank, launch="l3", step=400, age=200 if rank == 3 else 1)
    folder.steps(101, 400, end=1)
    folder.metrics(
        [{"step": 401, "time": NOW, "train/loss": "inf", "train/skipped_in_a_row": 4, "train/applied_steps": 380}]
    )
    folder.checkpoint(100, size=1)
    with open(folder.path / "checkpoints/step-00000100/__0_0.distcp", "r+b") as file:
        file.truncate(1 << 43)  # more than any disk of a test has left
    (folder.path / "events.jsonl").write_text('{"what": "rolled_back", "step": 90, "last": 110, "time": 1}\n')
    found = report(folder.path)
    said = "\n".join(found["warnings"])
    for words in (
        "not heard of any more: rank 3",
        "the next checkpoint needs",
        "the last 4 updates were skipped",
        "no checkpoint was completed for 301 steps (train.checkpoint_every 100)",
        "rolled back 1 times: step 110 to 90",
        "the last 3 starts all began at step 100",
    ):
        assert words in said
    assert found["skipped_steps"] == 21
    assert found["ranks"]["never_heard"] == [2] and found["ranks"]["heard"] == 2


def test_points_that_mlflow_lacks_are_counted_or_estimated(tmp_path):
    folder = RunFolder(tmp_path / "run", steps=1000)
    folder.config.tracking.uri = ""
    from pretrain.load_config import save_config

    save_config(folder.config, folder.path / "config.yaml")
    folder.steps(1, 300, end=1)
    points = 5  # of each line of RunFolder.steps
    (folder.path / "mlflow.json").write_text(json.dumps({"run_id": "x", "shipped": {"train": 290, "perf": 290}}))
    found = report(folder.path)["mlflow"]
    assert found["points"] == 10 * points and found["exact"] and found["shipped_step"] == 290
    names = ("train/loss", "train/applied_steps", "train/tokens", "perf/step_time", "perf/tokens_per_second")
    (folder.path / "mlflow.json").write_text(json.dumps({"run_id": "x", "shipped": dict.fromkeys(names, 300)}))
    assert report(folder.path)["mlflow"]["points"] == 0
    folder.steps(301, 20_000, end=1)
    found = report(folder.path)
    assert not found["mlflow"]["exact"] and found["mlflow"]["points"] == pytest.approx(19_700 * points, rel=0.01)
    assert "about 98,500 points" in screen(found, False)


def test_files_that_are_cut_damaged_or_gone_are_named_and_end_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run", steps=20)
    folder.start(600)
    folder.steps(1, 10, end=1)
    folder.checkpoint(5)
    for rank in range(4):
        folder.rank(rank)
    for name, words in (
        ("health/rank-00002.json", "the records of 1 ranks"),
        ("health/attempts.jsonl", "attempts.jsonl: 1 lines"),
        ("health/fault-77-0-0.json", "fault-77-0-0.json"),
        ("checkpoints/step-00000005/trainer.json", "trainer.json"),
        ("config.yaml", "the defaults are assumed"),
    ):
        path = folder.path / name
        content = path.read_bytes().rstrip() if path.exists() else b'{"kind": "stalled"}'
        path.write_bytes(b"" if name == "config.yaml" else content[: len(content) // 2])
        assert any(words in missing for missing in report(folder.path)["missing"])
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(b"\0" * 100 + b'\n{"step": 11, "time": 1, "train/')
    found = report(folder.path)
    assert found["step"] == 10 and any("metrics.jsonl: 1 lines" in missing for missing in found["missing"])
    (folder.path / "metrics.jsonl").unlink()
    assert any("metrics.jsonl (No such file" in missing for missing in report(folder.path)["missing"])


def test_no_damage_of_any_file_makes_it_fail(trained, tmp_path):
    """Random cuts, zeros, flipped bytes and values of other types, two at a time."""
    whole = tmp_path / "whole"
    shutil.copytree(trained, whole)
    folder = RunFolder(tmp_path / "made", steps=20)
    folder.start(600)
    folder.fault(700)
    folder.end(100, 76)
    folder.rank(0)
    shutil.copytree(folder.path / "health", whole / "health", dirs_exist_ok=True)
    (whole / "events.jsonl").write_text('{"what": "rolled_back", "step": 3, "last": 5, "time": 1.0}\n')
    (whole / "mlflow.json").write_text('{"run_id": "x", "shipped": {"train/loss": 3}}')
    names = [p.relative_to(whole) for p in whole.rglob("*") if p.suffix in (".json", ".jsonl", ".yaml")]
    draw = random.Random(1)
    for case in range(150):
        damaged = tmp_path / f"damaged-{case}"
        shutil.copytree(whole, damaged, ignore=shutil.ignore_patterns("*.distcp"))
        for name in draw.sample(names, 2):
            content = bytearray((damaged / name).read_bytes())
            kind = draw.randrange(4)
            if kind == 0:
                content = content[: draw.randrange(len(content))]
            elif kind == 1:
                at = draw.randrange(len(content))
                content[at : at + 64] = bytes(64)
            elif kind == 2:
                for _ in range(5):
                    content[draw.randrange(len(content))] = draw.randrange(256)
            else:
                values = [b'"text"', b"null", b"[]", b"-1", b"1e999", b"{}", b"true"]
                parts = bytes(content).split(b": ")
                for _ in range(3):
                    at = draw.randrange(len(parts))
                    tail = parts[at].partition(b",")
                    parts[at] = draw.choice(values) + tail[1] + tail[2]
                content = bytearray(b": ".join(parts))
            (damaged / name).write_bytes(content)
        try:
            report(damaged)
        except Exception as error:
            raise AssertionError(f"case {case}: {damaged}") from error
        shutil.rmtree(damaged)


def test_several_runs_are_a_table_of_one_line_each(trained, tmp_path, capsys):
    other = RunFolder(trained.parent / "other", steps=20)
    other.steps(1, 5, end=10)
    (trained.parent / "no-run").mkdir(exist_ok=True)
    assert [one["run"] for one in look(trained.parent)] == ["other", "small"]
    assert status(str(trained.parent)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("run ") and "finished" in lines[2]
    assert "\x1b" not in "".join(lines)
    shutil.rmtree(other.path)


def test_it_looks_again_until_it_is_interrupted(trained):
    code = f"from pretrain.status.command import status; raise SystemExit(status({str(trained)!r}, watch=0.1))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    looks = 0
    for line in process.stdout:
        looks += "Ctrl-C ends" in line
        if looks == 3:
            process.send_signal(signal.SIGINT)
            break
    said = process.communicate(timeout=20)
    assert process.returncode == 0 and said[1] == ""


def test_mistakes_are_one_line(tmp_path, trained):
    for path, options, words in (
        (tmp_path / "nowhere", {}, "cannot be read"),
        (tmp_path, {}, "is no run folder and holds none"),
        (trained, {"watch": -1.0}, "--watch"),
        (trained, {"json_file": str(tmp_path / "no" / "x.json")}, "--json"),
    ):
        with pytest.raises(InputError, match=words) as error:
            status(str(path), **options)
        assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []
