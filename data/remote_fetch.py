"""Download one file whole and checked: resumed where a connection broke, tried again with growing pauses, bounded in time."""

from __future__ import annotations

import hashlib
import random
import time
from typing import BinaryIO

from data.remote_options import CacheOptions
from data.remote_stream import Address, FetchError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
LEAST_RATE = 256 << 10  # bytes a second; a slower store is a broken one
_random = random.SystemRandom()


def time_bound(size: int, options: CacheOptions) -> float:
    """Seconds after which a download of `size` bytes is given up, whatever happens."""
    pauses = sum(_longest_pause(failure) for failure in range(1, options.retries + 1))
    return (options.retries + 1) * options.timeout_seconds + pauses + size / LEAST_RATE


def download(address: Address, name: str, target: BinaryIO, size: int, sha256: str, options: CacheOptions) -> None:
    """Write a file of `size` bytes to `target` (from its start) and prove that it has this hash.

    Raises FetchError saying how many tries it took. Tries that brought bytes do not count: the next one goes on behind them.
    """
    deadline = time.monotonic() + time_bound(size, options)
    digest, position, failures, wrong = hashlib.sha256(), 0, 0, 0
    tries = 0
    while True:
        tries += 1
        try:
            for block in address.stream(name, position, size):
                if position + len(block) > size:
                    raise FetchError(f"it has more than the {size} bytes of the manifest", passing=False)
                target.write(block)
                digest.update(block)
                position += len(block)
                failures = wrong
                if time.monotonic() > deadline:
                    raise _too_slow()
            if position < size:
                raise FetchError(f"it ended after {position} of {size} bytes")
            if digest.hexdigest() == sha256:
                return
            raise FetchError("its content is not what the manifest says", passing=False)
        except FetchError as error:
            if position >= size:  # all of it came, and it was wrong: from the start
                wrong += 1
                digest, position = hashlib.sha256(), 0
                target.seek(0)
            failures += 1
            pause = _longest_pause(failures) * _random.uniform(0.5, 1)
            if error.lasting or failures > options.retries or time.monotonic() + pause > deadline:
                after = "" if error.lasting else f" after {tries} tries" if tries > 1 else " after 1 try"
                reason = f"cannot be fetched{after} ({error.reason})"
                raise FetchError(reason, lasting=True, passing=error.passing) from None
            time.sleep(pause)


def fetch_small(address: Address, name: str, most_bytes: int, options: CacheOptions) -> bytes:
    """A file of unknown size up to `most_bytes`, with the tries and pauses of `download`. Raises FetchError."""
    deadline = time.monotonic() + time_bound(16 << 20, options)
    for failures in range(1, options.retries + 2):
        try:
            content = bytearray()
            for block in address.stream(name, 0, most_bytes):
                content += block
                if time.monotonic() > deadline:
                    raise _too_slow()
            if len(content) > most_bytes:
                raise FetchError(f"longer than {most_bytes} bytes", lasting=True)
            return bytes(content)
        except FetchError as error:
            pause = _longest_pause(failures) * _random.uniform(0.5, 1)
            if error.lasting or failures > options.retries or time.monotonic() + pause > deadline:
                after = "" if error.lasting else f" after {failures} tries" if failures > 1 else " after 1 try"
                reason = f"cannot be fetched{after} ({error.reason})"
                raise FetchError(reason, lasting=True, passing=error.passing) from None
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _too_slow() -> FetchError:
    return FetchError(f"slower than {LEAST_RATE >> 10} KiB a second", lasting=True, passing=True)


def _longest_pause(failure: int) -> float:
    return min(FIRST_PAUSE * 2 ** (failure - 1), LONGEST_PAUSE)
