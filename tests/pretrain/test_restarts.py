"""When a run is started again: the rules, and the file that they read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from data.errors import InputError
from pretrain.config import Config, HealthConfig, RunConfig
from pretrain.load_config import save_config
from pretrain.restart_command import restart
from pretrain.restarts import Attempt, decide, newest_step, read_attempts, record_attempt
from pretrain.watch_faults import Fault, FaultFile

HEALTH = HealthConfig(max_restarts=4, restart_backoff_seconds=60)
HOUR = 3600.0


def fault(kind="died", step=100, cause="killed by signal 9 (SIGKILL)", rank=1, host="node1"):
    return {"kind": kind, "rank": rank, "host": host, "phase": "step", "step": step, "doing": "", "cause": cause}


def history(*ends, hours=30.0):
    """Attempts in a row, `hours` apart: (code, step of the newest checkpoint at the end, fault or None[, decision])."""
    attempts, at, step = [], 1e9, 0
    for number, (code, reached, why, *decision) in enumerate(ends, 1):
        end = at + hours * HOUR
        decided = decision[0] if decision else "restart"
        attempts.append(Attempt(number, f"12-0-{number}", "12", 8, at, step, end, code, reached, why, decided))
        at, step = end, max(step, reached)
    return attempts


def test_a_time_slot_that_is_over_goes_on_at_once():
    decision = decide(history((75, 100, None)), HEALTH)
    assert decision.restart and decision.wait_seconds == 0 and "step 100" in decision.reason


def test_three_slots_without_a_new_checkpoint_end_the_run():
    assert decide(history((75, 100, None), (75, 100, None), (75, 100, None)), HEALTH).restart  # the first one saved
    decision = decide(history((75, 100, None), (75, 100, None), (75, 100, None), (75, 100, None)), HEALTH)
    assert not decision.restart and "time limit is too short" in decision.reason
    assert decide(history((75, -1, None), (75, -1, None)), HEALTH).restart
    assert not decide(history((75, -1, None), (75, -1, None), (75, -1, None)), HEALTH).restart  # none was ever saved
    assert decide(history((75, 100, None), (75, 100, None), (76, 100, fault()), (75, 100, None)), HEALTH).restart


@pytest.mark.parametrize("code, word", [(0, "done"), (2, "mistake"), (130, "cancelled"), (143, "cancelled")])
def test_ends_that_are_no_faults_are_not_restarted(code, word):
    decision = decide(history((code, 100, None)), HEALTH)
    assert not decision.restart and word in decision.reason


def test_a_step_ended_by_sigterm_with_a_named_fault_is_that_fault():
    assert decide(history((143, 100, fault())), HEALTH).restart


@pytest.mark.parametrize(
    "second, same",
    [
        (fault(rank=5, host="node3", cause="killed by signal 9 (SIGKILL)"), True),  # the rank is no part of a fault
        (fault(step=101), False),
        (fault(kind="stalled"), False),
        (fault(cause="CUDA error: an illegal memory access"), False),
    ],
)
def test_the_same_fault_at_the_same_step_twice_ends_the_run(second, same):
    decision = decide(history((76, 90, fault()), (76, 90, second)), HEALTH)
    assert decision.restart != same
    if same:
        assert "the same fault at step 100 as in attempt 1" in decision.reason


def test_numbers_and_hosts_in_a_cause_do_not_hide_that_it_is_the_same():
    one = fault(cause="RuntimeError: [node1:4711] address 0x7f01 in rank 1 after 301 s", rank=1, host="node1")
    other = fault(cause="RuntimeError: [node22:99] address 0xdead in rank 17 after 299 s", rank=17, host="node22")
    assert not decide(history((76, 90, one), (76, 90, other)), HEALTH).restart


def test_a_person_who_starts_it_again_starts_the_count_again():
    assert decide(history((76, 90, fault()), (76, 90, fault(), "stop"), (76, 90, fault())), HEALTH).restart


def test_pauses_grow_while_there_is_no_progress():
    ends, waits = [], []
    for number in range(8):
        ends.append((76, 90, fault(step=number)))
        waits.append(decide(history(*ends), HEALTH).wait_seconds)
    assert waits == [
        0,
        60,
        120,
        240,
        480,
        900,
        900,
        900,
    ]  # the first one left a checkpoint, the others found it and no more
    assert decide(history((76, 0, fault(step=1)), (76, 0, fault(step=2))), HEALTH).wait_seconds == 60
    ends.append((76, 95, fault(step=99)))
    assert decide(history(*ends), HEALTH).wait_seconds == 0


def test_too_many_faults_in_a_day_end_the_run():
    ends = [(76, 90 + number, fault(step=number)) for number in range(5)]
    assert decide(history(*ends[:4], hours=1), HEALTH).restart
    decision = decide(history(*ends, hours=1), HEALTH)
    assert not decision.restart and "health.max_restarts 4" in decision.reason
    assert decide(history(*ends, hours=7), HEALTH).restart  # the first of them is more than a day ago


def test_an_end_without_a_word_counts_as_a_fault():
    decision = decide(history((1, 0, None), (1, 0, None)), HEALTH)
    assert decision.restart and decision.wait_seconds == 60 and "no watch left a word" in decision.reason


ENVIRON = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
BATCH = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "0"}  # what the batch script has, which is in no step


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("pretrain.restarts.os.environ", BATCH)
    (tmp_path / "checkpoints" / "step-00000090").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000090" / "trainer.json").write_text("{}")
    (tmp_path / "checkpoints" / ".writing-step-00000095").mkdir()
    save_config(Config(run=RunConfig(str(tmp_path.parent), tmp_path.name), health=HEALTH), tmp_path / "config.yaml")
    return tmp_path


def test_starts_and_ends_are_kept_and_read_back(run):
    assert newest_step(run) == 90
    assert record_attempt(run, world=8, step=0, environ=ENVIRON) == 1
    assert restart(str(run), 75) == 75
    assert record_attempt(run, world=8, step=90, environ=ENVIRON) == 2
    first, second = read_attempts(run)
    assert (first.launch, first.job, first.world, first.started_at, first.reached) == ("12-0-0", "12", 8, 0, 90)
    assert (first.code, first.decision, second.code, second.started_at) == (75, "restart", None, 90)
    lines = [json.loads(line) for line in (run / "health" / "attempts.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"attempt", "time", "launch", "job", "world", "step"}
    assert {"ended", "time", "launch", "job", "code", "step", "fault", "decision", "wait_seconds"} <= set(lines[1])


def test_a_line_cut_short_loses_only_itself(run):
    record_attempt(run, world=8, step=0, environ=ENVIRON)
    path = run / "health" / "attempts.jsonl"
    with open(path, "a") as file:
        file.write('{"ended": 1, "ti')
    record_attempt(run, world=8, step=90, environ=ENVIRON)
    assert [attempt.started_at for attempt in read_attempts(run)] == [0, 90]


def test_the_fault_of_this_start_is_found_told_and_not_taken_twice(run, capsys):
    for attempt, expected in ((1, 75), (2, 77)):
        record_attempt(run, world=8, step=90, environ=ENVIRON)
        files = FaultFile(run, "12-0-0", believe_old=False)
        files.name(Fault("died", 3, f"node{attempt}", "step", 100, "train_step", "killed by signal 9"))
        assert restart(str(run), 76, wait=False) == expected
    said = capsys.readouterr().out
    assert "rank 3 on node1 died in phase step of step 100: killed by signal 9" in said
    report = (run / "health" / "report.txt").read_text()
    assert "the same fault at step 100 as in attempt 1" in report and f"stacks  {run}/logs/stacks-12-0-0" in report
    assert report.count("died rank 3 on node") == 2 and "What to do:" in report
    record_attempt(run, world=8, step=90, environ=ENVIRON)
    assert restart(str(run), 76, wait=False) == 75  # the old fault file is not this start's
    assert read_attempts(run)[-1].fault is None


def test_a_start_that_ended_before_it_could_say_so(run):
    """Its fault is found by the job and how often it was requeued; an attempt of another requeue that has no end stays as it is."""
    record_attempt(run, world=8, step=0, environ=ENVIRON | {"SLURM_RESTART_COUNT": "7"})
    FaultFile(run, "12-0-0", believe_old=True).name(Fault("crashed", 0, "node0", cause="ImportError: no module"))
    FaultFile(run, "112-0-0", believe_old=True).name(Fault("crashed", 0, "node9", cause="another job's"))
    assert restart(str(run), 76, wait=False) == 75
    dead, ended = read_attempts(run)
    assert dead.code is None and ended.fault is not None and ended.fault["cause"] == "ImportError: no module"
    assert ended.launch == "12-0-0"


def test_a_mistake_of_one_rank_is_a_mistake_of_the_run(run):
    record_attempt(run, world=8, step=0, environ=ENVIRON)
    FaultFile(run, "12-0-0", believe_old=True).name(Fault("mistake", 5, "node1", cause="no such shard", code=2))
    assert restart(str(run), 76) == 2


def test_it_waits_only_if_asked_and_never_long(run, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for _ in range(2):
        record_attempt(run, world=8, step=90, environ=ENVIRON)
        assert restart(str(run), 1) == 75
    record_attempt(run, world=8, step=90, environ=ENVIRON)
    assert restart(str(run), 1, wait=False) == 75
    assert waited == [0, 60]


def test_no_run_folder_is_a_mistake_unless_there_was_one_before(tmp_path):
    assert restart(str(tmp_path / "none"), 2) == 2
    assert restart(str(tmp_path / "none"), 0) == 0
    with pytest.raises(InputError, match="no run folder"):
        restart(str(tmp_path / "none"), 76)
    assert not (tmp_path / "none").exists()


def test_a_run_without_a_config_of_its_own_follows_the_defaults(run):
    (run / "config.yaml").unlink()
    record_attempt(run, world=8, step=0, environ=ENVIRON)
    assert restart(str(run), 75) == 75
