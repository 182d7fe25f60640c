"""A set at an address reads token for token as its folder does, whatever the store does, or ends in one line within a bound."""

from __future__ import annotations

import logging
import pickle
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

import data.remote_fetch
from data.errors import InputError, ShardError
from data.remote_stream import Address, FetchError, _fetch_error
from data.shard_set import ShardSet
from data.verify import verify_set
from tests.data.fault_server import FaultServer
from tests.data.remote_case import all_tokens, cached, options


def test_an_address_reads_as_its_folder_and_each_file_is_fetched_once(
    server: FaultServer, folder: Path, flat: np.ndarray, tmp_path: Path
) -> None:
    shards = ShardSet.open(f"{server.url}/train/", cache=options(tmp_path))
    assert sorted(server.gets()) == ["index.npy", "manifest.json", "tokenizer.json"]
    assert shards.location == f"{server.url}/train" and shards.tokenizer_path.read_bytes()
    first = shards.shards[0].tokens
    np.testing.assert_array_equal(shards.read_tokens(first, 9), flat[first : first + 9])
    assert cached(tmp_path) == ["shard-000001.tar"]
    local = ShardSet.open(folder)
    np.testing.assert_array_equal(all_tokens(shards), flat)
    np.testing.assert_array_equal(shards.read_pieces(0, shards.tokens), local.read_pieces(0, local.tokens))
    again = pickle.loads(pickle.dumps(ShardSet.open(f"{server.url}/train", "size", cache=options(tmp_path))))
    np.testing.assert_array_equal(all_tokens(again), flat)
    gets = server.gets()
    assert gets.pop("manifest.json") == 2 and set(gets.values()) == {1} and len(gets) == 2 + len(shards.shards)
    np.testing.assert_array_equal(all_tokens(ShardSet.open(f"file://{folder}")), flat)
    with pytest.raises(InputError, match="another host"):
        ShardSet.open(f"file://elsewhere{folder}")


FAULTS = {
    "dropped twice": ["drop 5000", "drop 4000"],
    "dropped at once": ["drop 0"],
    "errors": ["500", "503", "429"],
    "cut": ["truncate 3000"],
    "wrong bytes": ["wrong", "wrong"],
    "longer": ["longer"],
    "all of it": ["500", "drop 3000", "truncate 2000", "wrong", "drop 700"],
}


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "range ignored"])
@pytest.mark.parametrize("kind", FAULTS)
def test_tokens_are_exact_whatever_the_server_does_for_a_while(
    server: FaultServer, flat: np.ndarray, tmp_path: Path, kind: str, ranges: bool
) -> None:
    server.honours_range = ranges
    shards = ShardSet.open(server.url, cache=options(tmp_path))
    for name in ("shard-000001.tar", "shard-000003.tar"):
        server.faults[name] = list(FAULTS[kind])
    np.testing.assert_array_equal(all_tokens(shards), flat)
    assert not any(server.faults.values()) and len(cached(tmp_path)) == len(shards.shards)
    if kind == "dropped twice":
        asked = [wanted for name, wanted in server.requests if name == "shard-000001.tar"]
        assert asked == (["", "bytes=5000-", "bytes=9000-"] if ranges else ["", "bytes=5000-", "bytes=5000-"])


LASTING = {
    "gone": (["404"] * 9, "cannot be fetched .there is no such file", 1),
    "forbidden": (["403"] * 9, "cannot be fetched .HTTP 403 Forbidden", 1),
    "errors": (["502"] * 9, "cannot be fetched after 3 tries .HTTP 502 Bad Gateway", 3),
    "always cut": (["truncate 0"] * 9, "cannot be fetched after 3 tries .it ended after 0 of", 3),
    "always wrong": (["wrong"] * 9, "cannot be fetched after 3 tries .its content is not what the manifest says", 3),
    "hangs": (["hang"] * 9, "cannot be fetched after 3 tries .no byte for 0.3 s", 3),
}


