"""Real training on a real Slurm, submitted as a person would: it ends in the same bits however often it was asked to leave."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pretrain.load_config import load_config
from pretrain.submission.package import ROOT, code_files, package
from tests.pretrain.test_training_run import arguments, metrics, stored_state
from tests.slurm.jobs import Job
from tests.slurm.lab import Lab

pytestmark = pytest.mark.timeout(1500)  # its turn at the lab, and five starts of training on what may be two slow cores
STEPS = 100
RUN = {
    "train.steps": STEPS,
    "train.checkpoint_every": 1000,
    "train.validate_every": 50,
    "health.stall_seconds": 60,
    "optimizer.decay_steps": 10,
}
SUBMIT = "import sys\nfrom pretrain.submission.submit import submit\nsys.exit(submit(sys.argv[1:]))"


def submit(checkout: Path, lab: Lab, words: list[str]) -> subprocess.CompletedProcess:
    """`submit` from a checkout on the lab, two nodes with one rank each, on CPUs."""
    command = [sys.executable, "-c", SUBMIT, *words, "--nodes=2", "--gpus-per-node=1", "--cpu", "--time=10"]
    environ = lab.environment(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    environ.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=checkout, env=environ, text=True, capture_output=True, timeout=60)


def job_of(lab: Lab, done: subprocess.CompletedProcess, run: Path) -> Job:
    assert done.returncode == 0, done.stderr
    number = done.stdout.split("\njob ")[-1].split(";")[0]
    return Job(lab, number, run / "logs" / f"slurm-{number}.out")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the code that a test may break."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in code_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def runs(lab, corpus, checkout, tmp_path_factory) -> tuple[Path, list[Job]]:
    """`straight`: never asked to leave. `asked`: asked three times, the checkout broken since it was submitted."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for name in ("straight", "asked"):
        words = arguments(corpus, folder, name, **RUN)[1:]
        jobs.append(job_of(lab, submit(checkout, lab, words), folder / name))
    (checkout / "pretrain" / "train.py").write_text("raise SystemExit(9)\n")
    (checkout / "slurm" / "job.sh").write_text("exit 9\n")
    for restart in range(3):
        started = f"start {restart}"
        goal = 15 * (restart + 1)
        jobs[1].wait(90, lambda goal=goal: steps_taken(folder / "asked") >= goal, f"{goal} steps in {started}")
        lab.ask("scancel", "--batch", "--signal=USR1", jobs[1].number)
        jobs[1].wait(60, lambda n=restart: jobs[1].field("Restarts") == str(n + 1), f"the end of {started}")
    for job in jobs:
        assert job.finish(150) == "COMPLETED", job.said()
    return folder, jobs


def steps_taken(run: Path) -> int:
    return len(metrics(run)) if (run / "metrics.jsonl").exists() else 0


def test_two_nodes_train_and_the_job_is_done(runs):
    folder, (straight, _) = runs
    assert straight.field("Restarts") == "0" and straight.exit_code == 0
    assert [line["step"] for line in metrics(folder / "straight")] == list(range(1, STEPS + 1))


@pytest.mark.fault(
    "the time limit is near (three times)",
    happens="the ranks save at a step boundary and leave; the job requeues itself and goes on",
    lost="no step, no bit",
)
def test_asked_three_times_to_leave_no_step_is_lost_or_repeated_and_every_bit_is_the_same(runs, measured):
    folder, (_, asked) = runs
    assert asked.field("Restarts") == "3"
    assert metrics(folder / "asked") == metrics(folder / "straight")
    assert metrics(folder / "asked", "val/") == metrics(folder / "straight", "val/")
    straight, other = stored_state(folder / "straight"), stored_state(folder / "asked")
    assert straight and not [name for name in straight if not torch.equal(straight[name], other[name])]
    ends = [json.loads(line) for line in (folder / "asked" / "health" / "attempts.jsonl").read_text().splitlines()]
    assert [line["code"] for line in ends if "ended" in line] == [75, 75, 75, 0]
    measured("requeues", "3")


def test_a_requeue_runs_what_was_submitted_whatever_has_become_of_the_checkout(runs, checkout):
    _, (_, asked) = runs
    assert (checkout / "pretrain" / "train.py").read_text().startswith("raise SystemExit(9)")
    assert asked.field("Restarts") == "3" and asked.exit_code == 0


