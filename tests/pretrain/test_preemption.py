"""Asked to leave, by whatever signal on whichever rank: all ranks save and leave with 75, and nothing is lost or done twice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from parallel import checkpoint
from pretrain.loop.preemption import ASKS_FOR_REQUEUE, SAME_REQUEST_SECONDS
from tests.distributed.launch import run, start
from tests.pretrain.test_training_run import STEPS, arguments, metrics, stored_state

OVERRIDES = {"data.workers": 1, "train.validate_every": 2, "train.checkpoint_every": 0, "train.keep_checkpoints": 9}


def until_step(folder: Path, step: int, ranks: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").exists() and len(metrics(folder)) >= step):
        assert time.monotonic() < deadline and all(p.poll() is None for p in ranks), "the run ended too early"
        time.sleep(0.01)


def whole_step(process: subprocess.Popen, number: signal.Signals) -> None:
    """As Slurm does: every process of the job step gets it, those of the loader too."""
    os.killpg(process.pid, number)


def members(group: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ended(ranks: list[subprocess.Popen], seconds: float = 60) -> list[int]:
    try:
        for p in ranks:
            p.communicate(timeout=seconds)
    finally:
        for p in ranks:
            p.kill()
    return [p.returncode for p in ranks]


@pytest.mark.fault(
    "USR1 or SIGTERM to any one rank, loader processes included, three times in one run",
    happens="all ranks agree at the next step boundary, save, and leave with exit code 75; the next start goes on",
    lost="nothing: every step, metric and validation once, the same bits as an uninterrupted run",
)
@pytest.mark.parity
def test_three_requests_to_leave_lose_and_repeat_nothing(corpus, tmp_path, measured):
    run("pretrain", arguments(corpus, tmp_path, "straight", **OVERRIDES), 2)
    command = arguments(corpus, tmp_path, "asked", **OVERRIDES)
    folder, left, waited = tmp_path / "asked", [], []
    for number, (step, who, name) in enumerate([(4, 1, "USR1"), (12, 0, "TERM"), (20, 1, "TERM")]):
        ranks = start("pretrain", command, 2)
        until_step(folder, step, ranks)
        asked = time.monotonic()
        whole_step(ranks[who], signal.Signals[f"SIG{name}"])
        whole_step(ranks[who], signal.Signals[f"SIG{name}"])  # forwarded by a parent: still one request
        assert ended(ranks) == [ASKS_FOR_REQUEUE] * 2
        waited.append(time.monotonic() - asked)
        newest = checkpoint.latest(folder / "checkpoints")
        left.append(checkpoint.read_trainer(newest)["step"])
        assert left[-1] == len(metrics(folder)) < STEPS and len(left) == number + 1
        said = (folder / "logs" / f"rank-{who:05d}.log").read_text()
        assert f"SIG{name} came: asking all ranks to leave behind step {left[-1]}" in said
    assert left == sorted(set(left))
    run("pretrain", command, 2)
    assert metrics(folder) == metrics(tmp_path / "straight")
    assert metrics(folder, "val/") == metrics(tmp_path / "straight", "val/")
    straight, asked = stored_state(tmp_path / "straight"), stored_state(folder)
    assert [name for name in straight if not torch.equal(straight[name], asked[name])] == []
    measured("longest from signal to end", f"{max(waited):.1f} s")


@pytest.mark.fault(
    "a second signal while a rank is stuck in a collective (its peer is stopped)",
    happens="the process ends at once with exit code 75, and its loader processes with it",
    lost="the steps since the newest complete checkpoint, which stands",
)
@pytest.mark.parity
def test_a_second_request_ends_the_process_at_once_even_inside_a_collective(corpus, tmp_path, measured):
    command = arguments(corpus, tmp_path, "stuck", **OVERRIDES | {"train.checkpoint_every": 5})
    ranks = start("pretrain", command, 2)
    try:
        until_step(tmp_path / "stuck", 8, ranks)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        ranks[0].send_signal(signal.SIGUSR1)
        time.sleep(SAME_REQUEST_SECONDS + 0.5)
        assert ranks[0].poll() is None, "it cannot leave alone after one request"
        again = time.monotonic()
        ranks[0].send_signal(signal.SIGUSR1)
        assert ranks[0].wait(timeout=20) == ASKS_FOR_REQUEUE
        measured("ended after", f"{time.monotonic() - again:.1f} s")
        assert time.monotonic() - again < 5
        deadline = time.monotonic() + 30
        while left := members(ranks[0].pid):
            assert time.monotonic() < deadline, f"it left behind {left}"
            time.sleep(0.2)
    finally:
        for p in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)
            p.communicate()
    newest = checkpoint.latest(tmp_path / "stuck" / "checkpoints")
    assert newest is not None and checkpoint.read_trainer(newest)["step"] >= 5
    again = run("pretrain", [*command, "--train.stop_at", "12"], 2)
    assert "resumed" in again[0] and len(metrics(tmp_path / "stuck")) == 12


def test_after_the_last_step_there_is_nothing_to_leave(corpus, tmp_path):
    """A request that comes with the last step ends a finished run: 0, not 75, or Slurm would requeue it for ever."""
    command = arguments(
        corpus, tmp_path, "done", **OVERRIDES | {"train.stop_at": 1, "train.validate_every": 1, "data.workers": 0}
    )
    ranks = start("pretrain", command, 1)
    until_step(tmp_path / "done", 1, ranks)
    ranks[0].send_signal(signal.SIGUSR1)
    assert ended(ranks) == [0]
