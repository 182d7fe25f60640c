"""`study run` on this machine: real cells, real ends of every kind, and nothing lost when it is stopped."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.study.command_plan import plan
from pretrain.study.command_run import run
from pretrain.study.design.plan import Planned, open_study
from pretrain.study.running.processes import CellProcess, environment
from tests.pretrain.study.studies import write_study

pytestmark = pytest.mark.timeout(900)  # real training on what may be two slow, shared cores
ROOT = Path(__file__).resolve().parents[3]
SMALL = {"budgets": [4.0e9], "sizes": ["s"], "objectives": ["masked", "autoregressive"]}
heavy = pytest.mark.parity


def rows(folder: Path) -> dict[str, dict[str, str]]:
    return {row["cell"]: row for row in csv.DictReader((folder / "results.csv").read_text().splitlines())}


def lines(planned: Planned, number: int) -> list[dict]:
    spool = planned.run_folder(planned.cells[number]) / "metrics.jsonl"
    return [json.loads(line) for line in spool.read_text().splitlines()] if spool.exists() else []


def start(study: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pretrain", "study", "run", str(study), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(condition, process: subprocess.Popen, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, (
            process.stdout.read() if process.poll() is not None else ""
        )
        time.sleep(0.05)


def ours(folder: Path) -> list[int]:
    """Processes that train a cell of this study."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path("/proc", entry, "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and b"\0train\0" in words:
            found.append(int(entry))
    return found


@pytest.fixture(scope="module")
def ran(corpus, tmp_path_factory) -> tuple[Path, str]:
    """A masked and an autoregressive cell, run at once to their ends."""
    folder = tmp_path_factory.mktemp("ran")
    study = write_study(folder, corpus, **SMALL)
    process = start(study, "--jobs", "2")
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    return folder / "study", said


def test_each_cell_has_the_loss_of_its_last_validation(ran):
    folder, said = ran
    planned = open_study(folder)
    for number, cell in enumerate(planned.cells):
        trained, last = lines(planned, number)[:-1], lines(planned, number)[-1]
        assert [line["step"] for line in trained] == list(range(1, cell.steps + 1)) and last["step"] == cell.steps
        row = rows(folder)[cell.id]
        assert (row["status"], row["reason"]) == ("done", "")
        assert float(row["loss"]) == last["val/nelbo"] < math.log(512)
        assert float(row["loss_se"]) == last["val/nelbo_se"] > 0
        assert trained[-1]["train/tokens"] == cell.D == int(row["D"]) and float(row["C"]) == cell.C
        assert f"done   {cell.id}: loss {last['val/nelbo']:.4f}" in said
    assert "2 of 2 cells have a loss" in said


def test_a_study_that_is_done_trains_nothing_again(ran, capsys):
    folder, _ = ran
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert run([str(folder)]) == 0
    assert "2 cells have their result, 0 are to run" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after
    assert run([str(folder), "--dry-run"]) == 0
    said = capsys.readouterr().out  # what was measured is what the next cells are thought to take
    assert "measured on 2 cells" in said


@heavy
@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_study_that_is_stopped_goes_on_where_it_was_and_ends_alike(ran, corpus, tmp_path, how, code):
    straight, _ = ran
    study = write_study(tmp_path, corpus, **SMALL)
    process = start(study, "--jobs", "2")
    folder = tmp_path / "study"
    until(lambda: (folder / "plan.json").exists(), process)
    planned = open_study(folder)
    until(lambda: len(lines(planned, 0)) > 20 and len(lines(planned, 1)) > 20, process)
    process.send_signal(how)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == code, said
    deadline = time.monotonic() + 60  # after -9 the cells leave by themselves
    while ours(folder):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if how != signal.SIGKILL:
        assert {row["reason"].split(":")[0] for row in rows(folder).values()} == {"cut"}
    steps = [lines(planned, number)[-1]["step"] for number in (0, 1)]
    again = start(study)
    said = again.communicate(timeout=240)[0]
    assert again.returncode == 0, said
    for number, cell in enumerate(planned.cells):
        log = (folder / "logs" / f"{cell.id}.log").read_text()
        assert f"at step {steps[number]} from step-" in log
        assert [line["step"] for line in lines(planned, number)[:-1]] == list(range(1, cell.steps + 1))
        mine, other = rows(folder)[cell.id], rows(straight)[cell.id]
        assert (mine["loss"], mine["loss_se"], mine["status"]) == (other["loss"], other["loss_se"], "done")


