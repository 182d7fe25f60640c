"""Read every byte of a shard set and list everything in it that is not as docs/format.md says. Nothing is extracted."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Optional

import numpy as np

from data.chunk_index import DOCUMENT_ENDS, NPY_HEADER_BYTES, OFFSET, TOKEN_START, npy_bytes
from data.errors import InputError, ShardError
from data.manifest import INDEX_FILE, MANIFEST_FILE, Manifest, read_manifest
from data.progress import ByteProgress
from data.shard_check import BEFORE_PAYLOAD, check_counts, check_tokenizer, file_sha256, index_faults, map_index
from data.shard_files import FolderShards, ShardSource
from data.verify_chunk import Counts, Row, Rules, check_chunk
from data.verify_tar import Placed, samples, walk

if TYPE_CHECKING:
    from data.remote_options import CacheOptions

MOST_FAULTS = 1000  # of one shard; a tar of nonsense could fill the disk with lines


@dataclass
class VerifyReport:
    """`faults`: a line each, naming the file. The rest is what was looked at."""

    location: str
    faults: list[str] = field(default_factory=list)
    shards: int = 0
    bytes: int = 0
    tokens: int = 0
    documents: int = 0


def verify_set(
    location: str,
    *,
    processes: int = 0,
    cache: Optional[CacheOptions] = None,
    progress: Optional[ByteProgress] = None,
    on_fault: Callable[[str], None] = lambda line: None,
) -> VerifyReport:
    """Check every file of a set against its manifest and every chunk against the format; all faults are in the report.

    processes: 0 is one per core. `on_fault` is called with each fault as soon as it is found. Raises
    InputError when there is no manifest to check against.
    """
    show = progress or ByteProgress(False)
    source: ShardSource
    if "://" in location and not location.startswith("file://"):
        from data.remote import open_remote

        remote = open_remote(location, cache)
        location, folder, manifest, source = remote.location, remote.folder, remote.manifest, remote.shards
    else:
        from data.remote import local_path

        folder = Path(local_path(location))
        manifest = read_manifest(folder)
        source = FolderShards(folder, manifest.shards, [])
    try:
        check_counts(folder / MANIFEST_FILE, manifest)
    except InputError as error:
        on_fault(str(error))
        return VerifyReport(location, [str(error)])
    counts = len(manifest.shards), sum(shard.bytes for shard in manifest.shards), manifest.tokens, manifest.documents
    report = VerifyReport(location, [], *counts)
    try:
        check_tokenizer(folder, manifest)
    except InputError as error:
        report.faults.append(str(error))
    usable, faults = _check_set_index(folder / INDEX_FILE, manifest)
    report.faults += faults
    verifier = ShardVerifier(source, manifest, folder / INDEX_FILE if usable else None)
    with show.stage("verifying", report.bytes) as advance:
        for line in report.faults:
            on_fault(line)
        for number, faults in enumerate(_check_all(verifier, processes)):
            report.faults += faults
            for line in faults:
                on_fault(line)
            advance(manifest.shards[number].bytes)
    return report


class ShardVerifier:
    """Checks single tars of a set. index: the set's index file, or None if it cannot be used: then no chunk is looked into."""

    def __init__(self, source: ShardSource, manifest: Manifest, index: Optional[Path]) -> None:
        self.source, self.manifest, self.index = source, manifest, index
        self.rules = Rules(manifest.dtype, manifest.vocab_size, manifest.special, manifest.row_tokens)
        self._chunk_ends = np.cumsum([shard.chunks for shard in manifest.shards]).tolist()
        self._token_ends = np.cumsum([shard.tokens for shard in manifest.shards]).tolist()

    def faults(self, number: int) -> list[str]:
        """Everything that is wrong with one tar and its sidecar, a line each."""
        faults, where, entry = [], self.source.where(number), self.manifest.shards[number]
        try:
            sidecar = self._sidecar_fault(number)
            if sidecar:
                faults.append(f"{where.removesuffix('.tar')}.index.npy: {sidecar}")
            with self.source.open_unchecked(number) as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry.bytes:
                    faults.append(f"{where}: {size} bytes, the manifest says {entry.bytes}")
                if file_sha256(file) != entry.sha256:
                    faults.append(f"{where}: its sha256 is not the manifest's")
                for fault in self._tar_faults(number, file, size):
                    faults.append(f"{where}: {fault}")
                    if len(faults) > MOST_FAULTS:
                        return [*faults[:-1], f"{where}: and more; the first {MOST_FAULTS} faults are listed"]
        except ShardError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{where}: cannot be read ({error.strerror})")
        return faults

    def _rows(self, number: int) -> Optional[np.ndarray]:
        """int64 [6, chunks]: what the index of the set says about this tar."""
        if self.index is None:
            return None
        end = self._chunk_ends[number]
        return np.array(map_index(self.index, self.manifest.chunks)[:, end - self.manifest.shards[number].chunks : end])

    def _sidecar_fault(self, number: int) -> str:
        entry, rows = self.manifest.shards[number], self._rows(number)
        try:
            content = self.source.read_file(entry.index_file, NPY_HEADER_BYTES + 48 * entry.chunks)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if hashlib.sha256(content).hexdigest() != entry.index_sha256:
            return "its sha256 is not the manifest's"
        if rows is None:
            return ""
        rows[TOKEN_START] -= self._token_ends[number] - entry.tokens
        return "" if npy_bytes(rows) == content else "not the same as this shard's part of the set's index"

    def _tar_faults(self, number: int, file: BinaryIO, size: int) -> Iterator[str]:
        entry, rows = self.manifest.shards[number], self._rows(number)
        members: list[Placed] = []
        for found in walk(file.fileno(), size, [] if rows is None else (rows[OFFSET] - BEFORE_PAYLOAD).tolist()):
            if isinstance(found, str):
                yield found
            else:
                members.append(found)
        if rows is None:
            return
        at = {row.offset: row for row in _as_rows(rows, self._token_ends[number])}
        seen = Counts()
        for sample in samples(members):
            if sample.fault:
                yield sample.fault
            tokens = sample.members.get("tok.npy")
            row = at.pop(tokens.payload + NPY_HEADER_BYTES, None) if tokens else None
            if row is None:
                yield f"sample {sample.key} is not where the index has a chunk"
                continue
            counts, faults = check_chunk(file.fileno(), sample, row, self.rules, entry.truncated_documents > 0)
            yield from faults
            seen = Counts(*map(sum, zip(seen, counts)))
        for offset in at:
            yield f"byte {offset}: the index has a chunk here, the archive has none"
        for name in ("tokens", "spans", "padding_tokens"):
            if getattr(seen, name) != getattr(entry, name):
                yield f"{getattr(seen, name)} {name}, the manifest says {getattr(entry, name)}"
        whole = entry.documents - entry.truncated_documents
        if seen.ended != whole:
            yield f"{seen.ended} documents end in EOS, the manifest counts {whole}"
        if int(rows[DOCUMENT_ENDS].sum()) != entry.documents:
            yield f"the index counts {int(rows[DOCUMENT_ENDS].sum())} documents, the manifest {entry.documents}"


