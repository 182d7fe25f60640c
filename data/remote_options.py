"""What a cache of remote shards may take: disk, tries, time."""

from __future__ import annotations

from dataclasses import dataclass

from data.errors import InputError

DEFAULT_FOLDER = "~/.cache/palimpsest/shards"


@dataclass(frozen=True)
class CacheOptions:
    """Where shards from an address are kept on this host, and how long to wait for them.

    folder: shared by all processes and runs of a host. max_bytes: the cache never holds more; shards used least recently go
    first. retries: further tries after one that brought no byte. timeout_seconds: how long one try waits for a byte.
    """

    folder: str = DEFAULT_FOLDER
    max_bytes: int = 200_000_000_000
    retries: int = 5
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.folder:
            raise InputError("cache folder: it is empty; name a folder on a local disk")
        for name, least in (("max_bytes", 1), ("retries", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"cache {name}: {value!r} must be a whole number of at least {least}")
        if not 0 < self.timeout_seconds <= 86400:
            raise InputError(f"cache timeout_seconds: {self.timeout_seconds!r} must be above 0 and at most 86400")
