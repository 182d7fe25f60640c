"""Where every thread of a training process is: told by its own signal handler, or seen from outside when it cannot answer."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO, Optional

STACKS = "PALIMPSEST_STACKS"  # set by `watch`: the path of a file in memory that the handler writes to
ANSWER_SECONDS = 5.0  # for the process itself
OUTSIDE_SECONDS = 8.0  # for py-spy
_STATUS = {"State", "TracerPid", "Threads", "VmRSS", "VmSwap", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"} | {
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
}
_STILL_SECONDS = 0.4  # nothing more came for so long: the answer is complete

_file: Optional[BinaryIO] = None  # the handler writes to its descriptor as long as the process lives


def register_stack_dump() -> None:
    """Makes this process write the stacks of all its threads to the file that the watch names, whenever SIGUSR2 comes.

    The handler is C code that needs neither Python's lock nor the main thread. Without a watch: to standard error.
    """
    global _file
    path = os.environ.get(STACKS, "")
    try:
        _file = open(path, "ab", buffering=0) if path else None
    except OSError:
        _file = None
    faulthandler.register(signal.SIGUSR2, file=_file.fileno() if _file is not None else 2, all_threads=True)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; without one most signals would end it."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    except (OSError, ValueError, IndexError):
        pass
    return False


def process_state(pid: int) -> str:
    """The kernel's letter for a process: R, S runs or sleeps, D blocked in the kernel, T, t stopped, Z ended; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def dump_stacks(pid: int, answers: int, header: str = "") -> str:
    """The stacks of a process as text: its own answer if it can still give one, and what can be seen from outside if not.

    answers: a descriptor of the file that the process's handler appends to. Takes at most ANSWER_SECONDS + OUTSIDE_SECONDS and a
    little. Never raises for a process that is gone or cannot be looked at: the text says so.
    """
    state = process_state(pid)
    said = [f"{header}process {pid}, state {state or 'gone'}"]
    inside = _from_inside(pid, answers) if state in ("R", "S") else ""
    if inside:
        said.append("from inside, by its own signal handler:\n" + inside)
    else:
        said.append(_why_outside(state))
        said.append(_py_spy(pid))
        said.append(_kernel(pid))
    return "\n\n".join(said) + "\n"


def _from_inside(pid: int, answers: int) -> str:
    """What the handler writes, "" if it is not there or does not answer in time."""
    if not catches(pid, signal.SIGUSR2):
        return ""
    start = size = os.fstat(answers).st_size
    try:
        os.kill(pid, signal.SIGUSR2)
    except OSError:
        return ""
    asked = changed = time.monotonic()
    while (now := time.monotonic()) - asked < ANSWER_SECONDS and (size == start or now - changed < _STILL_SECONDS):
        time.sleep(0.05)
        if (grown := os.fstat(answers).st_size) != size:
            size, changed = grown, time.monotonic()
    return os.pread(answers, size - start, start).decode(errors="replace")


def _why_outside(state: str) -> str:
    reasons = {
        "T": "it is stopped (SIGSTOP) and cannot answer",
        "t": "a debugger holds it and it cannot answer",
        "D": "it is blocked in the kernel (storage or a driver) and cannot answer",
        "Z": "it has ended",
        "": "it is gone",
    }
    return "from outside: " + reasons.get(state, f"it did not answer the signal within {ANSWER_SECONDS:.0f} s")


def _py_spy(pid: int) -> str:
    program = _find_py_spy()
    if program is None:
        return "Python's stacks: py-spy is not installed (pip install -r requirements.txt)"
    try:
        # nonblocking: it must not stop the process, whose other threads may be what is looked for.
        done = subprocess.run(
            [program, "dump", "--pid", str(pid), "--nonblocking"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=OUTSIDE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"Python's stacks: py-spy did not end within {OUTSIDE_SECONDS:.0f} s"
    except OSError as error:
        return f"Python's stacks: py-spy cannot be started ({error.strerror})"
    if done.returncode:
        return f"Python's stacks: py-spy cannot read them: {' '.join(done.stderr.split())[:300]}"
    return "Python's stacks, read by py-spy:\n" + done.stdout.rstrip()


def _find_py_spy() -> Optional[str]:
    beside = Path(sys.executable).with_name("py-spy")  # of a virtual environment that is not activated
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("py-spy")


def _kernel(pid: int) -> str:
    """What the kernel says of every thread: its name, its state, where it sleeps."""
    lines = ["threads, as the kernel sees them (state, name, where it waits):"]
    with contextlib.suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda path: int(path.name)):
            state = "".join(_read(task / "stat").rpartition(")")[2].split()[:1])
            where, call = _read(task / "wchan").strip().strip("0"), _read(task / "syscall").split()
            waits = f"{where or '-'}, system call {call[0]}" if call else where or "-"
            lines.append(f"  {task.name} {state} {_read(task / 'comm').strip()}: {waits}")
    stack = _read(Path(f"/proc/{pid}/stack")).rstrip()
    if stack:
        lines.append("kernel stack of the main thread:\n" + stack)
    status = _read(Path(f"/proc/{pid}/status")).splitlines()
    lines += ["status:", *("  " + line for line in status if line.split(":")[0] in _STATUS)]
    return "\n".join(lines)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