@pytest.mark.parametrize("kind", LASTING)
def test_a_store_that_stays_bad_ends_in_one_line_and_the_other_shards_read(
    server: FaultServer, flat: np.ndarray, tmp_path: Path, kind: str
) -> None:
    faults, message, tries = LASTING[kind]
    shards = ShardSet.open(server.url, cache=options(tmp_path, retries=2, timeout_seconds=0.3))
    server.faults["shard-000001.tar"] = list(faults)
    first, after = shards.shards[0].tokens, shards.shards[0].tokens + shards.shards[1].tokens
    begun = time.monotonic()
    with pytest.raises(ShardError, match=message) as caught:
        shards.read_tokens(first, 3)
    assert time.monotonic() - begun < 4
    assert caught.value.passing == (kind in ("errors", "always cut", "hangs")), "a later start may find the store well"
    assert (
        caught.value.shard == 1
        and f"{server.url}/shard-000001.tar: " in str(caught.value)
        and "\n" not in str(caught.value)
    )
    assert server.gets()["shard-000001.tar"] == tries
    np.testing.assert_array_equal(shards.read_tokens(0, first), flat[:first])
    np.testing.assert_array_equal(shards.read_tokens(after, len(flat) - after), flat[after:])
    assert not [name for name in cached(tmp_path) if ".part-" in name or "000001" in name]
    server.faults.clear()
    np.testing.assert_array_equal(all_tokens(shards), flat)


def test_a_store_that_only_drips_is_given_up_within_the_bound(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.remote_fetch, "LEAST_RATE", 1 << 20)
    shards = ShardSet.open(server.url, cache=options(tmp_path, retries=1, timeout_seconds=0.5))
    server.faults["shard-000000.tar"] = ["drip 2000"] * 9  # 20 kB would take ten seconds, and no wait is long
    begun = time.monotonic()
    with pytest.raises(ShardError, match="slower than 1024 KiB a second") as caught:
        shards.read_tokens(0, 3)
    assert 0.9 < time.monotonic() - begun < 3 and caught.value.passing


OPENING = {
    "manifest.json": ("500", "manifest.json: cannot be fetched after 4 tries .HTTP 500"),
    "tokenizer.json": ("wrong", "tokenizer.json: differs from the tokenizer"),
    "index.npy": ("wrong", "index.npy: cannot be fetched after 4 tries .its content is not"),
}


@pytest.mark.parametrize("name", OPENING)
def test_what_describes_the_set_must_be_good(server: FaultServer, tmp_path: Path, name: str) -> None:
    fault, message = OPENING[name]
    server.faults[name] = [fault] * 9
    with pytest.raises(InputError, match=message):
        ShardSet.open(server.url, cache=options(tmp_path), tolerate=5)
    server.faults.clear()
    assert ShardSet.open(server.url, cache=options(tmp_path)).tokens


