"""What a rank says of itself while it trains: where it is, and that it still moves.

`beat` costs a few microseconds: it stores one record in a small file in memory, which the rank's own `watch` reads whatever becomes
of this process. A thread rewrites RUN/health/rank-00003.json now and then, for the watch of rank 0 and for people.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from pretrain.launch import launch_name

HEARTBEAT = "PALIMPSEST_HEARTBEAT"  # set by `watch`: the path of the file in memory
PHASES = (
    "start",
    "step",
    "validate",
    "sample",
    "save",
    "end",
)  # in the order in which one step number goes through them
SLOT_BYTES = 256
RECORD_BYTES = 2 * SLOT_BYTES
PUBLISHED_BYTES = (
    2048  # a page or less, rewritten in place: once the file is there, a disk that fills up silences no rank
)
CLOSE_SECONDS = 5.0

_CODE = {phase: code for code, phase in enumerate(PHASES)}
_HEAD = struct.Struct(
    "<QqddBB"
)  # beats, step (-1: none), entered, last beat (monotonic seconds), phase, bytes of `doing`
_CHECK = struct.Struct("<I")


@dataclass(frozen=True)
class Record:
    """One rank at one moment.

    step: the step that is being taken, or that validation, samples and a save follow; None before the first. since, idle:
    seconds in this phase and step, and since the last beat, when the record was made.
    """

    rank: int = 0
    world: int = 1
    host: str = ""
    pid: int = 0
    launch: str = ""
    phase: str = "start"
    step: Optional[int] = None
    doing: str = ""
    since: float = 0.0
    idle: float = 0.0
    beats: int = 0
    time: float = 0.0
    collectives: Mapping[str, int] = field(default_factory=dict)


class Heartbeat:
    """Of one training process; beats come from one thread."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        *,
        publish_seconds: float,
        collectives: Callable[[], dict[str, int]] = dict,
    ):
        """folder: of the run; nothing is published before it exists. collectives: group -> collectives begun so far; may be set
        later as an attribute, when the groups stand.
        """
        self.collectives = collectives
        self._path = rank_path(folder, rank)
        self._folder = folder
        self._about = {"rank": rank, "world": world, "host": socket.gethostname(), "pid": os.getpid()}
        self._launch = launch_name(os.environ)
        self._every = publish_seconds
        self._beats, self._entered = 0, time.monotonic()
        self._local = _open_local(os.environ.get(HEARTBEAT, ""))
        # One reference, replaced as a whole: the thread never sees half a beat.
        self._now: tuple[str, Optional[int], str, float, float, int] = (
            "start",
            None,
            "",
            self._entered,
            self._entered,
            0,
        )
        self._closed = threading.Event()
        self.beat("start")
        self._thread = threading.Thread(target=self._keep_publishing, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self, phase: str, step: Optional[int] = None, doing: str = "") -> None:
        """Says that this rank has got this far: progress. Touches no file system.

        phase: one of PHASES. step: the number of the step that is being taken; behind it, in validation, samples and saves,
        still that number. doing: the finer point, a few words.
        """
        code = _CODE[phase]
        now = time.monotonic()
        before = self._now
        if phase != before[0] or step != before[1]:
            self._entered = now
        self._beats = beats = self._beats + 1
        self._now = (phase, step, doing, self._entered, now, beats)
        if self._local is not None:
            _store(self._local, beats, -1 if step is None else step, self._entered, now, code, doing)

    def close(self) -> None:
        """Publishes the last state, waiting for a slow file system only so long."""
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _keep_publishing(self) -> None:
        over = False
        while True:
            # A full disk, a server that is away, anything: a thread that ends would make this rank look dead.
            with contextlib.suppress(Exception):
                self._publish()
            if over:
                break
            over = self._closed.wait(self._every)

    def _publish(self) -> None:
        if not self._folder.is_dir():
            return
        self._path.parent.mkdir(exist_ok=True)
        phase, step, doing, entered, last, beats = self._now
        now = time.monotonic()
        try:
            collectives = self.collectives()
        except Exception:  # the groups may be going away
            collectives = {}
        values = {
            **self._about,
            "time": round(time.time(), 3),
            "launch": self._launch,
            "phase": phase,
            "step": step,
            "doing": doing,
            "since": round(now - entered, 3),
            "idle": round(now - last, 3),
            "collectives": collectives,
            "beats": beats,
        }
        write_in_place(self._path, values, PUBLISHED_BYTES)