@pytest.mark.fault(
    "SIGKILL of one rank of a Slurm job",
    happens="its watch names it, all ranks end with 76, the job requeues itself and goes on",
    lost="the steps since the newest checkpoint",
)
def test_a_rank_that_is_killed_is_named_and_the_job_goes_on_from_the_newest_checkpoint(lab, corpus, tmp_path, measured):
    words = arguments(corpus, tmp_path, "killed", **RUN | {"train.steps": 2000, "train.checkpoint_every": 20})[1:]
    run = tmp_path / "killed"
    job = job_of(lab, submit(ROOT, lab, words), run)
    job.wait(120, lambda: steps_taken(run) > 30, "a checkpoint and some steps")
    victim = json.loads((run / "health" / "rank-00001.json").read_text())["pid"]
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    job.wait(60, lambda: job.field("Restarts") == "1", "a requeue")
    measured("from the kill to the requeue", f"{time.monotonic() - began:.0f} s")
    job.wait(120, lambda: "resumed" in job.said(), "the second start")
    lab.ask("scancel", job.number)
    assert job.finish(60) == "CANCELLED"
    ends = [json.loads(line) for line in (run / "health" / "attempts.jsonl").read_text().splitlines()]
    first, last = [line for line in ends if "ended" in line]
    assert (first["code"], first["fault"]["kind"], first["fault"]["rank"], first["decision"]) == (
        76,
        "died",
        1,
        "restart",
    )
    assert first["step"] >= 20 and f"resumed {run} at step {first['step']}" in job.said()
    assert (last["code"], last["decision"]) == (143, "stop")


def test_a_failed_cell_of_a_study_stops_no_other(lab, corpus, tmp_path):
    """Three cells over code that is kept beside the list; the second one's data is nowhere, the third is asked to leave once."""
    packed = package(load_config([]), tmp_path / "study", "", {})
    (tmp_path / "cell.yaml").write_text("run: {name: cell}\n")
    words = {"train.steps": 60, "train.validate_every": 0, "health.stall_seconds": 60}
    lines = []
    for name, data in (("first", corpus), ("bad one", tmp_path / "nowhere"), ("third", corpus)):
        name = name.replace(" ", "-")
        lines.append(shlex.join([str(tmp_path / "cell.yaml"), *arguments(data, tmp_path / "a b", name, **words)[1:]]))
    cells = packed / "cells.txt"
    cells.write_text("\n".join(lines) + "\n")
    command = [
        "sbatch",
        "--parsable",
        "--array=1-3",
        "--gpus-per-node=0",
        "--time=10",
        f"--output={tmp_path}/cell-%a.out",
    ]
    environ = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    number = lab.ask(*command, str(ROOT / "slurm" / "study.sbatch"), str(cells), sys.executable, **environ)
    tasks = [Job(lab, f"{number}_{task}", tmp_path / f"cell-{task}.out") for task in (1, 2, 3)]
    tasks[2].wait(120, lambda: steps_taken(tmp_path / "a b" / "third") > 3, "a few steps")
    lab.ask("scancel", "--batch", "--signal=USR1", tasks[2].number)
    assert [task.finish(240) for task in tasks] == ["COMPLETED", "FAILED", "COMPLETED"], tasks[0].said()
    assert [task.exit_code for task in tasks] == [0, 2, 0]
    assert [task.field("Restarts") for task in tasks] == ["0", "0", "1"]
    assert "no such folder" in tasks[1].said()
    for name in ("first", "third"):
        assert len(metrics(tmp_path / "a b" / name)) == 60


def test_a_run_that_has_a_job_is_not_submitted_again_unless_it_is_said(lab, corpus, tmp_path):
    runs = tmp_path / "a b;'$(touch pwned)'"
    words = [*arguments(corpus, runs, "twice", **RUN)[1:], "--sbatch-args=--begin=now+1hour"]
    first = submit(ROOT, lab, words)
    assert first.returncode == 0, first.stderr
    job = job_of(lab, first, runs / "twice")
    before = sorted((runs / "twice" / "submitted").iterdir())
    again = submit(ROOT, lab, words)
    assert again.returncode != 0 and f"has a job already: {job.number} (pending)" in again.stderr
    assert sorted((runs / "twice" / "submitted").iterdir()) == before
    chained = submit(ROOT, lab, [*words, "--chain"])
    assert chained.returncode == 0, chained.stderr
    behind = job_of(lab, chained, runs / "twice")
    assert behind.field("Dependency").startswith(f"afterany:{job.number}")
    assert len(list((runs / "twice" / "submitted").iterdir())) == 2  # the first job keeps its own
    for one in (behind, job):
        lab.ask("scancel", one.number)
    assert not os.path.exists("pwned")


def test_what_slurm_refuses_is_one_line_and_leaves_nothing(lab, corpus, tmp_path):
    done = submit(ROOT, lab, [*arguments(corpus, tmp_path / "runs", "one")[1:], "--partition=nosuch"])
    assert done.returncode != 0 and "sbatch: " in done.stderr and "partition" in done.stderr
    assert not (tmp_path / "runs" / "one").exists()