def test_a_missing_manifest_and_a_closed_port_say_so(server: FaultServer, folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest.json: cannot be fetched \(there is no such file\).*train/ or val/"):
        ShardSet.open(server.url, cache=options(tmp_path))
    server.close()
    with pytest.raises(InputError, match=r"cannot be fetched after 2 tries \(Connect"):
        ShardSet.open(server.url, cache=options(tmp_path, retries=1))


def test_verify_full_fetches_all_and_tolerates_as_many_bad_shards_as_allowed(
    server: FaultServer, flat: np.ndarray, tmp_path: Path
) -> None:
    server.faults = {"shard-000001.tar": ["404"] * 2, "shard-000002.tar": ["403"] * 2}
    with pytest.raises(InputError, match="shard-000001.tar: .*shard-000002.tar: .*2 bad shards, 1 are tolerated"):
        ShardSet.open(server.url, "full", cache=options(tmp_path), tolerate=1)
    shards = ShardSet.open(server.url, "full", cache=options(tmp_path), tolerate=2)
    assert list(shards.bad) == [1, 2] and "no such file" in shards.bad[1]
    with pytest.raises(ShardError, match="no such file"):
        shards.read_tokens(shards.shards[0].tokens, 1)


def test_a_set_at_an_address_is_verified_and_a_damaged_cache_found(
    server: FaultServer, folder: Path, tmp_path: Path
) -> None:
    cache = options(tmp_path, retries=0)
    for processes in (2, 1):
        report = verify_set(server.url, processes=processes, cache=cache)
        assert report.faults == [] and report.shards >= 6
    path = next((tmp_path / "cache").glob("*/shard-000001.tar"))
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    server.faults = {"shard-000002.index.npy": ["404"], "shard-000003.index.npy": ["wrong"]}
    faults = verify_set(server.url, processes=1, cache=cache).faults
    assert len(faults) == 4 and all(fault.startswith(server.url) for fault in faults)
    assert "shard-000001.tar: its sha256 is not" in faults[0] and "checksum of the index" in faults[1]
    assert "shard-000002.index.npy: cannot be read (cannot be fetched (there is no such file))" in faults[2]
    assert "shard-000003.index.npy: its sha256 is not" in faults[3]


def test_credentials_open_the_store_and_appear_nowhere(
    server: FaultServer, flat: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.user = "reader:s3cret/word"
    url = f"http://reader:s3cret%2Fword@127.0.0.1:{server.port}/train?sig=hiddensig"
    shards = ShardSet.open(url, cache=options(tmp_path))
    assert len(shards.read_tokens(0, 5)) == 5 and server.queries[-1] == "sig=hiddensig"
    server.faults["shard-000001.tar"] = ["500"] * 9
    messages = [shards.location, repr(shards)]
    with pytest.raises(ShardError) as caught:
        all_tokens(shards)
    messages += [str(caught.value), repr(caught.value), *map(str, (caught.value.__cause__, caught.value.reason))]
    for bad in (url.replace("s3cret", "other"), url.replace("127.0.0.1", "127.0.0.1:x"), url.replace("http:", "ftp:")):
        with pytest.raises(InputError) as refused:
            ShardSet.open(bad, cache=options(tmp_path))
        messages.append(str(refused.value))
    assert "HTTP 401" in messages[-3] and "no address" in messages[-2] and "ftp:// is unknown" in messages[-1]
    messages += [record.getMessage() for record in caplog.records]
    for secret in ("s3cret", "reader", "hiddensig", "other", "cmVhZGVy"):
        assert not any(secret in message for message in messages), secret
    assert not any(
        secret.encode() in path.read_bytes()
        for secret in ("s3cret", "hiddensig")
        for path in (tmp_path / "cache").rglob("*.json")
    )


def test_an_error_of_a_store_shows_nothing_of_its_own_text() -> None:
    error = _fetch_error(RuntimeError("https://key:secret@host AKIAIOSFODNN7"), 5)
    assert error.reason == "the connection broke (RuntimeError)" and not error.lasting
    assert (
        _fetch_error(PermissionError("secret"), 5).lasting
        and "secret" not in _fetch_error(PermissionError("secret"), 5).reason
    )


def test_a_store_without_streams_is_read_in_ranges(folder: Path, flat: np.ndarray, tmp_path: Path, monkeypatch) -> None:
    """fsspec's memory store stands for s3 and gs: the same calls, `info` and `cat_file` of a range."""
    import data.remote_stream

    monkeypatch.setattr(data.remote_stream, "RANGE_BYTES", 1000)
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe_file(f"/bucket/train/{path.name}", path.read_bytes())
    shards = ShardSet.open("memory://bucket/train", cache=options(tmp_path))
    np.testing.assert_array_equal(all_tokens(shards), flat)
    store.rm("/bucket/train/shard-000001.tar")
    (tmp_path / "cache" / shards.folder.name / "shard-000001.tar").unlink()
    shards.close()
    with pytest.raises(ShardError, match="there is no such file"):
        all_tokens(shards)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(scheme: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"{scheme}:// needs the package {package}.*pip install {package}"):
        ShardSet.open(f"{scheme}://bucket/train", cache=options(tmp_path))


def test_a_stream_never_gives_more_than_one_byte_too_many(server: FaultServer, folder: Path) -> None:
    (folder / "big").write_bytes(bytes(3_000_000))
    blocks = list(Address(server.url, 5).stream("big", 10, 1_500_000))
    assert sum(map(len, blocks)) == 1_500_001 - 10
    with pytest.raises(FetchError, match="no such file"):
        list(Address(server.url, 5).stream("small", 0, 10))
