"""Laws of the shard format: vanilla webdataset reads it, and any range of tokens, documents and spans reads back."""

from __future__ import annotations

import concurrent.futures
import errno
import io
import json
import multiprocessing
import os
import pickle
import resource
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

import data.shard_files
import data.shard_set
from data.errors import ShardError
from data.shard_set import ShardSet
from data.shard_writer import ShardWriter

WriteSet = Callable[..., Path]


def webdataset_samples(folder: Path) -> list[dict]:
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.WebDataset(tars, shardshuffle=False).decode())


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_vanilla_webdataset_reads_back_the_documents(
    write_set: WriteSet, documents: list[np.ndarray], dtype: str
) -> None:
    samples = webdataset_samples(write_set(documents, dtype=dtype))
    assert len({sample["__key__"] for sample in samples}) == len(samples) > 10
    for sample in samples:
        assert sample["tok.npy"].dtype == dtype and sample["tok.npy"].ndim == 1
        assert sample["lens.npy"].sum() == len(sample["tok.npy"])
    flat = np.concatenate([sample["tok.npy"] for sample in samples])
    np.testing.assert_array_equal(flat, np.concatenate(documents))


def test_vanilla_webdataset_reads_spans_and_what_is_known_about_documents(
    write_set: WriteSet, documents: list[np.ndarray]
) -> None:
    spans, metas = with_spans(documents)
    samples = webdataset_samples(write_set(documents, spans=spans, metas=metas))
    assert any("spans.npy" in s for s in samples) and not all("spans.npy" in s for s in samples)
    for sample in samples:
        found = sample.get("spans.npy", np.zeros((0, 3), np.int32))
        assert found.dtype == np.int32 and (found[:, 0] + found[:, 1] <= len(sample["tok.npy"])).all()
        assert len(sample.get("meta.json", sample["lens.npy"])) == len(sample["lens.npy"])
    lengths = sum(int(s["spans.npy"][:, 1].sum()) for s in samples if "spans.npy" in s)
    assert lengths == sum(int(rows[:, 1].sum()) for rows in spans) > 0


def test_a_chunk_closes_at_the_first_document_end_and_long_documents_are_cut_into_pieces(
    write_set: WriteSet, documents: list[np.ndarray]
) -> None:
    """Independent reference: the rule applied to the list of lengths, without the writer's state."""
    pieces = [(min(50, len(d) - i), i + 50 >= len(d)) for d in documents for i in range(0, len(d), 50)]
    expected, chunk, in_shard = [], [], 0
    for length, last in pieces:
        chunk.append(length)
        full = sum(chunk) >= 50
        if full or (last and in_shard >= 200):
            expected.append(chunk)
            in_shard, chunk = in_shard + sum(chunk), []
        if last and in_shard >= 200:
            in_shard = 0
    expected += [chunk] if chunk else []
    folder = write_set(documents)
    samples = webdataset_samples(folder)
    assert [sample["lens.npy"].tolist() for sample in samples] == expected
    ends_in_eos = [bool(sample["tok.npy"][end - 1] == 1) for sample in samples for end in np.cumsum(sample["lens.npy"])]
    assert ends_in_eos == [last for _, last in pieces]
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert (manifest["documents"], manifest["split_documents"]) == (len(documents), 3)
    assert manifest["tokens"] == sum(map(len, documents)) and len(manifest["shards"]) > 3


def test_every_shard_holds_whole_documents(write_set: WriteSet, documents: list[np.ndarray]) -> None:
    folder = write_set(documents)
    for shard in ShardSet.open(folder).shards:
        samples = list(webdataset.WebDataset(str(folder / shard.file), shardshuffle=False).decode())
        flat = np.concatenate([sample["tok.npy"] for sample in samples])
        assert flat[-1] == 1 and (flat == 1).sum() == shard.documents and len(flat) == shard.tokens
        assert shard.file == ShardSet.open(folder).shards[-1].file or shard.tokens >= 200


def test_shards_of_documents_that_are_all_longer_than_a_chunk_end_too(write_set: WriteSet) -> None:
    long = [np.full(137, 5, np.uint16) for _ in range(40)]
    for document in long:
        document[-1] = 1
    shards = ShardSet.open(write_set(long)).shards
    assert all(200 <= shard.tokens <= 200 + 137 for shard in shards[:-1]) and len(shards) > 10
    assert sum(shard.documents for shard in shards) == 40


def test_tars_are_plain_ustar_with_no_time_or_owner_and_the_index_points_at_the_payload(
    write_set: WriteSet, documents: list[np.ndarray]
) -> None:
    folder = write_set(documents)
    for path in sorted(folder.glob("*.tar")):
        index = np.load(path.with_suffix("").with_suffix(".index.npy"), allow_pickle=False)
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            assert path.read_bytes()[257:265] == b"ustar\x0000" and path.stat().st_size % tarfile.RECORDSIZE == 0
            for member in members:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
            arrays = [np.load(io.BytesIO(archive.extractfile(member).read()), allow_pickle=False) for member in members]
            before = 0
            for row, member, tokens, lengths in zip(index.T, members[::2], arrays[::2], arrays[1::2], strict=True):
                crc = zlib.crc32(tokens.tobytes() + lengths.tobytes())
                payload = member.offset_data + member.size - tokens.nbytes
                assert row.tolist() == [before, payload, len(lengths), (tokens == 1).sum(), 0, crc]
                before += len(tokens)