def _as_rows(rows: np.ndarray, end_token: int) -> Iterator[Row]:
    after = [*rows[TOKEN_START, 1:].tolist(), end_token]
    for column, following in zip(rows.T.tolist(), after):
        yield Row._make([*column, following - column[TOKEN_START]])


def _check_set_index(path: Path, manifest: Manifest) -> tuple[bool, list[str]]:
    """Whether chunks can be looked at with the index of the set, and what is wrong with it."""
    faults = []
    try:
        if file_sha256(path) != manifest.index_sha256:
            faults.append(f"{path}: its sha256 is not the manifest's")
        more = list(index_faults(map_index(path, manifest.chunks), manifest))
    except (OSError, ValueError) as error:
        more = [f"cannot be read ({error.strerror if isinstance(error, OSError) else error})"]
    if more:
        more.append("so no chunk is looked into")
    return not more, faults + [f"{path}: {fault}" for fault in more]


_in_this_process: list[ShardVerifier] = []


def _start(verifier: ShardVerifier) -> None:
    _in_this_process[:] = [verifier]


def _faults(number: int) -> list[str]:
    return _in_this_process[0].faults(number)


def _check_all(verifier: ShardVerifier, processes: int) -> Iterator[list[str]]:
    """The faults of each tar, in order of the shards."""
    numbers = range(len(verifier.manifest.shards))
    workers = min(processes or len(os.sched_getaffinity(0)), len(numbers))
    if workers <= 1:
        yield from map(verifier.faults, numbers)
        return
    # Not forked: downloads keep a thread, and a fork in the middle of its work would inherit a taken lock.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start, (verifier,)) as pool:
        try:
            yield from pool.map(_faults, numbers)
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError("verify: a process died (out of memory?); try again with --processes 1") from None
        finally:
            pool.shutdown(cancel_futures=True)
