"""What the tests of sets at an address share: options of a cache, and what lies in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.remote_options import CacheOptions
from data.shard_set import ShardSet


def options(tmp_path: Path, **changes) -> CacheOptions:
    return CacheOptions(**{"folder": str(tmp_path / "cache"), "retries": 3, "timeout_seconds": 5.0} | changes)


def all_tokens(shards: ShardSet) -> np.ndarray:
    return shards.read_tokens(0, shards.tokens)


def cached(tmp_path: Path, pattern: str = "*.tar*") -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").glob(f"*/{pattern}"))


def total_bytes(root: Path) -> int:
    """Bytes of all files of the cache, as the file system says at this moment."""
    total = 0
    for path in root.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