def test_the_same_documents_give_the_same_bytes(write_set: WriteSet, documents: list[np.ndarray]) -> None:
    first, second = write_set(documents, folder="a"), write_set(documents, folder="b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_any_range_reads_as_the_slice_of_all_documents_laid_end_to_end(
    write_set: WriteSet, documents: list[np.ndarray], dtype: str
) -> None:
    flat = np.concatenate(documents)
    shards = ShardSet.open(write_set(documents, dtype=dtype))
    assert shards.tokens == len(flat)
    rng = np.random.default_rng(0)
    ranges = [(int(a), int(rng.integers(0, len(flat) - a + 1))) for a in rng.integers(0, len(flat), size=300)]
    for start, count in [*ranges, (0, len(flat)), (len(flat), 0), (len(flat) - 1, 1)]:
        tokens = shards.read_tokens(start, count)
        assert tokens.dtype == dtype
        np.testing.assert_array_equal(tokens, flat[start : start + count])
    for start, count in [(-1, 2), (0, len(flat) + 1), (len(flat), 1), (3, -1)]:
        with pytest.raises(IndexError):
            shards.read_tokens(start, count)


def with_spans(documents: list[np.ndarray]) -> tuple[list[np.ndarray], list[dict | None]]:
    """Spans of every kind, in order and apart, in most documents, and something known about every third."""
    rng = np.random.default_rng(5)
    spans = []
    for document in documents:
        borders = np.sort(rng.choice(len(document) + 1, size=min(len(document) + 1, 4), replace=False))
        pairs = [(a, b - a, rng.integers(3)) for a, b in zip(borders[::2], borders[1::2])]
        spans.append(np.array(pairs if rng.random() < 0.7 else [], np.int32).reshape(-1, 3))
    return spans, [{"title": f"n° {i}"} if i % 3 == 0 else None for i in range(len(documents))]


