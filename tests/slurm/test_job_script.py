"""What slurm/pretrain.sbatch does with signals, ends and requeues of a real Slurm; the ranks are stand-ins without torch."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

import pytest

from pretrain.submission.slurm_start import NoStart, hold_port
from tests.slurm.jobs import stand_in, submit

pytestmark = pytest.mark.timeout(1200)  # its turn at the lab included
LONG = {"steps": 400, "seconds": 0.1}


@pytest.fixture(scope="module")
def near_the_limit(lab, tmp_path_factory):
    """A job of one minute that is asked to leave 45 s before; begun first, so that its minute passes beside other tests."""
    run = stand_in(tmp_path_factory.mktemp("limit"), steps=900, seconds=0.1)
    return run, submit(lab, run, "--time=1", "--signal=B:USR1@45", "--nodelist=n1,n2")


@contextlib.contextmanager
def stranger() -> Iterator[int]:
    """Another program's port, two free ones behind it. Not those of a moment ago: the kernel keeps used ports for a minute."""
    for port in range(21000 + os.getpid() * 4 % 8000, 29999, 4):
        with contextlib.suppress(OSError, NoStart), contextlib.ExitStack() as held:
            for behind in (1, 2):
                hold_port([port + behind]).close()
            held.enter_context(socket.create_server(("127.0.0.1", port)))
            yield port
            return


@pytest.fixture(scope="module")
def over_the_limit(lab, tmp_path_factory):
    """A job of one minute whose ranks do not hear: its minute passes beside other tests, too."""
    run = stand_in(tmp_path_factory.mktemp("over"), steps=1800, seconds=0.1, ignore=True)
    return run, submit(lab, run, "--time=1", "--signal=B:USR1@1", "--nodelist=n1,n2")


def asked_once(run, name: str) -> bool:
    """Whether each of two ranks was asked once in the first start: Slurm itself may deliver one request twice within milliseconds,
    and training takes what comes within two seconds for one."""
    requests = run.requests(name, 0)
    return set(requests) == {0, 1} and all(max(times) - min(times) < 1 for times in requests.values())


def once_each(run) -> bool:
    """Every step was taken exactly once, in order, whatever happened in between."""
    return [line["step"] for line in run.steps()] == list(range(1, len(run.steps()) + 1))


def test_a_job_that_is_done_ends_with_0_and_is_not_started_again(lab, tmp_path, near_the_limit, over_the_limit):
    run = stand_in(tmp_path, steps=5)
    job = submit(lab, run, "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=2", "--nodelist=n3,n4")
    assert job.finish(60) == "COMPLETED"
    assert job.field("Restarts") == "0" and once_each(run) and len(run.steps()) == 5
    assert run.lines("told.txt") == ["0 ranks"]
    address, port, *_ = run.lines("meetings.txt")[0].split()
    assert address == "127.0.0.1" and 20000 <= int(port) < 30000


def test_a_mistake_ends_with_2_and_is_not_started_again(lab, tmp_path, near_the_limit):
    run = stand_in(tmp_path, steps=1, code=2)
    job = submit(lab, run, "--nodelist=n3,n4")
    assert job.finish(60) == "FAILED"
    assert (job.exit_code, job.field("Restarts")) == (2, "0")


def test_code_that_is_not_what_was_submitted_does_not_run(lab, tmp_path, near_the_limit):
    run = stand_in(tmp_path)
    with open(run.folder / "code" / "pretrain" / "__main__.py", "a") as file:
        file.write("\n# changed behind the job's back\n")
    job = submit(lab, run, "--nodelist=n3,n4")
    assert job.finish(60) == "FAILED"
    assert job.exit_code == 2 and "is not what was submitted" in job.said() and not run.steps()


def test_two_jobs_on_one_host_and_a_stranger_there_do_not_clash(lab, tmp_path, near_the_limit):
    with stranger() as first:
        runs = [stand_in(tmp_path / name, steps=30, seconds=0.1) for name in ("a", "b")]
        jobs = [submit(lab, run, "--nodelist=n3,n4", PALIMPSEST_PORTS=f"{first}-{first + 2}") for run in runs]
        assert [job.finish(60) for job in jobs] == ["COMPLETED"] * 2
    ports = [run.lines("meetings.txt")[0].split()[1] for run in runs]
    assert sorted(ports) == [str(first + 1), str(first + 2)]


def test_no_free_port_is_one_clear_line_and_no_hang(lab, tmp_path, near_the_limit):
    run = stand_in(tmp_path)
    with stranger() as port:
        job = submit(lab, run, "--nodelist=n3,n4", PALIMPSEST_PORTS=f"{port}-{port}")
        assert job.finish(30) == "FAILED"
    assert "error: the ranks have nowhere to meet: all 1 ports tried" in job.said() and not run.steps()


def test_a_second_request_to_leave_is_not_passed_on_twice(lab, tmp_path, near_the_limit):
    run = stand_in(tmp_path, **LONG, save_seconds=2)
    job = submit(lab, run, "--nodelist=n3,n4", signal="HUP")
    job.wait(30, lambda: len(run.steps()) > 3, "a few steps")
    lab.ask("scancel", "--batch", "--signal=USR1", job.number)
    time.sleep(1.5)
    lab.ask("scancel", "--batch", "--signal=USR1", job.number)
    job.wait(40, lambda: run.steps_of(1) > 3, "a second start")
    lab.ask("scancel", job.number)
    assert job.finish(30) == "CANCELLED"
    assert asked_once(run, "SIGHUP")
    assert "the ranks ended with code 75" in job.said()  # it has waited for them to save
    assert once_each(run) and run.lines("told.txt")[0] == "75 limit"