@heavy
def test_every_kind_of_bad_cell_is_left_out_with_its_reason_and_stops_no_other(corpus, tmp_path, capsys):
    """Five cells: one is fine, one learns at a mad rate, one's folder cannot be, one lacks tokens, one has too few steps."""
    rate = {"rule": "power", "at": 4e-3, "of": "width", "reference": 32, "exponent": 30}  # 4e6 at width 64
    study = write_study(
        tmp_path,
        corpus,
        {"train": {"grad_clip": 0.0, "max_skipped": 3}, "health": {"max_rollbacks": 1}},
        **SMALL | {"sizes": ["s", "m", "l"], "budgets": [1e10, 1e13, 2e8], "objectives": ["masked"], "min_steps": 20},
        learning_rate=rate,
    )
    planned_only = subprocess.run(
        [sys.executable, "-m", "pretrain", "study", "plan", str(study)], cwd=ROOT, capture_output=True, timeout=60
    )
    assert planned_only.returncode == 0
    folder = tmp_path / "study"
    cells = {(cell.size, cell.budget): cell for cell in open_study(folder).cells}
    blocked = folder / "runs" / cells["m", 1e10].id
    blocked.parent.mkdir()
    blocked.write_text("a file where a folder should be")
    assert run([str(folder), "--jobs", "2"]) == 0
    found = {key: rows(folder)[cell.id] for key, cell in cells.items()}
    assert found["s", 1e10]["status"] == "done"
    reasons = {key: row["reason"] for key, row in found.items() if row["status"] == "excluded"}
    assert len(reasons) == 8 and {row["status"] for row in found.values()} == {"done", "excluded"}
    assert reasons["l", 1e10].startswith("diverged")
    assert reasons["m", 1e10].startswith("failed (exit code 2)") and "cannot be written" in reasons["m", 1e10]
    assert all(reasons[size, 1e13].startswith("lacks tokens: needs") for size in "sml")
    assert all(reasons[size, 2e8].startswith("too few steps") for size in "sml")
    said = capsys.readouterr().out
    assert f"OUT    {cells['m', 1e10].id}: failed" in said and "again  " not in said
    blocked.unlink()  # what was wrong is mended: the next run takes that cell up, and no other
    assert run([str(folder)]) == 0
    again = capsys.readouterr().out
    assert f"start  {cells['m', 1e10].id}" in again and again.count("start  ") == 1
    assert rows(folder)[cells["m", 1e10].id]["status"] == "done"


@heavy
def test_a_time_limit_cuts_cells_and_says_so(corpus, tmp_path):
    study = write_study(tmp_path, corpus, **SMALL | {"budgets": [3e11], "max_epochs": 100.0})
    process = start(study, "--jobs", "2", "--timeout", "25")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "--timeout 25 s is over" in said
    assert all(row["reason"].startswith("cut: step ") for row in rows(tmp_path / "study").values()), said
    assert not ours(tmp_path / "study")


@heavy
def test_a_cell_that_is_killed_is_tried_again_once(corpus, tmp_path):
    study = write_study(tmp_path, corpus, **SMALL | {"objectives": ["masked"], "budgets": [2e10]})
    process = start(study, "--jobs", "1")
    folder = tmp_path / "study"
    until(lambda: (folder / "plan.json").exists(), process)
    planned = open_study(folder)
    until(lambda: len(lines(planned, 0)) > 5, process)
    for pid in ours(folder):
        os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and f"again  {planned.cells[0].id}: ended with code" in said, said
    assert rows(folder)[planned.cells[0].id]["status"] == "done"


@heavy
def test_cells_of_two_ranks(corpus, tmp_path):
    study = write_study(tmp_path, corpus, **SMALL | {"objectives": ["masked"], "ranks": 2, "batch_multiple": 2})
    process = start(study, "--jobs", "1")
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    (row,) = rows(tmp_path / "study").values()
    assert row["status"] == "done"
    assert (
        "2 ranks" in (tmp_path / "study" / "logs" / f"{row['cell']}.log").read_text()
        or Path(tmp_path / "study" / "runs" / row["cell"] / "health" / "rank-00001.json").exists()
    )


ENDS = """import os, signal, sys, time
what, rank = sys.argv[1], int(os.environ["RANK"])
if what == "wait":
    open(sys.argv[2] + str(rank), "w").close()
if rank == 1 and what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1 and what.isdigit():
    sys.exit(int(what))
time.sleep(0 if what == "done" else 60)
"""


HEAVY = [pytest.param(*case, marks=heavy) for case in (("done", 0), ("76", 76), ("killed", 128 + 9))]


@pytest.mark.parametrize("what, code", [("2", 2), ("wait", 75), *HEAVY])
def test_a_launcher_ends_with_what_the_first_of_its_ranks_ended_with(tmp_path, what, code):
    """Real ranks; torchrun ends with 1 for all of these but the first."""
    (tmp_path / "rank.py").write_text(ENDS)
    command = [sys.executable, "-m", "pretrain.study.running.ranks", "2", str(tmp_path / "rank.py"), what]
    with open(tmp_path / "said", "wb") as out:
        launcher = subprocess.Popen([*command, str(tmp_path / "rank-")], cwd=ROOT, stdout=out, stderr=out)
    try:
        if what == "wait":
            deadline = time.monotonic() + 60
            while len(list(tmp_path.glob("rank-*"))) < 2:
                assert launcher.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            launcher.terminate()
        assert launcher.wait(60) == code, (tmp_path / "said").read_text()
    finally:
        launcher.kill()
    named = f"launcher: rank 1 of 2 ended first, with code {code}" in (tmp_path / "said").read_text()
    assert named == (what not in ("done", "wait"))


