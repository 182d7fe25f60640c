"""When a run is started again: the rules, and the file that they read."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data.errors import InputError
from pretrain.config import Config, HealthConfig, RunConfig
from pretrain.load_config import save_config
from pretrain.watching.faults import Fault, FaultFile
from pretrain.watching.restart_command import restart
from pretrain.watching.restart_rules import Attempt, decide
from pretrain.watching.restarts import ENDED_BY, newest_step, read_attempts, record_attempt
from tests.distributed.launch import ROOT

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


def test_the_same_fault_after_progress_is_another_one():
    """Two starts of a run, weeks apart, that met the same trouble on their way up."""
    up = fault(kind="crashed", step=None, cause="the ranks did not meet")
    slots = [(75, 1000 * day, None) for day in range(1, 13)]
    assert decide(history((76, 0, up), *slots, (76, 12000, up)), HEALTH).restart
    assert not decide(history((76, 0, up), (75, 0, None), (76, 0, up)), HEALTH).restart
    assert not decide(history((76, 500, up), (75, 400, None), (76, 400, up)), HEALTH).restart  # rolled back in between


def said_by(why, attempts):
    """The same attempts, ended by `why`."""
    return [replace(attempt, why=why) for attempt in attempts]


@pytest.mark.parametrize("why, restart", [("limit", False), ("", False), ("requeued", True), ("ranks", True)])
def test_only_the_time_limit_can_be_too_short(why, restart):
    """A higher job takes nodes whenever it comes."""
    assert decide(said_by(why, history(*[(75, -1, None)] * 3)), HEALTH).restart == restart
    slots = said_by("limit", history(*[(75, -1, None)] * 4))
    assert not decide(slots, HEALTH).restart
    slots[2] = replace(slots[2], why=why)
    assert not decide(slots, HEALTH).restart  # what comes in between makes no checkpoint either
    slots[3] = replace(slots[3], why=why)
    assert decide(slots, HEALTH).restart == restart


def taken_away(count, *, code=None, why="lost", progress=False, hours=1.0, noted=True):
    """Starts that their host took away; the last one is always noted."""
    attempts = history(*[(code, 90 + n * progress, None) for n in range(1, count + 1)], hours=hours)
    attempts = said_by(why, [replace(a, restarts=n, started_at=90 + n * progress) for n, a in enumerate(attempts)])
    if not noted:
        attempts[:-1] = [replace(a, ended=0.0, reached=-1, decision="", why="") for a in attempts[:-1]]
    return attempts


@pytest.mark.parametrize("kind", [{}, {"noted": False}, {"code": 75, "why": "node down"}])
def test_a_run_that_takes_its_node_down_every_time_ends(kind):
    assert decide(taken_away(HEALTH.max_restarts, **kind), HEALTH).restart
    decision = decide(taken_away(HEALTH.max_restarts + 1, **kind), HEALTH)
    assert not decision.restart and "5 of them starts that a host took away" in decision.reason
    assert decide(taken_away(HEALTH.max_restarts + 2, progress=True, **kind), HEALTH).restart
    assert decide(taken_away(HEALTH.max_restarts + 1, hours=7, **kind), HEALTH).restart
    assert decide(taken_away(3, **kind), HEALTH).wait_seconds == 120


def test_a_higher_job_may_take_the_nodes_as_often_as_it_likes():
    assert decide(taken_away(20, code=75, why="requeued"), HEALTH).restart


def test_a_stop_that_was_not_honoured_wipes_nothing():
    """The same job, requeued behind it; a person submits another one."""
    first, stop, last = history((76, 90, fault()), (76, 90, fault(), "stop"), (76, 90, fault()))
    first, stop = replace(first, restarts=0), replace(stop, restarts=1)
    assert not decide([first, stop, replace(last, restarts=2)], HEALTH).restart
    assert decide([first, stop, replace(last, restarts=0, job="13")], HEALTH).restart
    assert decide([first, stop, replace(last, restarts=1)], HEALTH).restart  # in an allocation of a person's own


ENVIRON = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
BATCH = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "0"}  # what the batch script has, which is in no step


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("pretrain.watching.restarts.os.environ", BATCH)
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


def requeued(count: int) -> dict[str, str]:
    return {**BATCH, "SLURM_RESTART_COUNT": str(count)}


def test_an_end_that_nobody_noted_is_noted_by_the_next_start(run, monkeypatch, capsys):
    """The node of the batch script went down: at each start that follows, until that has happened too often."""
    monkeypatch.setattr("pretrain.watching.restarts.newest_step", lambda folder: 90)
    for count in range(HEALTH.max_restarts + 2):
        monkeypatch.setattr("pretrain.watching.restarts.os.environ", {**requeued(count), ENDED_BY: "lost"})
        monkeypatch.setenv(ENDED_BY, "lost")
        # The first one ever found nothing to look back at; the last one is refused.
        assert restart(str(run), 76, wait=False) == (75 if count <= HEALTH.max_restarts else 77)
        assert len(read_attempts(run)) == count
        if count != 2:  # that one was gone before it could even say that it began
            record_attempt(run, world=8, step=90, environ=ENVIRON | requeued(count))
            assert len(read_attempts(run)) == count + 1
    assert "ended without a word" in capsys.readouterr().out
    lost = read_attempts(run)[1]
    assert (lost.code, lost.why, lost.restarts, lost.decision) == (None, "lost", 1, "restart")
    assert "?" in (run / "health" / "report.txt").read_text()


def test_an_end_that_was_noted_is_not_noted_again(run, monkeypatch):
    record_attempt(run, world=8, step=0, environ=ENVIRON)
    assert restart(str(run), 75) == 75
    before = (run / "health" / "attempts.jsonl").read_bytes()
    monkeypatch.setattr("pretrain.watching.restarts.os.environ", requeued(1))
    monkeypatch.setenv(ENDED_BY, "lost")
    assert restart(str(run), 76) == 75
    assert (run / "health" / "attempts.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ["", "run:\n  dir: runs\n  na", "health: {max_restarts: many}\n", "\0\1"])
def test_a_config_that_cannot_be_read_ends_no_run(run, content, capsys):
    (run / "config.yaml").write_text(content)
    record_attempt(run, world=8, step=0, environ=ENVIRON)
    assert restart(str(run), 75) == 75
    if content:
        assert f"warning: {run / 'config.yaml'} cannot be read" in capsys.readouterr().err


def test_a_full_disk_ends_no_run(run, capsys):
    record_attempt(run, world=8, step=90, environ=ENVIRON)
    FaultFile(run, "12-0-0", believe_old=True).name(Fault("died", 3, "node1", "step", 100, "", "killed by signal 9"))
    assert restart(str(run), 76, wait=False) == 75
    path = run / "health" / "attempts.jsonl"
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))  # no file may grow beyond it
    try:
        for _ in range(4):
            assert restart(str(run), 75) == 75
        assert restart(str(run), 76, wait=False) == 75
        fault = json.loads((run / "health" / "fault-12-0-0.json").read_text())
        (run / "health" / "fault-12-0-0.json").write_text(json.dumps({**fault, "time": fault["time"] + 1}))
        assert restart(str(run), 76, wait=False) == 77  # the same fault as the one that it could read of
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert path.read_bytes() == before
    said = capsys.readouterr()
    assert said.err.count("attempts.jsonl cannot be written (File too large)") == 6
    assert "goes on, after 60 s: ended with exit code 76" in said.out


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500", "RANK": "0", "WORLD_SIZE": "2"}


@pytest.fixture
def outside(monkeypatch) -> None:
    """A shell without Slurm, where torchrun is called again and again."""
    monkeypatch.setattr("pretrain.watching.restarts.os.environ", {})


def test_behind_torchrun_a_leaving_rank_is_told_from_a_fault(run, outside):
    """torchrun ends with 1 whatever its ranks end with, and its starts all have the same name."""
    for _ in range(3):
        record_attempt(run, world=2, step=10 * len(read_attempts(run)), environ=TORCHRUN)
        FaultFile(run, "none-0-29500", believe_old=False).say_leaving(1)
        assert restart(str(run), 1, wait=False) == 75
        assert read_attempts(run)[-1].code == 75
    record_attempt(run, world=2, step=90, environ=TORCHRUN)
    assert restart(str(run), 1, wait=False) == 75
    assert read_attempts(run)[-1].code == 1  # the leaving file that lies there is the last start's
    record_attempt(run, world=2, step=90, environ=TORCHRUN)
    files = FaultFile(run, "none-0-29500", believe_old=False)
    files.say_leaving(1)
    files.name(Fault("died", 1, "node1", "step", 100, "train_step", "killed by signal 9"))
    assert restart(str(run), 1, wait=False) == 75
    assert read_attempts(run)[-1].code == 1 and read_attempts(run)[-1].fault["kind"] == "died"


def test_behind_torchrun_a_mistake_before_the_run_began_is_a_mistake(run, outside):
    FaultFile(run, "none-0-29500", believe_old=False).name(Fault("mistake", 1, "node1", cause="no shards", code=2))
    assert restart(str(run), 1) == 2
    (run / "health" / "attempts.jsonl").unlink()
    old = run / "health" / "fault-none-0-29500.json"
    old.write_text(json.dumps({**json.loads(old.read_text()), "time": time.time() - 2 * HOUR}))
    assert restart(str(run), 1, wait=False) == 75  # what lies there is of another time


def test_a_signal_waits_until_the_end_is_noted_and_then_ends_the_pause(run):
    """Started deaf, as by slurm/job.sh, and not. Writing takes a while here."""
    record_attempt(run, world=8, step=90, environ=ENVIRON)
    code = (
        "import signal, sys, time; from pretrain.watching import restart_command as c, restarts\n"
        "append = restarts._append\n"
        "def slow(*words): print('noting', flush=True); time.sleep(1.5); append(*words)\n"
        "restarts._append = slow\n"
        "sys.exit(c.restart(sys.argv[1], 1))"
    )
    environ = {**os.environ, **BATCH}
    for attempt, trap in (
        (1, "trap '' TERM USR1;"),
        (2, "trap '' TERM USR1;"),
        (3, ""),
    ):  # a pause of 0 s, of 60 s, of 120 s
        began = time.monotonic()
        process = subprocess.Popen(
            ["bash", "-c", f'{trap} exec "$@"', "bash", sys.executable, "-c", code, str(run)],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout and process.stdout.readline() == "noting\n"
        for number in (signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
        if trap:
            assert "goes on" in process.stdout.readline()
        else:
            assert process.wait(10) in (-signal.SIGTERM, -signal.SIGUSR1)
        assert len([a for a in read_attempts(run) if a.ended]) == attempt
        while process.poll() is None and attempt == 2:
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.1)
        assert not trap or process.wait(10) == (75 if attempt == 1 else -signal.SIGUSR1)
        assert time.monotonic() - began < 30