def test_scancel_ends_it_for_good(lab, tmp_path, near_the_limit):
    run = stand_in(tmp_path, **LONG)
    job = submit(lab, run, "--nodelist=n3,n4")
    job.wait(30, lambda: len(run.steps()) > 3, "a few steps")
    lab.ask("scancel", job.number)
    assert job.finish(30) == "CANCELLED"
    time.sleep(4)  # longer than a requeued job waits here
    assert job.state == "CANCELLED" and job.field("Restarts") == "0"


@pytest.mark.fault(
    "`scontrol requeue` of a running job", happens="Slurm starts it again, the script does not", lost="nothing saved"
)
def test_scontrol_requeue_by_a_person_starts_it_again_once(lab, tmp_path, near_the_limit):
    run = stand_in(tmp_path, steps=60, seconds=0.1)
    job = submit(lab, run, "--nodelist=n3,n4")
    job.wait(30, lambda: len(run.steps()) > 3, "a few steps")
    lab.ask("scontrol", "requeue", job.number)
    job.wait(40, lambda: run.steps_of(1), "a second start")
    assert job.finish(60) == "COMPLETED"
    assert job.field("Restarts") == "1" and once_each(run)
    assert run.lines("told.txt") == ["75 requeued", "0 ranks"]


def test_what_slurm_requeued_ends_if_it_is_not_to_be_started_again(lab, tmp_path, near_the_limit):
    run = stand_in(tmp_path, **LONG)
    (run.folder.parents[1] / "decision").write_text("77")
    job = submit(lab, run, "--nodelist=n3,n4")
    job.wait(30, lambda: len(run.steps()) > 3, "a few steps")
    lab.ask("scontrol", "requeue", job.number)
    assert job.finish(30) == "CANCELLED"
    assert run.lines("told.txt") == ["75 requeued"] and not run.steps_of(1)
    assert "taken out of the queue" in job.said()


def test_the_ranks_are_asked_to_leave_before_the_limit_and_the_job_goes_on(lab, near_the_limit):
    run, job = near_the_limit
    job.wait(110, lambda: run.steps_of(1) > 2, "a second start after the limit came near")
    assert "the time limit is near" in job.said()
    lab.ask("scancel", job.number)
    assert job.finish(30) == "CANCELLED"
    assert asked_once(run, "SIGUSR1")
    assert job.said().split("start 1 of")[0].count("the time limit is near") == 1
    assert once_each(run) and run.lines("told.txt")[0] == "75 limit"
    assert run.lines("looked-back.txt")[0] == "76 lost"


@pytest.mark.fault(
    "the time limit hits before a checkpoint is written",
    happens="the batch script requeues the job while Slurm ends it; the newest complete checkpoint stands",
    lost="the steps since that checkpoint",
)
def test_a_limit_that_hits_before_the_ranks_have_saved_does_not_end_the_run(lab, over_the_limit):
    run, job = over_the_limit
    job.wait(140, lambda: run.steps_of(1) > 2, "a second start after the limit")
    assert "ended by Slurm: limit" in job.said()
    lab.ask("scancel", job.number)
    assert job.finish(30) == "CANCELLED"
    assert job.field("Restarts") == "1"


@pytest.mark.fault(
    "a node goes down",
    happens="Slurm requeues the job, the script does not; it starts again on other nodes",
    lost="the steps since the newest checkpoint",
)
def test_a_node_that_goes_down_costs_one_start_and_nothing_else(lab, tmp_path):
    run = stand_in(tmp_path, steps=60, seconds=0.1)
    job = submit(lab, run)
    job.wait(30, lambda: len(run.steps()) > 3, "a few steps")
    last = lab.ask("scontrol", "show", "hostnames", job.field("NodeList")).splitlines()[-1]
    lab.ask("scontrol", "update", f"NodeName={last}", "State=DOWN", "Reason=test")
    try:
        job.wait(60, lambda: run.steps_of(1) > 3, "a second start")
        assert last not in lab.ask("scontrol", "show", "hostnames", job.field("NodeList")).splitlines()
        assert job.finish(60) == "COMPLETED"
        assert job.field("Restarts") == "1" and once_each(run)
        assert run.lines("told.txt") == ["75 node down", "0 ranks"]
    finally:
        lab.ask("scontrol", "update", f"NodeName={last}", "State=RESUME")


@pytest.mark.fault(
    "a job of a higher partition takes the nodes",
    happens="the ranks save within the grace time; the job requeues itself and goes on behind the other one",
    lost="nothing",
)
def test_a_higher_job_takes_the_nodes_within_the_grace_time_and_gives_them_back(lab, tmp_path):
    low, high = stand_in(tmp_path / "low", **LONG), stand_in(tmp_path / "high", steps=5)
    job = submit(lab, low, "--nodes=4", "--gpus-per-node=2")
    job.wait(30, lambda: len(low.steps()) > 3, "a few steps")
    urgent = submit(lab, high, "--nodes=4", "--gpus-per-node=2", "--partition=urgent")
    assert urgent.finish(60) == "COMPLETED"
    job.wait(60, lambda: low.steps_of(1) > 3, "a second start")
    assert low.lines("told.txt")[0] in ("75 ranks", "75 requeued")  # no time limit's doing
    assert job.field("Restarts") == "1" and once_each(low)
    lab.ask("scancel", job.number)
    job.finish(30)
