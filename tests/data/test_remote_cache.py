"""The cache of a host: bounded, shared by processes without fetching twice, and whole whenever a process is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError, ShardError
from data.remote_options import CacheOptions
from data.shard_set import ShardSet
from tests.data.fault_server import FaultServer
from tests.data.remote_case import all_tokens, cached, options, total_bytes

ROOT = Path(__file__).resolve().parents[2]


def test_a_cached_file_that_was_cut_is_fetched_again(server: FaultServer, flat: np.ndarray, tmp_path: Path) -> None:
    cache = options(tmp_path)
    shards = ShardSet.open(server.url, cache=cache)
    np.testing.assert_array_equal(all_tokens(shards), flat)
    for name in ("shard-000001.tar", "index.npy", "tokenizer.json"):
        os.truncate(shards.folder / name, 700) if name != "index.npy" else (shards.folder / name).write_bytes(b"junk")
        shards = ShardSet.open(server.url, cache=cache)
        np.testing.assert_array_equal(all_tokens(shards), flat)
        assert server.gets()[name] == 2


def _read_at_random(url: str, cache: CacheOptions, flat: np.ndarray, seed: int, answers) -> None:
    shards = ShardSet.open(url, cache=cache)
    starts = np.random.default_rng(seed).integers(0, len(flat) - 20, size=25).tolist()
    answers.put(all(np.array_equal(shards.read_tokens(start, 20), flat[start : start + 20]) for start in starts))


def test_the_cache_never_exceeds_its_bound_while_processes_share_it(
    server: FaultServer, flat: np.ndarray, tmp_path: Path
) -> None:
    shards = ShardSet.open(server.url, cache=options(tmp_path))
    small = total_bytes(tmp_path / "cache")
    bound = small + 2 * max(entry.bytes for entry in shards.shards) + 100  # room for two of six
    cache = options(tmp_path, max_bytes=bound)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    readers = [context.Process(target=_read_at_random, args=(server.url, cache, flat, s, answers)) for s in range(3)]
    for reader in readers:
        reader.start()
    seen = []
    while any(reader.is_alive() for reader in readers):
        seen.append(total_bytes(tmp_path / "cache"))
    assert [answers.get(timeout=30) for _ in readers] == [True] * 3
    assert max(seen) <= bound and max(seen) > bound - 3 * 20480 and len(shards.shards) >= 6
    with pytest.raises(InputError, match="max_bytes: 1000 is too small for"):
        ShardSet.open(server.url, cache=options(tmp_path, max_bytes=1000))


def test_the_shard_used_longest_ago_goes_first_and_an_open_one_stays_readable(
    server: FaultServer, flat: np.ndarray, tmp_path: Path
) -> None:
    shards = ShardSet.open(server.url, cache=options(tmp_path))
    sizes = [entry.bytes for entry in shards.shards]
    room = total_bytes(tmp_path / "cache") + sizes[0] + max(sizes[1:3]) + 100
    cache = options(tmp_path, max_bytes=room)
    shards = ShardSet.open(server.url, cache=cache)
    starts = np.cumsum([0, *(entry.tokens for entry in shards.shards)]).tolist()
    for shard in (0, 1):
        shards.read_tokens(starts[shard], 1)
        time.sleep(0.01)
    ShardSet.open(server.url, cache=cache).read_tokens(0, 1)  # 0 is used again
    shards.read_tokens(starts[2], 1)
    assert cached(tmp_path) == ["shard-000000.tar", "shard-000002.tar"]
    np.testing.assert_array_equal(shards.read_tokens(starts[1], 5), flat[starts[1] : starts[1] + 5])
    assert server.gets()["shard-000001.tar"] == 1


def _read_all(shards: ShardSet, answers) -> None:
    answers.put(all_tokens(shards).tolist())


def test_processes_of_a_host_fetch_each_shard_once(server: FaultServer, flat: np.ndarray, tmp_path: Path) -> None:
    shards = ShardSet.open(server.url, cache=options(tmp_path))  # a child of a fork needs connections of its own
    shards.read_tokens(0, 5)
    for name in ("shard-000001.tar", "shard-000002.tar"):
        server.faults[name] = ["drip 60000"]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    readers = [context.Process(target=_read_all, args=(shards, answers)) for _ in range(4)]
    for reader in readers:
        reader.start()
    assert [answers.get(timeout=30) for _ in readers] == [flat.tolist()] * 4
    for reader in readers:
        reader.join(20)
        assert reader.exitcode == 0
    gets = server.gets()
    assert {gets[entry.file] for entry in shards.shards} == {1} and gets["index.npy"] == 1


def test_a_killed_download_leaves_no_lock_and_no_file(server: FaultServer, flat: np.ndarray, tmp_path: Path) -> None:
    server.faults["shard-000000.tar"] = ["drip 2000"]
    code = (
        "import sys; from data.shard_set import ShardSet; from data.remote_options import CacheOptions\n"
        "ShardSet.open(sys.argv[1], cache=CacheOptions(folder=sys.argv[2])).read_tokens(0, 1)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path / "cache")], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not any(".part-" in name for name in cached(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    waiting = threading.Thread(
        target=lambda: found.append(ShardSet.open(server.url, cache=options(tmp_path)).read_tokens(0, 9))
    )
    found: list[np.ndarray] = []
    waiting.start()  # it waits for the lock of the one that is about to die
    time.sleep(0.3)
    assert waiting.is_alive() and child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    waiting.join(10)
    assert found and np.array_equal(found[0], flat[:9])
    assert cached(tmp_path) == ["shard-000000.tar"] and server.gets()["shard-000000.tar"] == 2


def test_a_holder_that_hangs_does_not_hold_others_for_ever(server: FaultServer, tmp_path: Path) -> None:
    from data.durable import take_lock

    shards = ShardSet.open(server.url, cache=options(tmp_path, retries=0, timeout_seconds=0.4))
    lock = take_lock(shards.folder / ".locks" / "shard-000000.tar")
    begun = time.monotonic()
    with pytest.raises(ShardError, match="another process held shard-000000.tar for 0 s"):
        shards.read_tokens(0, 1)
    assert 0.3 < time.monotonic() - begun < 3
    os.close(lock)
    assert len(shards.read_tokens(0, 1)) == 1


def test_a_fork_during_a_download_does_not_keep_its_lock(server: FaultServer, tmp_path: Path) -> None:
    shards = ShardSet.open(server.url, cache=options(tmp_path, retries=0, timeout_seconds=0.5))
    server.faults["shard-000000.tar"] = ["drip 60000"]
    shards.prefetch([0])
    while not cached(tmp_path):  # the test's own time limit ends it
        time.sleep(0.01)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
    child.start()
    assert ".part-" in cached(tmp_path)[0]
    try:
        while cached(tmp_path) != ["shard-000000.tar"]:
            time.sleep(0.01)
        (shards.folder / "shard-000000.tar").unlink()  # so that the lock is needed again
        assert len(shards.read_tokens(0, 3)) == 3 and child.is_alive()
    finally:
        child.kill()
        child.join()


def test_prefetch_brings_shards_in_the_background(server: FaultServer, tmp_path: Path) -> None:
    shards = ShardSet.open(server.url, cache=options(tmp_path))
    server.faults["shard-000002.tar"] = ["404"]
    shards.prefetch([1, 2, 3])
    deadline = time.monotonic() + 10
    while cached(tmp_path) != ["shard-000001.tar", "shard-000003.tar"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert cached(tmp_path) == ["shard-000001.tar", "shard-000003.tar"]
    starts = np.cumsum([0, *(entry.tokens for entry in shards.shards)]).tolist()
    shards.read_tokens(starts[1], 1), shards.read_tokens(starts[2], 1)
    assert server.gets()["shard-000001.tar"] == 1 and server.gets()["shard-000002.tar"] == 2


def test_options_that_cannot_be_are_refused(server: FaultServer, tmp_path: Path) -> None:
    for changes in ({"folder": ""}, {"max_bytes": 0}, {"retries": -1}, {"timeout_seconds": 0}, {"max_bytes": 1.5}):
        with pytest.raises(InputError, match=f"cache {next(iter(changes))}"):
            CacheOptions(**changes)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cache folder: .* cannot be written"):
        ShardSet.open(server.url, cache=CacheOptions(folder=str(tmp_path / "file" / "below"), retries=0))
