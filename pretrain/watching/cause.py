"""Why a training process ended: from its exit code, the kernel's counts, and the last words in its log."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

TAIL_BYTES = 64 << 10
_FIRST = re.compile(r"error: rank (\d+) on (\S+) failed first: (.*)")
_ERROR = re.compile(r"^(?:[\w.]+ )?((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b.*|error: .*|\s*what\(\):.*)")
# What a rank says whose peer is gone or does not answer: it is seldom the first cause.
_LOST = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|broken pipe|closed by peer|by peer|timed out waiting|"
    r"remote process exited|network error|recvValue|sendBytes|nccl (watchdog|error|communicator was aborted)|"
    r"watchdog caught|the store does not answer|DistNetworkError|DistStoreError|Read timeout|socket",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LastWords:
    """rank, host: of the rank that failed first as the ranks agreed, None and "" if they did not. cause: one line, "" if none.

    follows: it reads like the consequence of another rank's end.
    """

    rank: Optional[int] = None
    host: str = ""
    cause: str = ""

    @property
    def follows(self) -> bool:
        return bool(_LOST.search(self.cause))


def last_words(log: Path, start: int) -> LastWords:
    """The error that ended a process, from what it added to its log behind byte `start`."""
    try:
        with open(log, "rb") as file:
            end = file.seek(0, 2)
            file.seek(max(start if start <= end else 0, end - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return LastWords()
    for line in reversed(lines):
        if found := _FIRST.search(line):
            host = found[2] if found[2] != "?" else ""
            return LastWords(int(found[1]), host, found[3][:500])
    for line in reversed(lines):
        if found := _ERROR.match(line):
            return LastWords(cause=" ".join(found[1].split())[:500])
    return LastWords()


def how_it_ended(code: int, kills_before: int, kills_now: int) -> str:
    """An exit code in words. kills_*: `memory_kills` a few seconds before the end, and now."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    if -code == signal.SIGKILL and kills_now > kills_before:
        return (
            f"killed by signal {-code} ({name}): out of memory, the kernel's killer was at work on this host just then"
        )
    meaning = {
        signal.SIGKILL: "; from outside: an administrator, the scheduler, or a memory limit",
        signal.SIGBUS: "; a bad memory page, or a full /dev/shm",
        signal.SIGSEGV: "; a fault in native code",
        signal.SIGILL: "; an instruction that this processor does not have",
    }.get(signal.Signals(-code) if name != "unknown" else signal.SIGHUP, "")
    return f"killed by signal {-code} ({name}){meaning}"


def memory_kills() -> int:
    """Processes that the kernel killed for memory since this host started; 0 if it does not say."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
