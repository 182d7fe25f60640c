"""What lies in a run folder, read as it is found: half-written, damaged and missing files are facts like others, never errors.

Nothing here writes, takes a lock, or asks another rank; torch is not imported.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, get_args

import yaml

from parallel.checkpoint_names import TRAINER, latest, step_of
from pretrain.status.spool import Spool, number
from pretrain.tracking.run_events import read_events
from pretrain.watching.faults import Fault, Kind, fault_from
from pretrain.watching.heartbeat import Record, read_published

QUEUE_SECONDS = 5.0  # for squeue
_TAIL_BYTES = 1 << 18
_JOBS = 8
_WRITING = re.compile(r"\.writing-step-(\d{8})")


@dataclass(frozen=True)
class Heard:
    """What a rank last published of itself, and when: `age` seconds ago."""

    record: Record
    age: float

    @property
    def idle(self) -> float:
        """Seconds without progress, up to now."""
        return self.record.idle + self.age


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint. age: seconds; bytes: of all its files."""

    step: int
    path: Path
    age: float
    bytes: int
    trainer: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A job in Slurm's queue."""

    job: str
    state: str  # as squeue names it: PENDING, RUNNING, COMPLETING, ...
    reason: str
    start: str  # expected, or when it began
    nodes: str


@dataclass
class Records:
    """Everything that a run folder says. missing: what is not there or cannot be read, each in words."""

    folder: Path
    now: float
    config: dict[str, Any] = field(default_factory=dict)
    spool: Optional[Spool] = None
    ranks: list[Heard] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, Fault] = field(default_factory=dict)  # by launch
    checkpoint: Optional[StoredCheckpoint] = None
    writing: Optional[int] = None  # step of a checkpoint that is being written, or was left half-written
    jobs: list[str] = field(default_factory=list)  # of Slurm, that were started or submitted, the newest few
    holder: Optional[int] = None  # process of this host that holds the run folder
    events: list[dict[str, Any]] = field(default_factory=list)  # roll-backs, and how training itself said that it ended
    shipped: dict[str, Any] = field(default_factory=dict)
    disk_free: Optional[int] = None
    report: bool = False  # `restart` has given up and said why in health/report.txt
    missing: list[str] = field(default_factory=list)

    def get(self, section: str, key: str, default: Any) -> Any:
        """A value of the run's config; `default` where it is missing or of another type."""
        values = self.config.get(section)
        value = values.get(key, default) if isinstance(values, dict) else default
        fits = isinstance(value, (int, float) if isinstance(default, float) else type(default))
        return value if fits or default is None else default


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's (a shard set or a folder of runs is not)."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "health", "submitted"))


def read_records(folder: Path, now: Optional[float] = None) -> Records:
    """All of a run folder. A few short reads, a rank's record one each."""
    found = Records(folder, time.time() if now is None else now)
    found.config = _config(found)
    found.spool = Spool(folder / "metrics.jsonl")
    if found.spool.problem:
        found.missing.append(f"metrics.jsonl ({found.spool.problem})")
    found.ranks = _ranks(found)
    _attempts(found)
    found.jobs = _jobs(found)
    found.faults = _faults(found)
    _checkpoints(found)
    found.holder = holder(folder / ".lock")
    with contextlib.suppress(OSError, RecursionError):
        found.events = [event for event in read_events(folder) if event["what"] in ("rolled_back", "state")]
    if (folder / "mlflow.json").exists():
        found.shipped = _object(found, "mlflow.json") or {}
    found.report = (folder / "health" / "report.txt").is_file()
    try:
        room = os.statvfs(folder / "checkpoints" if found.checkpoint else folder)
        found.disk_free = room.f_bavail * room.f_frsize
    except OSError as error:
        found.missing.append(f"free disk space ({error.strerror})")
    return found


def _object(found: Records, name: str) -> Optional[dict[str, Any]]:
    """A JSON object of the run folder, None (and noted as missing) if it cannot be read."""
    try:
        content = json.loads((found.folder / name).read_bytes())
    except OSError as error:
        found.missing.append(f"{name} ({error.strerror})")
        return None
    except (ValueError, RecursionError):
        found.missing.append(f"{name} (it is not JSON: half-written or damaged)")
        return None
    if not isinstance(content, dict):
        found.missing.append(f"{name} (it is not an object)")
        return None
    return content


