"""What a watch knows of its own rank: its beats from memory, its process from the kernel."""

from __future__ import annotations

import os
import socket
import time
from mmap import mmap
from typing import Any

from pretrain.watching.cause import memory_kills
from pretrain.watching.faults import FAULT, Fault, Kind
from pretrain.watching.heartbeat import HEARTBEAT, RECORD_BYTES, Record, read_local
from pretrain.watching.stacks import STACKS, process_state

STOPPED_SECONDS, BLOCKED_SECONDS = 1.0, 5.0  # in state T, in state D, before anything is made of it
_KILLS_EVERY = 5  # looks


class PatientClock:
    """Seconds in which this process really ran: a pause of the host, or of the watch alone, ages nothing."""

    LONGEST_STEP = 5.0

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> float:
        now = time.monotonic()
        self.seconds += min(now - self._last, self.LONGEST_STEP)
        self._last = now
        return self.seconds


class OwnRank:
    """record, idle: where the rank is, and the seconds since its last beat. stopped: seconds since its process was stopped, 0 if it
    is not. process: `stopped`, `blocked` in the kernel, or "". kills: what the kernel had killed for memory a few seconds ago,
    and lately.
    """

    def __init__(self, rank: int, world: int, launch: str):
        self._about: dict[str, Any] = {"rank": rank, "world": world, "host": socket.gethostname(), "launch": launch}
        # In memory: no file system can hold up the training process there, and nothing stays behind.
        self._beats_file, self.answers = os.memfd_create("heartbeat", 0), os.memfd_create("stacks", 0)
        os.ftruncate(self._beats_file, RECORD_BYTES)
        self._beats = mmap(self._beats_file, RECORD_BYTES)
        self.files = (self._beats_file, self.answers)
        self.environ = {HEARTBEAT: f"/proc/self/fd/{self._beats_file}", STACKS: f"/proc/self/fd/{self.answers}"}
        self.record, self.idle, self.stopped, self.process = Record(**self._about), 0.0, 0.0, ""
        self.kills = [memory_kills()] * 2
        self._clock = PatientClock()
        self._seen_beats, self._beat_at, self._state, self._state_since, self._looks = 0, 0.0, "", 0.0, 0

    @property
    def seconds(self) -> float:
        """A clock that a pause of this process does not move on."""
        return self._clock.seconds

    def look(self, pid: int) -> None:
        """Once a second."""
        now = self._clock.tick()
        record = read_local(self._beats) or Record()
        if record.beats != self._seen_beats:
            self._seen_beats, self._beat_at = record.beats, now
        self.record = Record(**{**vars(record), **self._about, "pid": pid})
        self.idle = now - self._beat_at
        state = process_state(pid)
        if state != self._state:
            self._state, self._state_since = state, now
        since = now - self._state_since
        self.stopped = since if state in ("T", "t") else 0.0
        blocked = state == "D" and since >= BLOCKED_SECONDS
        self.process = "stopped" if self.stopped >= STOPPED_SECONDS else "blocked" if blocked else ""
        self._looks += 1
        if self._looks % _KILLS_EVERY == 0:
            self.kills = [self.kills[1], memory_kills()]

    def fault(self, kind: Kind, cause: str, code: int = FAULT) -> Fault:
        """A fault of this rank, where it is now."""
        self.look(self.record.pid)
        r = self.record
        return Fault(kind, r.rank, r.host, r.phase, r.step, r.doing, cause, code)
