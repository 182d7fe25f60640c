"""Real ranks under real watches: what goes wrong is named, every rank's stacks are kept, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.watching.heartbeat import Record, read_published
from pretrain.watching.restart_command import restart
from pretrain.watching.restarts import read_attempts
from tests.distributed.launch import ROOT, environment, meeting_port

STALL, BEAT = 4.0, 0.5
START = 6 * STALL + 40  # seconds for ranks to import torch and to meet, on a busy machine
GONE = 30.0  # from the fault to the end of every process


class Ranks:
    """One start of some ranks, each under its own watch, as a launcher without a name of its own would start them."""

    def __init__(self, folder: Path, world: int, faults: str = "", *, port: int = 0, steps: int = 100_000, stall=STALL):
        self.folder, self.world = folder, world
        self.said = [folder.parent / f"{folder.name}-{rank}-{time.monotonic_ns()}.out" for rank in range(world)]
        port = port or meeting_port()
        self.launch = f"127.0.0.1-{port}"  # with one rank it is the watch's own
        options = {
            "run.dir": folder.parent,
            "run.name": folder.name,
            "health.stall_seconds": stall,
            "health.beat_seconds": BEAT,
            "train.steps": steps,
        }
        command = [sys.executable, "-m", "tests.pretrain.watch_worker", "watch", "train"]
        command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        self.watches = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=open(self.said[rank], "w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(world),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                    FAULTS=faults,
                ),
            )
            for rank in range(world)
        ]
        self.seen: set[psutil.Process] = set()

    def wait_for(self, condition: Callable[[], Any], seconds: float = START) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, self.output()
            self.processes()
            time.sleep(0.05)
        return found

    def trains(self, rank: int, step: int = 3) -> Record:
        """Waits until a rank of this start is in a step, and so all of them; its record."""

        def found():
            record = read_published(self.folder, rank)
            this = self.launch if self.world > 1 else f"pid-{self.watches[0].pid}"
            good = record and record.launch == this and record.phase == "step" and (record.step or 0) >= step
            return record if good else None

        return self.wait_for(found)

    def processes(self) -> set[psutil.Process]:
        """Every process that was ever seen below the watches."""
        for watch in self.watches:
            try:
                self.seen |= set(psutil.Process(watch.pid).children(recursive=True))
            except psutil.NoSuchProcess:
                continue
        return self.seen

    def codes(self, seconds: float = START) -> list[int]:
        self.wait_for(lambda: all(watch.poll() is not None for watch in self.watches), seconds)
        return [watch.returncode for watch in self.watches]

    def fault(self) -> dict[str, Any]:
        path = self.folder / "health" / f"fault-{self.launch}.json"
        self.wait_for(path.exists)
        return json.loads(path.read_text())

    def left(self) -> list[psutil.Process]:
        return [process for process in self.seen if lives(process)]

    def stacks(self, rank: int) -> str:
        return (self.folder / "logs" / f"stacks-{self.launch}" / f"rank-{rank:05d}.txt").read_text()

    def output(self) -> str:
        return "\n".join(f"--- rank {rank}\n{path.read_text()[-3000:]}" for rank, path in enumerate(self.said))

    def close(self) -> None:
        self.processes()
        for watch in self.watches:
            watch.kill()
            watch.wait()
        for process in self.left():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pid: int) -> bool:
    try:
        return not lives(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def goes(pid: int) -> bool:
    """A process that was killed takes a moment to go."""
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return gone(pid)


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def begin(world: int, faults: str = "", **options: Any) -> Ranks:
        started.append(Ranks(tmp_path / "run", world, faults, **options))
        return started[-1]

    yield begin
    for ranks in started:
        ranks.close()


def ended_together(ranks: Ranks, code: int) -> dict[str, Any]:
    """The fault; all watches have ended with `code` soon after it, and nothing of them is left."""
    fault = ranks.fault()
    appeared = time.monotonic()
    assert ranks.codes() == [code] * ranks.world, ranks.output()
    assert time.monotonic() - appeared < GONE
    assert not ranks.left()
    assert fault["host"] == socket.gethostname()
    return fault


@pytest.mark.fault(
    "SIGSTOP of one rank of three",
    happens="rank, host and phase are named; all stacks are kept, the stopped one's read from outside; all end with 76",
    lost="the steps since the newest complete checkpoint, which the next start takes again",
)
def test_a_stopped_rank_is_named_and_a_second_start_is_not_confused(start, measured):
    ranks = start(3)
    record = ranks.trains(2)
    os.kill(record.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    fault = ended_together(ranks, 76)
    measured(f"stall limit {STALL:g} s; all gone after", f"{time.monotonic() - stopped:.1f} s")
    assert time.monotonic() - stopped < STALL + GONE + 10
    assert (fault["kind"], fault["rank"], fault["phase"], fault["doing"]) == ("stopped", 2, "step", "train_step")
    assert fault["step"] >= 3 and "SIGSTOP" in fault["cause"] and fault["code"] == 76
    for rank in (0, 1):  # they wait for it in the collective, and say so themselves
        assert "from inside" in ranks.stacks(rank) and "all_reduce" in ranks.stacks(rank)
        assert "Thread 0x" in ranks.stacks(rank)
    assert "from outside: it is stopped" in ranks.stacks(2) and "watch_worker.py" in ranks.stacks(2)
    assert fault["stacks"] == str(ranks.folder / "logs" / f"stacks-{ranks.launch}")
    named = [line for line in ranks.output().splitlines() if line.startswith("watch: rank 2 on ")]
    assert named and "stopped in phase step" in named[0]
    # The same address and port, so the same name; the old fault and the old records lie there.
    again = start(3, "alone", port=int(ranks.launch.rpartition("-")[2]), steps=20)
    assert again.launch == ranks.launch
    assert again.codes() == [0, 0, 0], again.output()
    assert not again.left()


@pytest.mark.fault(
    "SIGKILL of one rank",
    happens="that rank is named, not the peers that fail because of it; all end with 76",
    lost="the steps since the newest complete checkpoint, which the next start takes again",
)
def test_a_killed_rank_is_named_and_not_the_peers_that_fail_because_of_it(start):
    ranks = start(2)
    record = ranks.trains(1)
    os.kill(record.pid, signal.SIGKILL)
    fault = ended_together(ranks, 76)
    assert (fault["kind"], fault["rank"], fault["phase"]) == ("died", 1, "step")
    assert fault["cause"].startswith("killed by signal 9 (SIGKILL)") and fault["step"] >= 3


@pytest.mark.fault(
    "a rank that hangs in Python while the others wait in a collective",
    happens="named as the one that is behind, by step and by collectives begun; its child processes end with it",
    lost="the steps since the newest complete checkpoint, which the next start takes again",
)
def test_a_rank_that_sleeps_is_named_as_behind_and_its_offspring_ends_with_it(start):
    ranks = start(2, "1:offspring:2,1:sleep:5")
    fault = ended_together(ranks, 76)
    assert (fault["kind"], fault["rank"], fault["step"]) == ("stalled", 1, 5)
    assert "collectives begun in group world, the others" in fault["cause"]
    assert "_misbehave" in ranks.stacks(1) and "all_reduce" in ranks.stacks(0)
    offspring = [int(pid) for pid in (ranks.folder / "offspring-1").read_text().split()]
    assert len(offspring) == 2
    assert all(goes(pid) for pid in offspring)


@pytest.mark.fault(
    "a rank that hangs in native code and holds the interpreter",
    happens="named as silent; its stack is read from outside",
    lost="the steps since the newest complete checkpoint, which the next start takes again",
)
@pytest.mark.parity
def test_native_code_that_keeps_the_lock_is_found_and_its_stack_is_seen(start):
    ranks = start(2, "1:hold:5")
    fault = ended_together(ranks, 76)
    # No thread of it runs, the one that publishes neither: it looks like a host that is gone, and its watch still gets the stack.
    assert (fault["kind"], fault["rank"], fault["step"]) == ("silent host", 1, 5)
    assert "holds Python's lock" in fault["cause"] and "_misbehave" in ranks.stacks(1)


@pytest.mark.fault(
    "SIGKILL of a watch (as when a host goes)",
    happens="its rank dies with it; the others name it and end",
    lost="the steps since the newest complete checkpoint, which the next start takes again",
)
@pytest.mark.parity
def test_a_watch_that_is_killed_takes_its_rank_along_and_the_others_find_out(start):
    ranks = start(2, stall=60)  # found by the lost connection, long before anybody has waited too long
    ranks.trains(0)
    pid = ranks.trains(1).pid
    ranks.processes()
    ranks.watches[1].kill()
    ranks.wait_for(lambda: gone(pid), 10)
    fault = ranks.fault()
    assert ranks.codes() == [76, -signal.SIGKILL], ranks.output()
    assert (fault["kind"], fault["rank"], fault["phase"]) == ("silent host", 1, "step")
    assert "gone without a word" in fault["cause"]


@pytest.mark.fault(
    "the watch of rank 0 stops while another rank hangs",
    happens="another watch judges",
    lost="the steps since the newest complete checkpoint, which the next start takes again",
)
@pytest.mark.parity
def test_without_rank_zeros_watch_another_one_judges(start):
    ranks = start(2, "alone,0:sleep:60,1:sleep:50")
    ranks.trains(0)
    os.kill(ranks.watches[0].pid, signal.SIGSTOP)
    fault = ranks.fault()
    assert (fault["kind"], fault["rank"]) == ("stalled", 1)
    os.kill(ranks.watches[0].pid, signal.SIGCONT)
    assert ranks.codes() == [76, 76], ranks.output()


@pytest.mark.fault(
    "an exception on one rank",
    happens="named with its error; all end with 76",
    lost="the steps since the newest complete checkpoint, which the next start takes again",
)
def test_a_rank_that_fails_by_itself_is_named_with_its_error(start):
    ranks = start(2, "1:raise:5")
    fault = ended_together(ranks, 76)
    assert (fault["kind"], fault["rank"], fault["step"], fault["code"]) == ("crashed", 1, 5, 76)
    assert fault["cause"].startswith("ZeroDivisionError: a bug")


@pytest.mark.fault(
    "a mistake in the data that only one rank sees",
    happens="all ranks end with 2 and its one line; no restart",
    lost="nothing",
)
def test_a_mistake_that_one_rank_sees_ends_all_with_code_2(start):
    ranks = start(2, "alone,1:mistake:-1")
    fault = ended_together(ranks, 2)
    assert (fault["kind"], fault["rank"], fault["code"]) == ("mistake", 1, 2)
    assert "error: shard-000003.tar is cut short" in ranks.output()


@pytest.mark.parity
def test_a_rank_that_leaves_is_followed_within_bounds_and_is_no_fault(start):
    ranks = start(2, "alone,1:leave:50,0:sleep:50")
    assert ranks.codes() == [75, 75], ranks.output()
    assert not ranks.left() and not list((ranks.folder / "health").glob("fault-*"))


@pytest.mark.parity
def test_a_rank_that_fails_because_another_one_has_left_is_no_fault(start):
    """A second signal ends a rank at once: the others lose it in the middle of a collective."""
    ranks = start(2, "1:leave:200", stall=60)  # nobody is taken for stalled meanwhile
    first = ranks.trains(0).pid
    os.kill(ranks.watches[1].pid, signal.SIGSTOP)  # it says so only when rank 0 is looked after already
    ranks.wait_for(lambda: gone(first))
    time.sleep(0.7)
    os.kill(ranks.watches[1].pid, signal.SIGCONT)
    assert ranks.codes() == [75, 75], ranks.output()
    assert not ranks.left() and not list((ranks.folder / "health").glob("fault-*"))


@pytest.mark.parametrize(
    "faults, code, file", [("leave", 75, "leaving"), ("mistake", 2, "fault"), ("raise", 76, "fault")]
)
def test_a_world_of_one_leaves_the_same_files_for_restart(start, faults, code, file):
    ranks = start(1, f"alone,0:{faults}:5")
    assert ranks.codes() == [code], ranks.output()
    (found,) = (ranks.folder / "health").glob(f"{file}-pid-{ranks.watches[0].pid}.json")
    # What torchrun makes of every code but 0 is 1.
    assert restart(str(ranks.folder), 1, wait=False) == (75 if code == 76 else code)
    assert read_attempts(ranks.folder)[-1].code == (1 if code == 76 else code)
    assert json.loads(found.read_text()).get("kind", "leaves") == {75: "leaves", 2: "mistake", 76: "crashed"}[code]


def test_a_signal_that_is_ignored_from_outside_stays_ignored(start):
    """nohup: the terminal goes, training does not."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ranks = start(1, "alone")
    finally:
        signal.signal(signal.SIGHUP, before)
    step = ranks.trains(0).step or 0
    ranks.watches[0].send_signal(signal.SIGHUP)
    ranks.trains(0, step + 200)
    assert ranks.watches[0].poll() is None
    ranks.watches[0].send_signal(signal.SIGUSR1)
    assert ranks.codes() == [75], ranks.output()


