"""The training process as its watch holds it: it cannot outlive the watch, and ends with all that it started. Linux."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Optional

END_SECONDS = 5.0  # for killed processes to go: the kernel needs longer only where storage or a driver hangs
TRACKER_SECONDS = 2.0  # for multiprocessing's resource tracker to clear up what the others left in shared memory
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_PTRACER = 1, 36, 0x59616D61
_ANYBODY = ctypes.c_ulong(-1)


class Child:
    """One process in a group of its own, whose descendants become this process's when their parents end."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], files: Sequence[int], mask: set[int]):
        """Starts `command`. Call it in the main thread: the kernel ends the child when the thread that started it ends.

        files: descriptors that it inherits under the same numbers. mask: signals blocked in it.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        watch = os.getpid()

        def before_exec() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            libc.prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)  # py-spy, started by the watch, is no ancestor of the child
            if os.getppid() != watch:
                os._exit(1)  # the watch was gone before the kernel knew
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        self._process = subprocess.Popen(
            list(command),
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            pass_fds=tuple(files),
            process_group=0,
            preexec_fn=before_exec,
        )
        self.pid = self._process.pid

    def send(self, number: int) -> None:
        """A signal to the process alone."""
        if self.code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def code(self) -> Optional[int]:
        """Exit code, or minus the signal that killed it; None while it runs. Keeps its process id taken until `end`."""
        if self._process.returncode is not None:
            return self._process.returncode
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def end(self) -> bool:
        """Kills what is left of the process and of all that it started; whether nothing is left within END_SECONDS."""
        began = time.monotonic()
        while left := list(self._left()):
            waited = time.monotonic() - began
            if waited > END_SECONDS:
                return False
            for pid in left:
                if waited > TRACKER_SECONDS or not _is_tracker(pid):
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        if self._process.returncode is None:
            self._process.wait(END_SECONDS)
        return True

    def kill_group(self) -> None:
        """At once and without waiting."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _left(self) -> Iterator[int]:
        """Processes of the child's group, and others that came to this process when their parents ended."""
        mine = os.getpid()
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            pid, state, parent, group = int(entry), fields[0], int(fields[1]), int(fields[2])
            if parent == mine and pid != self.pid and state == "Z":
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            elif state not in "ZX" and (group == self.pid or parent == mine):
                yield pid


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