@heavy
@pytest.mark.parametrize("mistake", ["a file where the run should be", "a shard with a wrong byte"])
def test_a_mistake_that_only_the_ranks_find_is_not_tried_again(corpus, tmp_path, capsys, mistake):
    shutil.copytree(corpus, tmp_path / "corpus")
    checked = {"data": {"verify": "full"}}
    study = write_study(
        tmp_path, tmp_path / "corpus", checked, **SMALL | {"objectives": ["masked"], "ranks": 2, "batch_multiple": 2}
    )
    assert plan([str(study)]) == 0
    folder = tmp_path / "study"
    (cell,) = open_study(folder).cells
    if mistake.startswith("a file"):  # nothing of this start can be kept in its run folder
        (folder / "runs").mkdir()
        (folder / "runs" / cell.id).write_text("here")
        line = rf"run folder {folder}/runs/{cell.id} cannot be written \(File exists\): choose another run.dir"
    else:
        shard = sorted((tmp_path / "corpus" / "train").glob("*.tar"))[0]
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        line = rf".*{shard.name}.*"
    assert run([str(folder), "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert said.count(f"start  {cell.id}") == 1 and "again  " not in said
    row = rows(folder)[cell.id]
    assert row["status"] == "excluded" and "\n" not in row["reason"]
    begin = rf"failed \(exit code 2\) at step 0 of {cell.steps}: error: (rank 0 on \S+ failed first: )?"
    assert re.fullmatch(begin + line, row["reason"]), row["reason"]
    (end,) = json.loads((folder / "ends.json").read_text()).values()
    assert (end["code"], end["tries"]) == (2, 1)


@heavy
def test_the_ranks_of_a_cell_that_is_ended_at_once_are_gone(corpus, tmp_path):
    study = write_study(
        tmp_path, corpus, **SMALL | {"objectives": ["masked"], "budgets": [4e10], "ranks": 2, "batch_multiple": 2}
    )
    assert plan([str(study)]) == 0
    planned = open_study(tmp_path / "study")
    (cell,) = planned.cells
    process = CellProcess(cell.id, planned.config_file(cell), tmp_path / "log", 2, environment(0, 1, 2, 0))
    try:
        deadline = time.monotonic() + 120
        while not lines(planned, 0):  # the launcher, two watches, two ranks
            assert process.code() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert len(ours(tmp_path / "study")) >= 5
    finally:
        process.kill()
    assert process.code() == -signal.SIGKILL
    time.sleep(1.0)  # ranks that were left alone would notice within five seconds, not within one
    assert not ours(tmp_path / "study")


@heavy
def test_mlflow_has_a_parent_and_a_child_a_cell_once(corpus, tmp_path):
    from mlflow import MlflowClient

    tracked = {"tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "laws"}}
    study = write_study(tmp_path, corpus, tracked, **SMALL)
    assert run([str(study), "--jobs", "2"]) == 0
    client = MlflowClient(tracking_uri=tracked["tracking"]["uri"])
    experiment = client.get_experiment_by_name("laws")
    folder = tmp_path / "study"
    planned = open_study(folder)

    def runs() -> list:
        return client.search_runs([experiment.experiment_id])

    parents = [one for one in runs() if "mlflow.parentRunId" not in one.data.tags]
    children = {one.info.run_name: one for one in runs() if "mlflow.parentRunId" in one.data.tags}
    assert len(parents) == 1 and parents[0].info.run_name == "study" and parents[0].info.status == "FINISHED"
    assert children.keys() == {cell.id for cell in planned.cells}
    for number, cell in enumerate(planned.cells):
        child = children[cell.id]
        assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id and child.info.status == "FINISHED"
        assert child.data.tags["study.N"] == str(cell.N) and child.data.tags["study.status"] == "done"
        assert child.data.params["train.steps"] == str(cell.steps)
        history = client.get_metric_history(child.info.run_id, "train/loss")
        assert [point.step for point in history] == list(range(1, cell.steps + 1))
        assert child.data.metrics["val/nelbo"] == lines(planned, number)[-1]["val/nelbo"]
    files = {item.path for item in client.list_artifacts(parents[0].info.run_id)}
    assert {"study.yaml", "planned_base.yaml", "planned_family.yaml", "plan.json", "results.csv"} <= files
    (folder / "fit.json").write_text("{}")
    (folder / "report").mkdir()
    (folder / "report" / "index.html").write_text("<html></html>")
    before = {one.info.run_id: len(one.data.metrics) for one in runs()}
    assert run([str(folder), "--collect"]) == 0
    assert {one.info.run_id: len(one.data.metrics) for one in runs()} == before
    assert (
        len(client.get_metric_history(children[planned.cells[0].id].info.run_id, "train/loss"))
        == planned.cells[0].steps
    )
    files = {item.path for item in client.list_artifacts(parents[0].info.run_id)}
    assert {"fit.json", "report"} <= files


@heavy
def test_a_dead_tracker_stops_nothing(corpus, tmp_path, capsys):
    study = write_study(
        tmp_path, corpus, {"tracking": {"uri": "http://127.0.0.1:9"}}, **SMALL | {"objectives": ["masked"]}
    )
    assert run([str(study), "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    assert "MLflow lacks a part of the study" in said and "1 of 1 cells have a loss" in said
