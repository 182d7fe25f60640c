"""The processes that train cells on this machine: one at a time in each place, all of them gone when this process is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from pretrain.study.running.results import End, last_word

LEAVE_SECONDS = 120.0  # for asked cells to save
_PR_SET_PDEATHSIG = 1
_TAIL = 16384  # bytes of a log's end that its last word is looked for in


class CellProcess:
    """Training of one cell, watched; what it says goes to a log. It is asked to leave when this process ends, however that does."""

    def __init__(self, name: str, config: Path, log: Path, ranks: int, environ: dict[str, str]):
        """Starts it. Call it in the main thread: the kernel tells a child when the thread that started it ends."""
        self.name, self.log, self.began = name, log, time.monotonic()
        self.asked = False
        words = ["-m", "pretrain", "watch", "train", "--config", str(config)]
        if ranks > 1:
            words = ["-m", "pretrain.study.running.ranks", str(ranks), *words]
        libc = ctypes.CDLL(None, use_errno=True)
        parent = os.getpid()

        def before_exec() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != parent:
                os._exit(75)

        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            self._from = out.tell()
            self._process = subprocess.Popen(
                [sys.executable, *words],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=before_exec if sys.platform == "linux" else None,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def code(self) -> Optional[int]:
        """Exit code, minus the signal that ended it; None while it runs."""
        return self._process.poll()

    def leave(self) -> None:
        """Asks it, once, to save and leave."""
        if not self.asked and self._process.poll() is None:
            self.asked = True
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and all in its group, at once, and its ranks: torchrun starts them in sessions of their own."""
        ranks = _children(self._process.pid) if self._process.poll() is None else []
        for group in (self._process.pid, *ranks):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)

    def end(self, tries: int) -> End:
        """How it ended, with its last word."""
        return End(self.code() or 0, said_last(self.log, self._from), tries, round(time.time(), 3))


def _children(pid: int) -> list[int]:
    """Processes that `pid` started and that still run; none where the kernel does not say."""
    found: list[int] = []
    for path in Path("/proc", str(pid), "task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def said_last(log: Path, start: int = 0) -> str:
    """The last word of a log, of what lies behind byte `start`."""
    try:
        with open(log, "rb") as file:
            file.seek(max(start, os.fstat(file.fileno()).st_size - _TAIL))
            return last_word(file.read().decode(errors="replace").splitlines())
    except OSError:
        return ""


def environment(place: int, jobs: int, ranks: int, gpus: int) -> dict[str, str]:
    """Of the cell in place number `place` of `jobs`: its share of the cores, its GPUs if there are enough for all, else none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // (jobs * ranks)))
    shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices: Sequence[str] = shown or [str(number) for number in range(gpus)]
    mine = devices[place * ranks : (place + 1) * ranks] if gpus >= jobs * ranks else []
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    outside = {key: value for key, value in os.environ.items() if key not in launched}
    own = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ",".join(mine), "PYTHONUNBUFFERED": "1"}
    # torchrun would kill ranks that save for more than 30 seconds; releases that do not know the variable do.
    return {**outside, **own, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{LEAVE_SECONDS - 10:.0f}"}
