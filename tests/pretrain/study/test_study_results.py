"""results.csv: each row from its run folder, each cell that does not count with its reason."""

from __future__ import annotations

import csv
import json
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from data.errors import InputError
from pretrain.study.command_plan import plan
from pretrain.study.command_run import _jobs_on, run
from pretrain.study.design.plan import Planned, open_study
from pretrain.study.running.processes import CellProcess, environment, said_last
from pretrain.study.running.ranks import cause
from pretrain.study.running.results import COLUMNS, End, Result, Results, last_word, result_of
from pretrain.study.running.slurm import slurm_ends
from tests.pretrain.study.studies import write_study

VALIDATION = {"val/nelbo": 3.5, "val/nelbo_se": 0.02, "val/unigram_entropy": 5.0}


@pytest.fixture
def planned(tmp_path, corpus) -> Planned:
    assert plan([str(write_study(tmp_path, corpus, budgets=[2e9], min_steps=20))]) == 0
    return open_study(tmp_path / "study")


def spool(planned: Planned, number: int, steps: int, **validation) -> None:
    """What `train` writes: a line a step, and one for a validation behind the last."""
    run = planned.run_folder(planned.cells[number])
    run.mkdir(parents=True)
    lines = [{"step": n, "time": n, "train/loss": 4.0, "perf/step_time": 0.25} for n in range(1, steps + 1)]
    lines += [{"step": steps, "time": steps, **validation}] if validation else []
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_row_says_what_became_of_its_cell(planned):
    s, m, left_out, other, *_ = planned.cells
    assert left_out.status == "excluded"
    spool(planned, 0, s.steps, **VALIDATION)
    spool(planned, 1, m.steps, **VALIDATION | {"val/nelbo": 6.3})
    spool(planned, 3, 7)
    results = Results(planned)
    found = results.write()
    rows = list(csv.DictReader((planned.folder / "results.csv").read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS and [row["cell"] for row in rows] == [cell.id for cell in planned.cells]
    assert [row["status"] for row in rows] == ["done", "excluded", "excluded", "excluded", "missing", "excluded"]
    assert rows[0]["reason"] == "" and float(rows[0]["loss"]) == 3.5 and float(rows[0]["loss_se"]) == 0.02
    assert {name: float(rows[0][name]) for name in ("N", "D", "C", "lr", "batch", "steps", "seed", "budget")} == {
        name: getattr(s, name) for name in ("N", "D", "C", "lr", "batch", "steps", "seed", "budget")
    }
    assert rows[1]["reason"] == "diverged: its loss 6.3000 is above 6.2383, that of knowing nothing (ln 512)"
    assert rows[2]["reason"].startswith("too few steps: ") and rows[2]["loss"] == ""
    assert rows[3]["reason"] == f"cut: step 7 of {other.steps}" and rows[3]["loss"] == ""
    assert rows[4]["reason"] == "not run"
    assert found[s.id].seconds == pytest.approx(0.25 * s.steps) and found[s.id].final and not found[other.id].final


def test_reasons_follow_from_the_end_and_from_the_losses(planned):
    cell = planned.cells[0]
    run = planned.run_folder(cell)
    assert result_of(cell, run) == Result("missing", "not run")
    spool(planned, 0, 5)
    assert result_of(cell, run, running=True).reason == f"running: step 5 of {cell.steps}"
    assert result_of(cell, run, End(75, "asked to leave")).reason == f"cut: step 5 of {cell.steps}"
    broken = result_of(cell, run, End(1, "error: no space left"))
    assert (broken.status, broken.reason) == (
        "excluded",
        f"failed (exit code 1) at step 5 of {cell.steps}: error: no space left",
    )
    gave_up = End(1, "RuntimeError: step 5: 10 steps, again (health.max_rollbacks 3): lower optimizer.lr")
    assert result_of(cell, run, gave_up).reason.startswith(f"diverged at step 5 of {cell.steps}: ")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": cell.steps, "time": 9, "val/nelbo": "nan"}) + "\n")
    assert result_of(cell, run, End(0)).reason == "diverged: the validation loss at the last step is nan"
    assert result_of(cell, run, End(0)).final
    with open(run / "metrics.jsonl", "a") as file:
        file.write("no json at all\n")
    assert result_of(cell, run).reason.startswith("failed: ")


def test_a_loss_above_that_of_frequencies_counts_but_is_noted(planned):
    spool(planned, 0, planned.cells[0].steps, **VALIDATION | {"val/nelbo": 5.2})
    found = Results(planned).of(planned.cells[0])
    assert (found.status, found.loss, found.note) == (
        "done",
        5.2,
        "its loss 5.2000 is above 5.0000, that of token frequencies alone",
    )


def test_a_validation_before_the_last_step_is_no_result(planned):
    spool(planned, 0, planned.cells[0].steps - 1, **VALIDATION)
    assert result_of(planned.cells[0], planned.run_folder(planned.cells[0])).reason.startswith("cut: step ")


def test_how_cells_ended_outlives_the_command(planned):
    results = Results(planned)
    results.ended(planned.cells[0], End(2, "error: no shards", 1))
    (planned.folder / "results.csv").unlink(missing_ok=True)
    again = Results(planned)
    assert again.ends == {planned.cells[0].id: End(2, "error: no shards", 1)}
    assert "failed (exit code 2)" in again.of(planned.cells[0]).reason
    (planned.folder / "ends.json").write_text("[]")
    assert Results(planned).ends == {}


def test_the_last_word_is_the_error_and_not_what_was_said_behind_it(tmp_path):
    log = tmp_path / "log"
    log.write_text("error: of an earlier start\nstep 1\nerror: the shards are gone\nbye\n")
    assert said_last(log) == "error: the shards are gone"
    start = len("error: of an earlier start\n")
    assert said_last(log, start) == "error: the shards are gone"
    log.write_text("Traceback (most recent call last):\n  File x\nRuntimeError: lower optimizer.lr\nwatch: gone\n")
    assert said_last(log) == "RuntimeError: lower optimizer.lr"
    watched = "watch: rank 1 on n died in phase step, step 3: killed by signal 9"
    log.write_text(f"step 1\n{watched}\nE1122 failed (exitcode: 76)\nlauncher: rank 1 of 2 ended first, with code 76\n")
    assert said_last(log) == watched
    log.write_text("step 1\nstep 2\n\n")
    assert (
        said_last(log) == "step 2" and said_last(log, log.stat().st_size) == "" and said_last(tmp_path / "none") == ""
    )


def test_cells_share_cores_and_gpus(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [environment(place, 2, 2, 4)["CUDA_VISIBLE_DEVICES"] for place in (0, 1)] == ["0,1", "2,3"]
    assert environment(0, 2, 2, 3)["CUDA_VISIBLE_DEVICES"] == ""  # not enough for all: on processors
    assert environment(0, 2, 2, 0)["OMP_NUM_THREADS"] == "2" and "WORLD_SIZE" not in environment(0, 1, 1, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert environment(1, 2, 1, 2)["CUDA_VISIBLE_DEVICES"] == "7"


def test_what_array_tasks_said_is_read_from_their_logs(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    start = "[2026-01-01 00:00:00Z job 7_1] start 0 of cell 1, /a b/runs/masked-s, on n1\n"
    end = "[2026-01-01 00:00:09Z job 7_1] the ranks ended with code {}\n"
    (logs / "slurm-7-1.out").write_text(start + end.format(75) + start + "error: no shards\n" + end.format(2))
    (logs / "slurm-7-2.out").write_text(start.replace("masked-s", "masked-m"))
    when = datetime(2026, 1, 1, 0, 0, 9, tzinfo=UTC).timestamp()  # of the last end: not the file's time
    assert slurm_ends(tmp_path) == {"masked-s": End(2, "error: no shards", 2, when)}
    (logs / "slurm-7-1.out").write_text(start + end.format(75).replace("Z job", " job") + start)  # of an older release
    local = datetime(2026, 1, 1, 0, 0, 9).timestamp()
    assert slurm_ends(tmp_path)["masked-s"].time == local


def test_the_later_end_of_a_cell_counts_however_often_it_was_tried(planned, capsys):
    """Slurm's logs against ends.json: newer, older, of a release that noted no time; and three jobs' logs among themselves."""
    began = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
    noon = began.timestamp()
    cells = [cell for cell in planned.cells if cell.status == "planned"][:4]
    record = {
        cells[0].id: {"code": 1, "said": "error: here, later", "tries": 1, "time": noon + 3600},
        cells[1].id: {"code": 1, "said": "error: here, earlier", "tries": 9, "time": noon - 3600},
        cells[2].id: {"code": 1, "said": "error: here, when nobody noted the time", "tries": 9},
    }
    (planned.folder / "ends.json").write_text(json.dumps(record))

    def log(job: int, number: int, ended: datetime, said: str, times: int) -> None:
        run = planned.run_folder(cells[number])
        text = f"[{began:%F %TZ} job {job}_{number}] start 0 of cell {number}, {run}, on n1\n{said}\n"
        text += f"[{ended:%F %TZ} job {job}_{number}] the ranks ended with code 2\n" * times
        (planned.folder / "logs" / f"slurm-{job}-{number}.out").write_text(text)

    for number in range(3):
        log(7, number, began, "error: in a job", 3)
    for job, days, times in ((7, 2, 3), (8, 0, 1), (9, 1, 5)):
        log(job, 3, began - timedelta(days=days), f"error: in job {job}", times)
    assert run([str(planned.folder), "--collect"]) == 1
    rows = {
        row["cell"]: row["reason"] for row in csv.DictReader((planned.folder / "results.csv").read_text().splitlines())
    }
    said = [rows[cell.id].rpartition("error: ")[2] for cell in cells]
    assert said == ["here, later", "in a job", "in a job", "in job 8"]


def test_of_ranks_that_ended_together_a_mistake_counts_before_what_may_pass():
    assert cause({0: 1, 1: 2}, 0) == (1, 2) and cause({0: 76, 1: 77, 2: -9}, 2) == (1, 77)
    assert cause({0: 76, 1: -9}, 1) == (1, 137) and cause({0: 76, 1: -9}, 0) == (0, 76)


def test_an_end_is_noted_with_its_time(planned, tmp_path):
    before = time.time()
    process = CellProcess("none", tmp_path / "none.yaml", tmp_path / "log", 1, environment(0, 1, 1, 0))
    while process.code() is None:
        time.sleep(0.05)
    results = Results(planned)
    results.ended(planned.cells[0], process.end(1))
    end = Results(planned).ends[planned.cells[0].id]
    assert end.code == 2 and "none.yaml" in end.said and before - 0.001 <= end.time <= time.time() + 0.001


def test_a_folder_that_is_no_study_is_one_line(tmp_path):
    from data.errors import InputError
    from pretrain.study.command_run import run

    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no plan.json, so this is no planned study"):
        run([str(tmp_path / "none")])
    assert not list(Path(tmp_path / "none").iterdir())


GAVE_UP = "error: rank 1 on n2 failed first: RuntimeError: step 5: spikes (health.max_rollbacks 3): lower optimizer.lr"


@pytest.mark.parametrize("lines", [
    [GAVE_UP, "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:", "pretrain FAILED"],
    ["Traceback (most recent call last):", GAVE_UP.split("first: ")[1], "error: rank 0 left"],
    [f"[rank1]: {GAVE_UP}"],
])  # fmt: skip
def test_divergence_is_seen_behind_whatever_a_launcher_says(lines):
    assert End(1, last_word(lines)).diverged
    assert not last_word(lines).startswith(("torch.distributed", "["))


def test_cells_at_a_time_follow_from_the_gpus_that_are_there(capsys):
    assert _jobs_on(0, 8, 2) == 2 and _jobs_on(1, 1, 2) == 1 and _jobs_on(8, 2, 3) == 3
    assert "1 cells at a time instead of 2" in capsys.readouterr().out
    with pytest.raises(InputError, match="study.ranks 8, and 4 GPUs are seen here"):
        _jobs_on(4, 8, 2)


def test_a_copy_of_a_study_trains_nothing_into_the_original(planned, tmp_path):
    shutil.copytree(planned.folder, tmp_path / "copy")
    with pytest.raises(InputError, match="was planned as .*study, where its cells would be trained"):
        run([str(tmp_path / "copy")])
