"""A whole study on a real Slurm: an array with a task a cell, one asked to leave, one that cannot run; then what follows it."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.study.design.plan import Planned, open_study
from tests.pretrain.study.studies import write_study
from tests.slurm.jobs import Job
from tests.slurm.lab import ROOT, Lab

pytestmark = pytest.mark.timeout(1500)  # its turn at the lab, and five starts of training on what may be two slow cores
ENVIRON = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(lab: Lab, what: str, *words: str) -> subprocess.CompletedProcess:
    """`study run` from the repository root on the lab."""
    environ = lab.environment(**ENVIRON)
    environ.pop("PYTHONPATH", None)
    words = (sys.executable, "-m", "pretrain", "study", what, *words)
    return subprocess.run(words, cwd=ROOT, env=environ, text=True, capture_output=True, timeout=120)


def steps_taken(planned: Planned, number: int) -> int:
    spool = planned.run_folder(planned.cells[number]) / "metrics.jsonl"
    return len(spool.read_text().splitlines()) if spool.exists() else 0


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def studied(lab, corpus, tmp_path_factory) -> tuple[Path, list[Job], Job]:
    """Two budgets x two sizes. Task 2 is asked to leave once, task 3 finds a file where its run folder should be."""
    folder = tmp_path_factory.mktemp("a b")
    study = write_study(folder, corpus, budgets=[1.5e10, 3e10], sizes=["s", "m"], objectives=["masked"])
    planned_first = command(lab, "plan", str(study))
    assert planned_first.returncode == 0, planned_first.stderr
    planned = open_study(folder / "study")
    (folder / "study" / "runs").mkdir()
    planned.run_folder(planned.cells[2]).write_text("in the way")
    # All at once: while a task of a limited array waits, scancel takes its signal for undelivered and signals the next start too.
    done = command(lab, "run", str(study), "--slurm", "--cpu", "--limit", "4", "--time", "10", "--signal-seconds", "60")
    assert done.returncode == 0, done.stderr
    array, end = re.findall(r"^job (\d+)", done.stdout, re.MULTILINE)
    logs = folder / "study" / "logs"
    tasks = [Job(lab, f"{array}_{n}", logs / f"slurm-{array}-{n}.out") for n in (1, 2, 3, 4)]
    tasks[1].wait(180, lambda: steps_taken(planned, 1) > 5, "a few steps")
    lab.ask("scancel", "--batch", "--signal=USR1", tasks[1].number)
    for task in tasks:
        task.finish(400)
    last = Job(lab, end, logs / f"slurm-{end}-end.out")
    last.finish(200)
    return folder / "study", tasks, last


def test_every_cell_is_a_task_and_one_that_is_asked_to_leave_goes_on(studied):
    folder, tasks, _ = studied
    assert [task.state for task in tasks] == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"], tasks[1].said()
    assert [task.field("Restarts") for task in tasks] == ["0", "1", "0", "0"], tasks[1].said()
    planned = open_study(folder)
    for number in (0, 1, 3):
        spool = planned.run_folder(planned.cells[number]) / "metrics.jsonl"
        steps = [line["step"] for line in map(json.loads, spool.read_text().splitlines()) if "train/loss" in line]
        assert steps == list(range(1, planned.cells[number].steps + 1))


def test_what_follows_the_array_collects_with_reasons(studied):
    folder, _, last = studied
    found = rows(folder)
    assert [row["status"] for row in found] == ["done", "done", "excluded", "done"], last.said()
    assert found[2]["reason"].startswith("failed (exit code 2)") and "cannot be written" in found[2]["reason"]
    said = last.said()
    assert "3 of 4 cells have a loss" in said


def test_what_follows_the_array_fits_and_reports(studied):
    folder, _, last = studied
    assert (folder / "fit.json").exists() and (folder / "report" / "index.html").exists(), last.said()
    assert last.state == "COMPLETED"


def test_a_study_whose_job_waits_is_not_submitted_again_and_later_only_what_lacks_is(studied, lab, corpus):
    folder, _, _ = studied
    planned = open_study(folder)
    planned.run_folder(planned.cells[2]).unlink(missing_ok=True)
    options = ("--slurm", "--cpu", "--time", "10", "--signal-seconds", "60", "--sbatch-args=--begin=now+1hour")
    first = command(lab, "run", str(folder), *options)
    assert first.returncode == 0, first.stderr
    array, end = re.findall(r"^job (\d+)", first.stdout, re.MULTILINE)
    packed = Path(re.search(r"^submitted: (.*)$", first.stdout, re.MULTILINE)[1])
    try:
        lines = (packed / "cells.txt").read_text().splitlines()
        assert len(lines) == 1 and planned.cells[2].id in lines[0] and "1 cells" in first.stdout
        again = command(lab, "run", str(folder), *options)
        assert again.returncode == 2 and "has a job already" in again.stderr
    finally:
        for number in (array, end):
            lab.ask("scancel", number)


def test_what_slurm_refuses_leaves_nothing(lab, corpus, tmp_path):
    study = write_study(tmp_path, corpus, budgets=[1e10], sizes=["s"], objectives=["masked"])
    # All at once: while a task of a limited array waits, scancel takes its signal for undelivered and signals the next start too.
    done = command(lab, "run", str(study), "--slurm", "--cpu", "--time", "10", "--partition", "nosuch")
    assert done.returncode == 2 and "sbatch: " in done.stderr
    assert not (tmp_path / "study" / "submitted").exists()
