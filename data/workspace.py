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
from pathlib import Path
from typing import Any

from data.durable import fsync_folder, take_lock, write_durably
from data.errors import InputError
from data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, ShardEntry, read_manifest

JOURNAL_FILE = "journal.jsonl"
LOCK_FILE = ".prepare.lock"


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

    def resume(self, set_name: str) -> list[ShardEntry]:
        """The set's finished shards, in order; whatever else an interrupted run left gets written over."""
        folder = self.partial / set_name
        folder.mkdir(parents=True, exist_ok=True)
        entries: list[ShardEntry] = []
        for entry in self._journalled(set_name):
            shard, index = folder / entry.file, folder / entry.index_file
            if not (shard.is_file() and index.is_file() and shard.stat().st_size == entry.bytes):
                break
            entries.append(entry)
        return entries

    def record(self, set_name: str, entry: ShardEntry) -> None:
        """Add a shard that is safely on disk to the journal."""
        line = json.dumps({"set": set_name, "shard": dataclasses.asdict(entry)}) + "\n"
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

    def _journalled(self, set_name: str) -> list[ShardEntry]:
        journal = self.partial / JOURNAL_FILE
        lines = journal.read_bytes().split(b"\n") if journal.exists() else []
        by_file: dict[str, ShardEntry] = {}
        good = b""
        for line in lines[:-1]:  # what follows the last newline was being written when the run died
            try:
                record = json.loads(line)
            except ValueError:
                break
            good += line + b"\n"
            if record["set"] == set_name:
                by_file[record["shard"]["file"]] = ShardEntry(**record["shard"])
        if lines and good != b"\n".join(lines):
            write_durably(journal, good)
        return list(by_file.values())
