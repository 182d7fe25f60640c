"""Starts real ranks of a worker module over gloo on 127.0.0.1 and waits for them, never for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.submission.slurm_start import candidates, hold_port

ROOT = Path(__file__).resolve().parents[2]


# Below what the kernel hands out by itself.
_PORTS = range(10000, 16000)
_held: list[socket.socket] = []


def meeting_port() -> int:
    """A port of this host where ranks may meet, kept from everybody else as long as this process lives: between looking for a free
    one and its use lie the seconds in which rank 0 imports torch.
    """
    _held.append(hold_port(candidates(os.getpid(), _PORTS)))
    return _held[-1].getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without any launcher's variables, one thread a rank."""
    inherited = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        **extra,
    }


def start(
    module: str, arguments: Sequence[str], world: int, of_rank: Sequence[Sequence[str]] = ()
) -> list[subprocess.Popen]:
    """`world` ranks of `python -m module arguments`, as a launcher would start them, each in one new process group.

    of_rank: further arguments of each rank alone.
    """
    port = str(meeting_port())
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments, *(of_rank[r] if of_rank else ())],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(
                RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
        )
        for r in range(world)
    ]


def wait(ranks: list[subprocess.Popen], timeout: float) -> list[str]:
    """The output of every rank; all must end with exit code 0 within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while any(p.poll() is None for p in ranks) and time.monotonic() < deadline:
        if any(p.returncode for p in ranks):  # the others would wait for a rank that is gone
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.05)
    for p in ranks:
        p.kill()
    said = [p.communicate()[0] for p in ranks]
    codes = [p.returncode for p in ranks]
    assert codes == [0] * len(ranks), f"exit codes {codes}\n" + "\n".join(
        f"--- rank {i}\n{s[-4000:]}" for i, s in enumerate(said)
    )
    return said


def run(module: str, arguments: Sequence[str], world: int, timeout: float = 180) -> list[str]:
    return wait(start(module, arguments, world), timeout)
