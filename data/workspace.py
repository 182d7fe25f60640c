"""The folder that `prepare` works in: one writer at a time, a journal of finished shards, and publishing in one step.

Work happens in OUT/.partial-HASH, where HASH stands for everything that determines the output. A finished shard is on
disk before the journal names it, so after a crash at any moment the journal is a list of good shards to go on from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data.durable import fsync_folder, take_lock, write_durably
from data.errors import InputError
from data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, ShardEntry, read_manifest

JOURNAL_FILE = "journal.jsonl"
LOCK_FILE = ".prepare.lock"


@dataclass
class Reached:
    """How far a set's part of the input was used up when a shard was finished.

    `documents` and `utf8_bytes` count what was read for the set. What came of it by source number (as text, for JSON):
    `kept` is [documents, UTF-8 bytes] in the shards, `dropped` {reason: documents} of what was left out for its length.
    """

    documents: int = 0
    utf8_bytes: int = 0
    kept: dict[str, list[int]] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, source: int, utf8_bytes: int, kept_bytes: int, dropped: str | None) -> None:
        self.documents += 1
        self.utf8_bytes += utf8_bytes
        if dropped:
            reasons = self.dropped.setdefault(str(source), {})
            reasons[dropped] = reasons.get(dropped, 0) + 1
        else:
            kept = self.kept.setdefault(str(source), [0, 0])
            kept[0] += 1
            kept[1] += kept_bytes


class FinishedShard(NamedTuple):
    entry: ShardEntry
    reached: Reached


class Workspace:
    """OUT while `prepare` works on it, locked against a second `prepare`. Use as a context manager."""

    def __init__(self, out: Path, prepared_with: dict[str, Any]) -> None:
        """Create and lock OUT. Raises InputError when it cannot be written or another `prepare` holds it."""
        key = hashlib.sha256(json.dumps(prepared_with, sort_keys=True).encode()).hexdigest()[:12]
        self.out, self.prepared_with = out, prepared_with
        self.partial = out / f".partial-{key}"
        try:
            out.mkdir(parents=True, exist_ok=True)
            # A file opened for writing, because network file systems cannot lock a folder.
            self._lock = take_lock(out / LOCK_FILE)
        except BlockingIOError:
            raise InputError(
                f"out: another `prepare` is writing to {out}; wait for it or choose another --out"
            ) from None
        except OSError as error:
            raise InputError(
                f"out: cannot write to the folder {out} ({error.strerror}); choose another --out"
            ) from error

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._lock)

    def published(self, set_name: str) -> bool:
        """True when OUT already holds this set, made from the same input with the same options.

        Raises InputError, naming what differs, when it holds something else.
        """
        folder = self.out / set_name
        if not folder.exists():
            return False
        if not (folder / MANIFEST_FILE).exists():
            raise InputError(f"out: {folder} exists and is no finished shard set; choose another --out or remove it")
        found = read_manifest(folder).prepared_with
        keys = sorted(found.keys() | self.prepared_with.keys())
        different = [key for key in keys if found.get(key) != self.prepared_with.get(key)]
        if different:
            names = ", ".join("the input text" if key == "input_sha256" else key for key in different)
            raise InputError(f"out: {folder} was prepared differently (not the same: {names}); choose another --out")
        return True

    def other_unfinished(self) -> list[Path]:
        """Work that was begun in OUT with other options or input and never finished."""
        return sorted(path for path in self.out.glob(".partial-*") if path != self.partial)

    def resume(self, set_name: str) -> list[FinishedShard]:
        """The set's finished shards, in order; whatever else an interrupted run left gets written over."""
        folder = self.partial / set_name
        folder.mkdir(parents=True, exist_ok=True)
        finished: list[FinishedShard] = []
        for entry, reached in self._journalled(set_name):
            shard, index = folder / entry.file, folder / entry.index_file
            if not (shard.is_file() and index.is_file() and shard.stat().st_size == entry.bytes):
                break
            finished.append(FinishedShard(entry, reached))
        return finished

    def record(self, set_name: str, entry: ShardEntry, reached: Reached) -> None:
        """Add a shard that is safely on disk to the journal."""
        record = {"set": set_name, "shard": dataclasses.asdict(entry), "reached": dataclasses.asdict(reached)}
        line = json.dumps(record) + "\n"
        with open(self.partial / JOURNAL_FILE, "ab") as journal:
            journal.write(line.encode())
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self, set_name: str, manifest: Manifest) -> None:
        """Complete a set with its tokenizer and, last, its manifest, and move it to OUT as a whole."""
        folder = self.partial / set_name
        write_durably(folder / TOKENIZER_FILE, (self.partial / TOKENIZER_FILE).read_bytes())
        write_durably(folder / MANIFEST_FILE, manifest.to_bytes())
        os.rename(folder, self.out / set_name)
        fsync_folder(self.out)

    def remove_partial(self) -> None:
        """Drop the working folder: every set is published, or what is in it cannot be trusted."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _journalled(self, set_name: str) -> list[FinishedShard]:
        journal = self.partial / JOURNAL_FILE
        lines = journal.read_bytes().split(b"\n") if journal.exists() else []
        by_file: dict[str, FinishedShard] = {}
        good = b""
        for line in lines[:-1]:  # what follows the last newline was being written when the run died
            try:
                record = json.loads(line)
            except ValueError:
                break
            good += line + b"\n"
            if record["set"] == set_name:
                shard = FinishedShard(ShardEntry(**record["shard"]), Reached(**record["reached"]))
                by_file[shard.entry.file] = shard
        if lines and good != b"\n".join(lines):
            write_durably(journal, good)
        return list(by_file.values())