def test_signals_reach_training_and_one_that_still_starts_is_ended_at_once(start):
    ranks = start(1, "alone")
    ranks.trains(0)
    ranks.watches[0].send_signal(signal.SIGUSR1)
    assert ranks.codes() == [75], ranks.output()
    interrupted = start(1, "alone")
    interrupted.trains(0)
    interrupted.watches[0].send_signal(signal.SIGINT)
    assert interrupted.codes() == [130], interrupted.output()
    starting = start(1, "alone,0:sleep:-1")
    starting.wait_for(starting.processes)
    starting.watches[0].send_signal(signal.SIGTERM)
    assert starting.codes(10) == [75], starting.output()
    assert not starting.left() and not list((ranks.folder / "health").glob("fault-*"))


@pytest.mark.fault(
    "the run folder hangs while a watch writes",
    happens="the watch and its rank still end, within a bound",
    lost="the stacks of that rank",
)
@pytest.mark.parity
def test_a_watch_that_hangs_on_a_file_system_still_ends_with_its_rank(tmp_path):
    run = tmp_path / "run"
    stacks = run / "logs" / "stacks-here-0-1"
    stacks.mkdir(parents=True)
    os.mkfifo(stacks / "rank-00000.txt")  # whoever opens it to write waits for a reader that never comes
    code = (
        "import sys; from pretrain.watching import watch; watch.GUARD_SECONDS = 3.0; arguments = sys.argv[1:]\n"
        "sys.exit(watch.watch(arguments, [sys.executable, '-m', 'tests.pretrain.watch_worker', *arguments]))"
    )
    options = ["--run.dir", str(tmp_path), "--run.name", "run", "--health.beat_seconds", "0.2"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *options, "--health.stall_seconds", "2"],
        cwd=ROOT,
        env=environment(
            FAULTS="alone,0:sleep:5", TORCHELASTIC_RUN_ID="here", RANK="0", WORLD_SIZE="1", MASTER_PORT="1"
        ),
        capture_output=True,
        text=True,
        timeout=60,
    )
    record = read_published(run, 0)
    assert done.returncode == 76 and "rank 0 on" in done.stderr and "stalled in phase step, step 5" in done.stderr
    assert record is not None and time.monotonic() - began < 40 and goes(record.pid)


def test_what_cannot_be_watched_is_a_mistake_before_anything_is_started(tmp_path):
    from data.errors import InputError
    from pretrain.watching.watch import watch

    for arguments, said in (
        (["sample", "--run", "x"], "what can be watched is training"),
        ([], "what can be watched is training"),
        (["train", "--health.stal_second", "1"], "unknown key health.stal_second: did you mean health.stall_seconds"),
    ):
        with pytest.raises(InputError, match=said):
            watch(arguments, ["touch", str(tmp_path / "started")])
    assert not list(tmp_path.iterdir())
    # What `train` takes beside its config is taken here, too.
    assert watch(["train", "--profile", "3-5", "--run.dir", str(tmp_path)], ["true"]) == 0
    assert watch(["train", "--help"], ["true"]) == 0