def test_pieces_and_spans_of_any_range_are_those_of_the_documents_laid_end_to_end(
    write_set: WriteSet, documents: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: an array with the span of every token, and the beginnings counted from the lists of documents."""
    spans, metas = with_spans(documents)
    monkeypatch.setattr(data.shard_set, "LAYOUT_BYTES", 2500)  # a few chunks: most reads find theirs evicted
    folder = write_set(documents, spans=spans, metas=metas)
    shards = ShardSet.open(folder)
    lengths = [len(part) for d in documents for part in np.split(d, range(50, len(d), 50))]
    begins = set((np.cumsum(lengths) - lengths).tolist())
    kind_of = np.full(shards.tokens, -1)
    first_of = np.zeros(shards.tokens, bool)
    for document, at in zip(spans, np.cumsum([len(d) for d in documents]) - [len(d) for d in documents]):
        for start, length, kind in document:
            kind_of[at + start : at + start + length] = kind
            first_of[at + start] = True
    first_of[sorted(begins)] = True  # a span that a piece border cuts is two
    assert shards.has_spans and shards.row_tokens == 0 and shards.manifest.spans >= sum(map(len, spans)) > 40
    rng = np.random.default_rng(0)
    ranges = [
        (int(a), int(rng.integers(0, min(shards.tokens - a, 300) + 1))) for a in rng.integers(0, shards.tokens, 300)
    ]
    for start, count in [*ranges, (0, shards.tokens), (shards.tokens, 0)]:
        pieces = shards.read_pieces(start, count)
        assert pieces.dtype == np.int64
        assert pieces.tolist() == [i for i in range(count) if start + i in begins]
        found = shards.read_spans(start, count)
        assert found.dtype == np.int32 and found.shape[1:] == (3,)
        shown, cuts = np.full(count, -1), []
        for first, length, kind in found:
            assert length > 0 and (shown[first : first + length] == -1).all()
            shown[first : first + length] = kind
            cuts.append(first)
        np.testing.assert_array_equal(shown, kind_of[start : start + count])
        wanted = [i for i in range(count) if kind_of[start + i] >= 0 and (i == 0 or first_of[start + i])]
        assert cuts == wanted
        tars = [
            e.file
            for e, end in zip(shards.shards, np.cumsum([e.tokens for e in shards.shards]))
            if end - e.tokens < start + count and end > start
        ]
        assert [shards.shards[i].file for i in shards.shards_of(start, count)] == (tars if count else [])
    assert shards._layouts.bytes <= 2500
    for read in (shards.read_pieces, shards.read_spans, shards.shards_of):
        with pytest.raises(IndexError):
            read(-1, 2)
    of_chunks = [meta for chunk in range(shards.manifest.chunks) for meta in shards.read_meta(chunk)]
    pieces_of = [m for d, m in zip(documents, metas) for _ in range(0, len(d), 50)]
    assert of_chunks == pieces_of
    with pytest.raises(IndexError):
        shards.read_meta(shards.manifest.chunks)


def test_a_set_without_spans_and_meta_says_so(write_set: WriteSet, documents: list[np.ndarray]) -> None:
    shards = ShardSet.open(write_set(documents))
    assert not shards.has_spans and shards.read_spans(0, shards.tokens).shape == (0, 3)
    metas = [shards.read_meta(chunk) for chunk in range(shards.manifest.chunks)]
    assert {m for meta in metas for m in meta} == {None} and sum(map(len, metas)) == len(
        shards.read_pieces(0, shards.tokens)
    )


@pytest.mark.parametrize("name", ["EIO", "ESTALE"])
def test_a_passing_fault_of_the_file_system_is_tried_again_and_a_lasting_one_named(
    write_set: WriteSet, documents: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shards, flat = ShardSet.open(write_set(documents)), np.concatenate(documents)
    pauses: list[float] = []
    monkeypatch.setattr(data.shard_files.time, "sleep", pauses.append)
    real, left = os.preadv, [2]

    def failing(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    np.testing.assert_array_equal(shards.read_tokens(3, 30), flat[3:33])
    left[0] = 3
    with pytest.raises(ShardError, match=r"shard-000000\.tar: cannot be read") as caught:
        shards.read_tokens(3, 30)
    assert caught.value.shard == 0 and left[0] == 0 and len(pauses) == 4 and 0 < sum(pauses) < 2
    np.testing.assert_array_equal(shards.read_tokens(3, 30), flat[3:33])


def test_threads_read_right_while_files_are_evicted_and_few_stay_open(
    write_set: WriteSet, documents: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.shard_set, "OPEN_FILES", 2)
    folder = write_set(documents)
    shards, flat = ShardSet.open(folder), np.concatenate(documents)

    def read(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(0, len(flat) - 7, size=400)
        return all((shards.read_tokens(int(s), 7) == flat[s : s + 7]).all() for s in starts)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.lexists(link)]
    held = [name for name in names if name.startswith(str(folder)) and name.endswith(".tar")]
    assert len(shards.shards) > 3 and len(held) == 2


def test_sets_together_never_run_out_of_file_descriptors(write_set: WriteSet, documents: list[np.ndarray]) -> None:
    """With room for three files more, six sets of six tars each still read: each gives up what it holds for the others."""
    sets = [ShardSet.open(write_set(documents, folder=f"set{i}")) for i in range(6)]
    flat = np.concatenate(documents)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptor = os.open("/", os.O_RDONLY)  # the lowest that is free
    os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor + 3, hard))
    try:
        for _ in range(2):
            for shards in sets:
                np.testing.assert_array_equal(shards.read_tokens(0, len(flat)), flat)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _read_in_child(shards: ShardSet, start: int, count: int, answers: multiprocessing.SimpleQueue) -> None:
    answers.put(shards.read_tokens(start, count).tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_set_in_use_works_in_a_child_process(write_set: WriteSet, documents: list[np.ndarray], method: str) -> None:
    shards, flat = ShardSet.open(write_set(documents)), np.concatenate(documents)
    shards.read_tokens(0, 10)
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(shards, 40, 300, answers))
    child.start()
    assert answers.get() == flat[40:340].tolist()
    child.join(30)
    assert child.exitcode == 0 and shards.read_tokens(5, 10).tolist() == flat[5:15].tolist()


def test_a_pickled_set_carries_no_open_file(write_set: WriteSet, documents: list[np.ndarray]) -> None:
    shards = ShardSet.open(write_set(documents))
    shards.read_tokens(0, shards.tokens)
    copy = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(copy.read_tokens(3, 60), shards.read_tokens(3, 60))


def test_a_writer_that_goes_on_after_finished_shards_gives_the_same_shards(
    tmp_path: Path, documents: list[np.ndarray]
) -> None:
    options = {"dtype": "uint16", "chunk_tokens": 50, "shard_tokens": 200}
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    whole = ShardWriter(tmp_path / "once", **options)
    for document in documents:
        whole.add_document(document, 1)
    expected = whole.close()
    seen: list = []
    cut = ShardWriter(tmp_path / "twice", **options, on_shard=seen.append)
    for document in documents[:35]:
        cut.add_document(document, 1)
    assert 0 < len(seen) < len(expected)
    rest = ShardWriter(tmp_path / "twice", **options, finished=seen)
    for document in documents[sum(entry.documents for entry in seen) :]:
        rest.add_document(document, 1)
    assert rest.close() == expected
    for entry in expected:
        assert (tmp_path / "once" / entry.file).read_bytes() == (tmp_path / "twice" / entry.file).read_bytes()