def rank_path(folder: Path, rank: int) -> Path:
    """Where a rank of the run in `folder` publishes itself."""
    return folder / "health" / f"rank-{rank:05d}.json"


def write_in_place(path: Path, values: Mapping[str, Any], size: int) -> None:
    """Overwrites `path` with one JSON object that carries its own checksum, padded to `size` bytes; longer ones are cut in their
    `collectives`. A reader (`read_in_place`) never takes a half-written one for whole. The first write makes the file and needs
    free space; the later ones need none on a file system that overwrites in place (not on one that copies on write).
    """
    text = json.dumps(values)
    if len(text.encode()) > size - 32:
        text = json.dumps({**values, "collectives": {}, "doing": str(values.get("doing", ""))[:100]})
    text = f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}'
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(descriptor, text.encode().ljust(size - 1) + b"\n", 0)
    finally:
        os.close(descriptor)


def read_in_place(path: Path) -> Optional[dict[str, Any]]:
    """What `write_in_place` wrote last; None if there is nothing, or it is being written just now."""
    try:
        text = path.read_text().rstrip()
    except (OSError, UnicodeDecodeError):
        return None
    body, found, check = text.rpartition(', "crc": ')
    if not found or check != f"{zlib.crc32((body + '}').encode())}}}":
        return None
    return json.loads(body + "}")


def read_published(folder: Path, rank: int) -> Optional[Record]:
    """What a rank of the run in `folder` published last, None if nothing that can be read."""
    values = read_in_place(rank_path(folder, rank))
    if values is None or values.get("phase") not in _CODE:
        return None
    return Record(**{key: values[key] for key in Record.__dataclass_fields__ if key in values})


def read_local(memory: mmap.mmap) -> Optional[Record]:
    """The last complete beat in a watch's file in memory, also of a process that was killed in the middle of one; None before the
    first. Knows nothing of rank, host and collectives.
    """
    newest: Optional[Record] = None
    for slot in range(2):
        start = slot * SLOT_BYTES
        raw = memory[start : start + SLOT_BYTES]
        beats, step, entered, last, code, length = _HEAD.unpack_from(raw)
        end = _HEAD.size + length
        if not beats or end + _CHECK.size > SLOT_BYTES or code >= len(PHASES):
            continue
        if _CHECK.unpack_from(raw, end)[0] != zlib.crc32(raw[:end]):
            continue
        if newest is None or beats > newest.beats:
            now = time.monotonic()
            doing = raw[_HEAD.size : end].decode(errors="replace")
            newest = Record(
                phase=PHASES[code],
                step=None if step < 0 else step,
                doing=doing,
                since=now - entered,
                idle=now - last,
                beats=beats,
            )
    return newest


def collective_counts(mesh: Any) -> Callable[[], dict[str, int]]:
    """Collectives that this rank has begun, by group: `dp[0,2]` is the same group on every rank that has it.

    mesh: parallel.mesh.Mesh. A rank whose count is behind in a group is the one that the others of that group wait for. Point to
    point messages between pipeline stages are not counted.
    """
    import torch.distributed as dist

    groups: dict[str, Any] = {}
    if mesh.world_size > 1:
        groups["world"] = dist.group.WORLD
        for name in ("pp", "dp", "tp", "model", "shard", "replica"):
            group = getattr(mesh, f"{name}_group")
            if group is None or any(group is known for known in groups.values()):
                continue
            members = dist.get_process_group_ranks(group)
            if len(members) > 1:
                shown = ",".join(map(str, members[:4])) + ("" if len(members) <= 4 else f",..{members[-1]}")
                groups[f"{name}[{shown}]"] = group

    def counts() -> dict[str, int]:
        # The only count there is; it has had this name since torch 1.9, on every backend.
        return {name: group._get_sequence_number_for_group() for name, group in groups.items()}

    return counts


def _open_local(path: str) -> Optional[mmap.mmap]:
    """The file that the watch made; None without a watch, or if it is not what it should be."""
    if not path:
        return None
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), RECORD_BYTES)
    except (OSError, ValueError):
        return None


def _store(memory: mmap.mmap, beats: int, step: int, entered: float, last: float, code: int, doing: str) -> None:
    """Writes the older of the two slots: the newer one stays readable until this one is complete."""
    words = doing.encode()[:200]
    raw = _HEAD.pack(beats, step, entered, last, code, len(words)) + words
    start = (beats & 1) * SLOT_BYTES
    memory[start : start + len(raw) + 4] = raw + _CHECK.pack(zlib.crc32(raw))
