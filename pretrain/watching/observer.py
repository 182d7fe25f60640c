"""What a watch sees in the run folder, looked at by a thread: a shared file system that hangs must not hold up the watch itself."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from pretrain.watching.faults import Fault, FaultFile
from pretrain.watching.heartbeat import Record, read_in_place, read_published, write_in_place
from pretrain.watching.judge import Age, Limits, culprit
from pretrain.watching.own import OwnRank, PatientClock

POLL_SECONDS = 1.0
_FILES_AT_ONCE = 64  # read between two looks at the fault file
_NOTE_BYTES = 1024


class Observer:
    """fault, leaving: what was found so far. verdict: what the last two looks at all ranks agree on, None if nothing is wrong.

    judging: whether to read all ranks' records and judge them (set by the watch).
    """

    def __init__(self, folder: Path, own: OwnRank, limits: Limits, faults: FaultFile, *, believe_old: bool):
        """believe_old: this start's name was never used before, so everything that carries it is of this start."""
        self.fault: Optional[Fault] = None
        self.leaving = False
        self.verdict: Optional[Fault] = None
        self._rank, self._world, self._launch = own.record.rank, own.record.world, own.record.launch
        self.judging = self._rank == 0
        self._folder, self._own, self._limits, self._faults = folder, own, limits, faults
        self._clock = PatientClock()
        self._suspect: Optional[Fault] = None
        self._seen: dict[int, tuple[Optional[Record], float]] = {}
        # Records of an earlier start of the same name look like this one's until they change.
        read_old = self._rank == 0 and not believe_old
        self._old = {r: found for r in range(self._world) if (found := self.record(r))} if read_old else {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="observer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Asks the thread to end, without waiting for it: it may hang on the file system."""
        self._stop.set()

    def record(self, rank: int) -> Optional[Record]:
        """What a rank published last in this start, None if nothing."""
        found = read_published(self._folder, rank)
        return found if found and found.launch == self._launch else None

    def note(self, rank: int) -> dict[str, Any]:
        """What a rank's watch says of it, {} if nothing: `process` (late, stopped, blocked, ended CODE) and its last beat."""
        values = read_in_place(self._note_path(rank)) or {}
        return values if values.get("launch") == self._launch else {}

    def write_note(self, process: str) -> None:
        """Says what this watch knows of its own rank, for the judge. OSError if the folder cannot be written."""
        path, own = self._note_path(self._rank), self._own.record
        if not process:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        known = ("rank", "host", "launch", "pid", "phase", "step", "doing", "beats")
        values = {key: getattr(own, key) for key in known}
        write_in_place(path, {**values, "process": process, "time": round(time.time(), 3)}, _NOTE_BYTES)

    def _look(self) -> None:
        period = min(POLL_SECONDS, self._limits.beat)
        written: Optional[str] = None
        next_reading = 0.0
        while not self._stop.wait(period):
            self._clock.tick()
            self._look_at_marks()
            if self.fault:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGCHLD)  # the watch waits for signals
            own = self._own
            late = own.idle >= self._limits.of(own.record.phase) / 2
            if (process := own.process or ("late" if late else "")) != written:
                with contextlib.suppress(OSError):
                    self.write_note(process)
                    written = process
            if self.judging and self._clock.seconds >= next_reading:
                self._read()
                self._judge()
                next_reading = self._clock.seconds + self._limits.beat

    def _look_at_marks(self) -> None:
        self.fault = self.fault or self._faults.read()
        self.leaving = self.leaving or self._faults.leaving()

    def _read(self) -> None:
        for rank in range(self._world):
            if rank % _FILES_AT_ONCE == _FILES_AT_ONCE - 1:
                self._look_at_marks()
            found = self.record(rank)
            if found is not None and found == self._old.get(rank):
                found = None
            now = self._clock.tick()
            before = self._seen.get(rank)
            if before is None or (found is not None and found != before[0]):
                self._seen[rank] = (found, now)

    def _judge(self) -> None:
        """A verdict needs two looks in a row that agree: one alone may have met the records half way through a change."""
        now = self._clock.seconds
        records: dict[int, Optional[Record]] = {}
        ages: dict[int, Age] = {}
        for rank in range(self._world):
            record, since = self._seen[rank]
            unchanged = now - since
            if rank == self._rank:
                collectives = record.collectives if record else {}
                records[rank] = replace(self._own.record, collectives=collectives)
                ages[rank] = Age(unchanged, self._own.idle, self._own.process)
                continue
            suspicious = record is None or unchanged >= 1.5 * self._limits.beat
            note = self.note(rank) if suspicious else {}
            if record is not None and note.get("beats", 0) > record.beats:
                # Its watch has seen further than the rank itself could say.
                record = replace(record, **{key: note[key] for key in ("phase", "step", "doing", "beats")})
            records[rank] = record
            ages[rank] = Age(unchanged, unchanged + (record.idle if record else 0.0), str(note.get("process", "")))
        suspect = culprit(records, ages, self._limits)
        same = suspect and self._suspect and (suspect.kind, suspect.rank) == (self._suspect.kind, self._suspect.rank)
        self._suspect = suspect
        self.verdict = suspect if same else None

    def _note_path(self, rank: int) -> Path:
        return self._folder / "health" / f"watch-{rank:05d}.json"
