"""`data verify` and `data inspect`: whether a shard set is whole, and what is in it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass

from data.errors import InputError
from data.inspect import describe, lines
from data.progress import ByteProgress, duration
from data.remote_options import DEFAULT_FOLDER, CacheOptions
from data.shard_set import ShardSet
from data.verify import verify_set
from pretrain.json_file import write_json


@dataclass(frozen=True)
class VerifyOptions:
    """Reads every byte of a shard set and lists all that is wrong with it, one line each; exit code 2 if anything is.

    Args:
        location: a folder that holds manifest.json, or its address (https://, s3://, gs://)
        processes: shards are checked by so many at once; 0 is one per core
        json: also write the findings to this file
        cache: where shards from an address are kept
        cache_bytes: most bytes of that folder; what was used longest ago goes first
        retries: further tries after one that brought no byte
        timeout_seconds: how long a try waits for a byte
    """

    location: str
    processes: int = 0
    json: str = ""
    cache: str = DEFAULT_FOLDER
    cache_bytes: int = 200_000_000_000
    retries: int = 5
    timeout_seconds: float = 60.0


@dataclass(frozen=True)
class InspectOptions:
    """Shows what a shard set holds: counts, lengths of documents, spans, padding, licences.

    Args:
        location: a folder that holds manifest.json, or its address (https://, s3://, gs://)
        batch: also show so many samples of a training step, as training draws them
        step: the step whose samples are shown, from 0
        config: the config file of that training; its defaults without one
        chunks: lengths and spans are taken from at most so many chunks, spread evenly over the set
        json: also write the findings to this file
        cache: where shards from an address are kept
        cache_bytes: most bytes of that folder; what was used longest ago goes first
        retries: further tries after one that brought no byte
        timeout_seconds: how long a try waits for a byte
    """

    location: str
    batch: int = 0
    step: int = 0
    config: str = ""
    chunks: int = 1000
    json: str = ""
    cache: str = DEFAULT_FOLDER
    cache_bytes: int = 200_000_000_000
    retries: int = 5
    timeout_seconds: float = 60.0


def verify(options: VerifyOptions) -> int:
    """Prints every fault as it is found, then what was looked at. Returns the exit code."""
    if options.processes < 0:
        raise InputError(f"--processes {options.processes}: must be at least 0, where 0 is one per core")
    begun = time.monotonic()
    report = verify_set(
        options.location,
        processes=options.processes,
        cache=_cache(options),
        progress=ByteProgress(),
        on_fault=lambda line: print(line, flush=True),
    )
    if options.json:
        write_json(options.json, asdict(report))
    looked_at = (
        f"{report.shards:,} shards, {report.bytes / 1e9:,.2f} GB, {report.tokens:,} tokens,"
        f" {report.documents:,} documents in {duration(time.monotonic() - begun)}"
    )
    if report.faults:
        print(f"{report.location}: {len(report.faults)} faults ({looked_at})")
        return 2
    print(f"{report.location}: whole ({looked_at})")
    return 0


def inspect(options: InspectOptions) -> int:
    """Prints what the set holds. Returns the exit code."""
    if options.chunks < 1:
        raise InputError(f"--chunks {options.chunks}: must be at least 1")
    if options.batch < 0:
        raise InputError(f"--batch {options.batch}: must be at least 0, where 0 shows no samples")
    found = describe(options.location, options.chunks, _cache(options))
    if options.json:
        write_json(options.json, found)
    print("\n".join(lines(found)))
    if options.batch:
        from pretrain.inspect_batch import View, batch_lines  # torch and the stages of training

        shards = ShardSet.open(options.location, "size", cache=_cache(options))
        view = View(options.batch, options.step, options.config)
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print("\n" + "\n".join(batch_lines(shards, view, shutil.get_terminal_size((100, 24)).columns, colour)))
    return 0


def _cache(options: VerifyOptions | InspectOptions) -> CacheOptions:
    return CacheOptions(options.cache, options.cache_bytes, options.retries, options.timeout_seconds)
