"""Shard sets at an address: manifest, tokenizer and index are fetched when a set is opened, each shard on its first use."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional
from urllib.parse import unquote, urlsplit

from data.chunk_index import NPY_HEADER_BYTES, ROWS
from data.errors import InputError, ShardError
from data.manifest import INDEX_FILE, MANIFEST_FILE, Manifest, read_manifest
from data.remote_cache import ShardCache, disk_full
from data.remote_fetch import download, fetch_small
from data.remote_options import CacheOptions
from data.remote_stream import Address, FetchError
from data.shard_check import check_counts, file_sha256

MOST_MANIFEST_BYTES, MOST_TOKENIZER_BYTES = 256 << 20, 256 << 20
REMOTE_OPEN_FILES = 8  # a shard that is thrown out while open keeps its room on the disk until it is closed
ADVICE = "check the address and the network, then run the same command again"


class RemoteSet(NamedTuple):
    """location: as errors show it. folder: manifest, tokenizer and index on this host."""

    location: str
    folder: Path
    manifest: Manifest
    shards: RemoteShards


def local_path(location: str) -> str:
    """The path of a `file://` address, or the location itself. Raises InputError for another host's file."""
    if not location.startswith("file://"):
        return location
    parts = urlsplit(location)
    if parts.netloc not in ("", "localhost"):
        raise InputError(f"location: {location} names another host; a local folder is file:///PATH, or just its path")
    return unquote(parts.path)


def open_remote(location: str, cache: Optional[CacheOptions]) -> RemoteSet:
    """Fetch and check what describes the set at an address; shards come later. Raises InputError, one line without credentials."""
    options = cache or CacheOptions()
    address = Address(location, options.timeout_seconds)
    content = _fetch(address, MANIFEST_FILE, MOST_MANIFEST_BYTES, options)
    files = ShardCache(options, hashlib.sha256(content).hexdigest()[:16])
    path = files.folder / MANIFEST_FILE
    try:
        files.keep(MANIFEST_FILE, content)
        manifest = read_manifest(files.folder)
        check_counts(path, manifest)
    except InputError as error:
        raise InputError(str(error).replace(str(path), address.where(MANIFEST_FILE))) from None
    except FetchError as error:
        raise InputError(f"{path}: {error.reason}") from None
    except OSError as error:
        raise InputError(f"cache folder: {path} cannot be written ({error.strerror}); choose another one") from error
    largest = max(shard.bytes for shard in manifest.shards)
    index_bytes = NPY_HEADER_BYTES + 8 * len(ROWS) * manifest.chunks
    if options.max_bytes < largest + index_bytes + len(content):
        raise InputError(
            f"cache max_bytes: {options.max_bytes} is too small for {address.where('')}:"
            f" its largest shard and its index take {largest + index_bytes + len(content)}"
        )
    shards = RemoteShards(address, manifest, files)
    tokenizer, index = files.folder / manifest.tokenizer_file, files.folder / INDEX_FILE
    try:
        if not tokenizer.is_file() or file_sha256(tokenizer) != manifest.tokenizer_sha256:
            content = _fetch(address, manifest.tokenizer_file, MOST_TOKENIZER_BYTES, options)
            if hashlib.sha256(content).hexdigest() != manifest.tokenizer_sha256:
                where = address.where(manifest.tokenizer_file)
                raise InputError(
                    f"{where}: differs from the tokenizer that made these tokens; copy the set there again"
                )
            files.keep(manifest.tokenizer_file, content)
        if index.is_file() and file_sha256(index) != manifest.index_sha256:
            index.unlink(missing_ok=True)
        shards.open_checked(INDEX_FILE, index_bytes, manifest.index_sha256).close()
    except FetchError as error:
        raise InputError(f"{address.where(INDEX_FILE)}: {error.reason}; {ADVICE}") from None
    except OSError as error:
        raise InputError(f"cache folder: {files.root} cannot be used ({error.strerror}); choose another one") from error
    return RemoteSet(address.where(""), files.folder, manifest, shards)


class RemoteShards:
    """The tars of a set at an address, through the cache of this host (a data.shard_files.ShardSource). Safe to pickle."""

    open_files = REMOTE_OPEN_FILES

    def __init__(self, address: Address, manifest: Manifest, cache: ShardCache) -> None:
        self._address, self._shards, self._cache = address, manifest.shards, cache
        self._ahead = _Ahead(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"_address": self._address, "_shards": self._shards, "_cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ahead = _Ahead(self)

    def where(self, shard: int) -> str:
        return self._address.where(self._shards[shard].file)

    def open(self, shard: int) -> BinaryIO:
        """The tar, fetched and hashed if the cache does not have it. Raises ShardError when it cannot be had."""
        entry = self._shards[shard]
        try:
            return self.open_checked(entry.file, entry.bytes, entry.sha256)
        except FetchError as error:
            message = f"{self.where(shard)}: {error.reason}; {ADVICE}"
            raise ShardError(message, shard, error.reason, passing=error.passing) from None
        except OSError as error:
            if not disk_full(error):
                raise
            reason = f"the disk of the cache {self._cache.root} is full"
            message = f"{self.where(shard)}: {reason}; free some room or lower max_bytes"
            raise ShardError(message, shard, reason, passing=True) from error

    open_unchecked = open

    def read_file(self, name: str, most_bytes: int) -> bytes:
        try:
            return fetch_small(self._address, name, most_bytes, self._cache.options)
        except FetchError as error:
            raise OSError(0, error.reason) from None

    def open_checked(self, name: str, size: int, sha256: str) -> BinaryIO:
        """A file of the set with this size and hash. Raises FetchError, OSError."""

        def fetch(target: BinaryIO) -> None:
            download(self._address, name, target, size, sha256, self._cache.options)

        return self._cache.open(name, size, fetch)

    def fetch_all(self) -> dict[int, str]:
        """Bring every shard into the cache once; {number: reason} of those that cannot be had."""
        bad = {}
        for shard in range(len(self._shards)):
            try:
                self.open(shard).close()
            except ShardError as error:
                bad[shard] = error.reason
            except OSError as error:
                bad[shard] = f"cannot be read ({error.strerror})"
        return bad

    def prefetch(self, shards: Sequence[int]) -> None:
        """Bring these shards into the cache in the background, in this order, instead of what was asked for before."""
        self._ahead.want(shards)


class _Ahead:
    """A thread that fetches shards before they are needed. What fails is tried again, and reported, by who needs it."""

    def __init__(self, shards: RemoteShards) -> None:
        self._shards = shards
        self._fresh()

    def _fresh(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._wanted: list[int] = []
        self._thread: Optional[threading.Thread] = None

    def want(self, shards: Sequence[int]) -> None:
        if self._process != os.getpid():  # threads do not survive a fork, and the lock may have been taken in it
            self._fresh()
        with self._lock:
            self._wanted = list(shards)
            if self._wanted and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._run, name="shard prefetch", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                shard = self._wanted.pop(0)
            try:
                self._shards.open(shard).close()
            except (ShardError, OSError):
                continue


def _fetch(address: Address, name: str, most_bytes: int, options: CacheOptions) -> bytes:
    try:
        return fetch_small(address, name, most_bytes, options)
    except FetchError as error:
        astray = name == MANIFEST_FILE and "no such file" in error.reason
        hint = "; name the folder that holds manifest.json, train/ or val/" if astray else ""
        raise InputError(f"{address.where(name)}: {error.reason}; {ADVICE}{hint}") from None