def _config(found: Records) -> dict[str, Any]:
    """The config of the newest start; before the first one, what was submitted."""
    submitted = sorted((found.folder / "submitted").glob("*/config.yaml"), key=_mtime)
    problem = "there is none"
    for path in [found.folder / "config.yaml", *reversed(submitted)]:
        try:
            content = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, yaml.YAMLError):
            problem = "it cannot be read"
            continue
        if isinstance(content, dict):
            return content
        problem = "it is empty or damaged"
    found.missing.append(f"config.yaml ({problem}): the defaults are assumed")
    return {}


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _ranks(found: Records) -> list[Heard]:
    """Every rank's record, by rank. Ages follow from the files' times: of one file server, where the ranks' own clocks are many."""
    heard, damaged = [], 0
    for path in sorted((found.folder / "health").glob("rank-*.json")):
        try:
            age = max(found.now - path.stat().st_mtime, 0.0)
            rank = int(path.stem.removeprefix("rank-"))
            record = read_published(found.folder, rank) or _once_more(found.folder, rank)
        except (OSError, ValueError, TypeError):
            record = None
        if record is None:
            damaged += 1
        else:
            heard.append(Heard(record, age))
    if damaged:
        found.missing.append(f"health: the records of {damaged} ranks cannot be read")
    return heard


def _once_more(folder: Path, rank: int) -> Optional[Record]:
    """A record that was being written just now is whole a moment later."""
    time.sleep(0.02)
    return read_published(folder, rank)


def _attempts(found: Records) -> None:
    """Starts and ends of the run, oldest first: the newest few hundred of them."""
    path = found.folder / "health" / "attempts.jsonl"
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL_BYTES, 0))
            lines = file.read().splitlines()
    except OSError as error:
        found.missing.append(f"health/attempts.jsonl ({error.strerror})")
        return
    damaged = 0
    for raw in lines[1 if size > _TAIL_BYTES else 0 :]:
        try:
            line = json.loads(raw)
            line["time"] = float(line["time"])
            if not math.isfinite(line["time"]):
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            damaged += 1
            continue
        (found.ends if "ended" in line else found.starts).append(line)
    if damaged:
        found.missing.append(f"health/attempts.jsonl: {damaged} lines cannot be read")


def _jobs(found: Records) -> list[str]:
    """Jobs that ran this run, and jobs that were submitted for it (pretrain.submission.submit leaves their numbers)."""
    jobs = [str(start["job"]) for start in found.starts if start.get("job")]
    for path in sorted((found.folder / "submitted").glob("*/job"), key=_mtime)[-_JOBS:]:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            jobs.append(path.read_text().strip())
    return list(dict.fromkeys(jobs))[-_JOBS:]


def _faults(found: Records) -> dict[str, Fault]:
    """Launch -> the fault that ended it."""
    faults = {}
    for path in sorted((found.folder / "health").glob("fault-*.json")):
        try:
            fault = fault_from(path.read_bytes())
        except OSError:
            fault = None
        if fault is None or fault.kind not in get_args(Kind) or number(fault.time) is None:
            found.missing.append(f"health/{path.name} (half-written or damaged)")
        else:
            faults[path.stem.removeprefix("fault-")] = fault
    return faults


def _checkpoints(found: Records) -> None:
    root = found.folder / "checkpoints"
    path: Optional[Path] = None
    with contextlib.suppress(OSError):  # a folder that cannot be listed, or changes meanwhile
        for name in sorted(os.listdir(root)):
            if match := _WRITING.fullmatch(name):
                found.writing = int(match[1])
        path = latest(root)
    if path is None:
        return
    step = step_of(path)
    trainer = _object(found, f"checkpoints/{path.name}/{TRAINER}") or {}
    written = _mtime(path / TRAINER)
    try:
        size = sum(entry.stat().st_size for entry in os.scandir(path))
    except OSError:  # removed meanwhile
        size = 0
    found.checkpoint = StoredCheckpoint(step, path, max(found.now - written, 0.0), size, trainer)


def holder(lock: Path) -> Optional[int]:
    """The process of this host that holds the kernel's lock on a file, None if none does or the kernel does not say.

    Asked of /proc/locks: trying the lock would turn away a run that starts in that moment.
    """
    try:
        inode = lock.stat().st_ino
        held = Path("/proc/locks").read_text()
    except OSError:
        return None
    for line in held.splitlines():
        parts = line.split()  # 1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF
        if len(parts) >= 6 and parts[1] != "->" and parts[5].rsplit(":", 1)[-1] == str(inode):
            return int(parts[4])
    return None


def queue(jobs: Sequence[str]) -> Optional[dict[str, Job]]:
    """Those of `jobs` that Slurm knows; None if there is no Slurm here or it does not answer within QUEUE_SECONDS."""
    wanted = sorted({job for job in jobs if re.fullmatch(r"[\w\[\]-]+", job)})
    if not wanted:
        return {}
    command = ["squeue", "--noheader", f"--jobs={','.join(wanted)}", "--format=%A|%T|%r|%S|%N"]
    try:
        done = subprocess.run(command, text=True, capture_output=True, timeout=QUEUE_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:  # a single job that is long gone is an error to squeue
        return {} if "Invalid job id" in done.stderr else None
    found = {}
    for line in done.stdout.splitlines():
        parts = line.split("|")
        if len(parts) == 5:
            found[parts[0]] = Job(*parts)
    return found
