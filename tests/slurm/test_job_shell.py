"""What slurm/job.sh does in moments that no lab can be brought to: a signal between two commands, a controller that is away.

The shell is real; Slurm's commands are scripts that note how they were called.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.slurm.lab import ROOT

JOB = ROOT / "slurm" / "job.sh"
PYTHON = """\
import os, signal, sys, time
deaf = [signal.getsignal(n) is signal.SIG_IGN for n in (signal.SIGTERM, signal.SIGUSR1)]
print(*sys.argv[1:], os.environ["PALIMPSEST_ENDED_BY"], all(deaf), flush=True)
time.sleep(float(os.environ.get("NOTING", "0")))
print("noted", flush=True)
if "--no-wait" not in sys.argv:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    time.sleep(float(os.environ.get("PAUSE", "0")))
sys.exit(int(os.environ.get("DECISION", "75")))
"""


@pytest.fixture
def shell(tmp_path):
    """Runs a script behind job.sh; (exit code, what it said, how Slurm's commands were called)."""
    calls = tmp_path / "calls"
    (tmp_path / "run").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "code" / "pretrain").mkdir(parents=True)
    (tmp_path / "code" / "pretrain" / "__init__.py").touch()
    (tmp_path / "code" / "pretrain" / "__main__.py").write_text(PYTHON)

    def command(name: str, script: str = "") -> None:
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "{calls}"\n{script}\n')
        path.chmod(0o755)

    def run(script: str, **environ: str) -> tuple[int, str, list[str]]:
        done = subprocess.run(
            ["bash", "-c", f'python={sys.executable} signal=USR1\nsource "{JOB}"\nlisten\ninsist_pause=0.1\n{script}'],
            cwd=tmp_path,
            env={
                **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "PYTHONPATH": str(tmp_path / "code"),
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n[1-2]",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_NTASKS_PER_NODE": "1",
                **environ,
            },
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        called = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, done.stdout, called

    run.command = command
    run.folder = tmp_path
    for name in ("scontrol", "scancel", "srun", "sinfo"):
        command(name)
    return run


@pytest.mark.parametrize("moment", ["child=*doing=train", "attend"])
def test_a_request_to_leave_that_comes_while_srun_starts_is_passed_on_once(shell, moment):
    shell.command("srun", "sleep 1.5; exit 75")
    at = f"trap '[[ $BASH_COMMAND != {moment} ]] || {{ trap - DEBUG; leave_in_time; }}' DEBUG"
    _, said, called = shell(f"exec {{meeting}}< /dev/null\nset -T\n{at}\nrun_ranks --config c\necho code $?")
    assert "code 75" in said and "the time limit is near" in said
    assert called.count("scancel --signal=USR1 7.0") == 1


def test_ranks_that_nobody_asks_are_sent_nothing(shell):
    _, said, called = shell("exec {meeting}< /dev/null\nrun_ranks --config c\necho code $?")
    assert "code 0" in said and not [call for call in called if call.startswith("scancel")]


def test_a_controller_that_is_away_for_a_while_is_asked_again(shell):
    away = 'echo x >> tries; [[ $(wc -l < tries) -ge 4 ]] || { echo "Unable to contact slurm controller" >&2; exit 1; }'
    shell.command("scontrol", away)
    code, _, called = shell("go_on run 75")
    assert code == 75 and called.count("scontrol requeue 7") == 4


@pytest.mark.parametrize("words, asked", [("Unable to contact slurm controller", 10), ("Invalid job id specified", 1)])
def test_a_job_that_is_never_requeued_says_so_within_bounds(shell, words, asked):
    shell.command("scontrol", f'echo "{words}" >&2; exit 1')
    code, said, called = shell("go_on run 75")
    assert code == 75 and called.count("scontrol requeue 7") == asked
    assert words in said and "error: Slurm does not requeue this job; submit the run again" in said


@pytest.mark.parametrize("end", ["limit", "requeued", "node down"])
@pytest.mark.parametrize("code, told, decision", [(0, 0, 0), (2, 2, 2), (137, 75, 77), (75, 75, 75)])
def test_what_is_not_to_be_started_again_leaves_slurms_queue(shell, end, code, told, decision):
    done, said, called = shell(f"end='{end}'\ngo_on run {code}", DECISION=str(decision))
    assert done == decision
    assert f"restart --run run --code {told} --no-wait" in said and f"{end} True" in said
    assert called == (["scancel 7"] if decision != 75 else [])


def test_a_requeue_in_the_middle_of_a_decision_that_ends_the_run_is_taken_back(shell):
    """Slurm takes the node of a run that is done, or not to be started again, while `restart` notes it."""
    (shell.folder / "bin" / "scontrol").write_text("#!/bin/bash\necho ' Restarts=1 '\n")
    for decision in ("0", "77"):
        script = "(sleep 0.5; kill -TERM $$) &\ngo_on run " + ("0" if decision == "0" else "76")
        code, said, called = shell(script, DECISION=decision, NOTING="1.5")
        assert code == int(decision) and "noted" in said and "ended by Slurm: requeued" in said
        assert called[-1] == "scancel 7"


def test_signals_end_the_pause_before_the_next_start_and_not_the_record(shell):
    began = time.monotonic()
    script = "(sleep 0.3; kill -USR1 $$; sleep 0.2; kill -USR1 $$) &\ngo_on run 76"
    code, said, called = shell(script, NOTING="1.5", PAUSE="30")
    assert code == 75 and "noted" in said and "ranks True" in said
    assert called[-1] == "scontrol requeue 7"
    assert time.monotonic() - began < 15


def test_a_start_behind_a_requeue_asks_what_became_of_the_last_one(shell):
    assert "restart" not in shell("look_back run; echo goes on")[1]
    _, said, _ = shell("look_back run; echo goes on", SLURM_RESTART_COUNT="1")
    assert "restart --run run --code 76 --no-wait lost True" in said and "goes on" in said
    code, said, _ = shell("look_back run; echo goes on", SLURM_RESTART_COUNT="9", DECISION="77")
    assert code == 77 and "goes on" not in said


def test_one_task_of_an_array_is_not_the_array(shell):
    _, _, called = shell("go_on run 75", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    assert called == ["scontrol requeue 5_3"]
