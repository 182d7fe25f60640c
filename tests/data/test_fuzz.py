"""Whatever lies in the files of a set: reading and verifying end in an answer or one InputError, in little time and memory."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.chunk_index import npy_bytes, read_npy_header
from data.errors import InputError
from data.shard_set import ShardSet
from data.shard_writer import member_header
from data.tar_member import read_member
from data.verify import verify_set
from tests.data.conftest import write_shard_set

SPARE_BYTES = 1 << 30  # of address space above what the process has: a shape that lies must not be believed
SETTINGS = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
# 1,000 cases in all, and with `make parity` another 10,400.
CASES = {"headers": (300, 3000), "tars": (220, 2400), "indexes": (230, 2400), "manifests": (250, 2600)}


def few_and_many(what: str) -> pytest.MarkDecorator:
    few, many = CASES[what]
    return pytest.mark.parametrize("cases", [few, pytest.param(many, marks=pytest.mark.parity)])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    rng = np.random.default_rng(1)
    documents = [np.append(rng.integers(2, 300, 9), 1) for _ in range(24)]
    spans = [np.array([[1, 3, 0], [5, 2, 1]], np.int32)] * 24
    out = tmp_path_factory.mktemp("fuzz") / "set"
    return write_shard_set(out, tokenizer, documents, shard_tokens=100, spans=spans, metas=[{"a": 1}] * 24)


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + SPARE_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def restored(path: Path) -> Iterator[None]:
    content = path.read_bytes()
    yield
    path.write_bytes(content)


# A change of some bytes: overwritten with noise or with what numbers and headers dislike, cut, doubled, or all noise.
NASTY = st.sampled_from(
    [b"\0" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"9" * 11, b"-1", b"7" * 12, b"|O", b"(1152921504606846976,)"]
)
PATCH = st.tuples(st.floats(0, 1, exclude_max=True), st.one_of(st.binary(min_size=1, max_size=9), NASTY))
CHANGES = st.one_of(
    st.lists(PATCH, min_size=1, max_size=4),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("double"), st.floats(0, 1), st.floats(0, 1)),
    st.tuples(st.just("noise"), st.binary(max_size=700)),
)


def changed(content: bytes, change) -> bytes:
    if isinstance(change, list):
        out = bytearray(content)
        for place, new in change:
            at = int(place * len(out))
            out[at : at + len(new)] = new[: len(out) - at]
        return bytes(out)
    kind, *values = change
    if kind == "noise":
        return values[0]
    first, last = int(min(values) * len(content)), int(max(values) * len(content))
    return content[:last] if kind == "cut" else content[:last] + content[first:last] + content[last:]


def use(folder: Path) -> None:
    """Everything a reader can do with a set; InputError is an answer too."""
    with contextlib.suppress(InputError):
        shards = ShardSet.open(folder, "size", tolerate=1)
        for start in range(0, min(shards.tokens, 600), 97):
            count = min(150, shards.tokens - start)
            reads: tuple[Callable, ...] = (shards.read_tokens, shards.read_pieces, shards.read_spans)
            for read in reads:
                with contextlib.suppress(InputError):
                    assert len(read(start, count)) <= 3 * count
            assert shards.shards_of(start, count)
        for chunk in range(min(shards.manifest.chunks, 9)):
            with contextlib.suppress(InputError):
                assert shards.read_meta(chunk)
    with contextlib.suppress(InputError):
        report = verify_set(str(folder), processes=1)
        assert all("\n" not in fault for fault in report.faults)


MEMBER = member_header("000001-000002.tok.npy", 12345)
NPY = npy_bytes(np.zeros((3, 5), "<i4"))[:128]


@few_and_many("headers")
def test_headers_of_tars_and_arrays(cases: int) -> None:
    @settings(max_examples=cases, **SETTINGS)
    @given(change=CHANGES)
    def check(change) -> None:
        for good_header, read in ((MEMBER, read_member), (NPY, read_npy_header)):
            with contextlib.suppress(ValueError):
                assert len(read(changed(good_header, change))) in (2, 3)

    check()


@few_and_many("tars")
def test_tars(good: Path, cases: int) -> None:
    path = good / "shard-000001.tar"
    content = path.read_bytes()

    @settings(max_examples=cases, **SETTINGS)
    @given(change=CHANGES, chunk=st.booleans())
    def check(change, chunk: bool) -> None:
        # Half of the time the change falls into the first chunk and not into the zeros that fill most of a small tar.
        if chunk and isinstance(change, list):
            path.write_bytes(changed(content[:3000], change) + content[3000:])
        else:
            path.write_bytes(changed(content, change))
        use(good)

    with restored(path):
        check()


CELLS = st.tuples(
    st.integers(0, 5),
    st.integers(0, 10**6),
    st.one_of(
        st.integers(-3, 300),
        st.integers(-(2**63), 2**63 - 1),
        st.sampled_from([2**62, 2**63 - 1, -(2**63), 2**31, 2**32]),
    ),
    st.booleans(),
)


@few_and_many("indexes")
def test_indexes(good: Path, cases: int) -> None:
    path = good / "index.npy"
    content, whole = path.read_bytes(), np.load(path)

    @settings(max_examples=cases, **SETTINGS)
    @given(change=st.one_of(CHANGES, st.lists(CELLS, min_size=1, max_size=4)))
    def check(change) -> None:
        if isinstance(change, list) and len(change[0]) == 4:
            index = whole.copy()
            with np.errstate(over="ignore"):
                for row, column, value, relative in change:
                    cell = index[row : row + 1, column % index.shape[1]]
                    cell[:] = cell + np.int64(value) if relative else np.int64(value)
            path.write_bytes(npy_bytes(index))
        else:
            path.write_bytes(changed(content, change))
        use(good)

    with restored(path):
        check()


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 1 << 20),
        st.sampled_from(
            [
                2**63,
                2**64,
                10**30,
                -1,
                "",
                "uint32",
                "../x.tar",
                "a.tar",
                "shard-000001.tar",
                "x" * 5000,
                "\0",
                "\ud800",
            ]
        ),
        st.floats(),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


def replace_leaf(value, path: list[float], new, delete: bool):
    """A copy of a JSON value in which what `path` leads to is another value, or gone."""
    if not path or not isinstance(value, (dict, list)) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[int(path[0] * len(keys))]
    copy = dict(value) if isinstance(value, dict) else list(value)
    if delete and len(path) == 1:
        del copy[key]
    else:
        copy[key] = replace_leaf(value[key], path[1:], new, delete)
    return copy


@few_and_many("manifests")
def test_manifests(good: Path, cases: int) -> None:
    path = good / "manifest.json"
    content = path.read_bytes()
    places = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4)

    @settings(max_examples=cases, **SETTINGS)
    @given(
        edits=st.lists(st.tuples(places, JSON, st.booleans()), min_size=1, max_size=3),
        change=st.one_of(st.none(), st.none(), CHANGES),
    )
    def check(edits, change) -> None:
        record = json.loads(content)
        for where, new, delete in edits:
            record = replace_leaf(record, where, new, delete)
        path.write_bytes(json.dumps(record).encode() if change is None else changed(content, change))
        use(good)

    with restored(path):
        check()
