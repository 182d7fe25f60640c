"""Laws of the shard format: vanilla webdataset reads it, any token range reads back, and damage is found and named."""

from __future__ import annotations

import concurrent.futures
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

import data.shard_set
from data.errors import InputError
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


def test_a_chunk_closes_at_the_first_document_end_and_long_documents_are_cut_into_pieces(
    write_set: WriteSet, documents: list[np.ndarray]
) -> None:
    """Independent reference: the rule applied to the list of lengths, without the writer's state."""
    pieces = [(min(50, len(d) - i), i + 50 >= len(d)) for d in documents for i in range(0, len(d), 50)]
    expected, chunk = [], []
    for length, _ in pieces:
        chunk.append(length)
        if sum(chunk) >= 50:
            expected.append(chunk)
            chunk = []
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
            for row, member in zip(index, members[::2], strict=True):
                tokens = np.load(io.BytesIO(archive.extractfile(member).read()), allow_pickle=False)
                assert row[0] == member.offset_data + member.size - tokens.nbytes and row[1] == len(tokens)
                assert row[2] == (tokens == 1).sum()


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
    assert shards.tokens == len(flat) and shards.chunk_starts[-1] == len(flat)
    rng = np.random.default_rng(0)
    ranges = [(int(a), int(rng.integers(0, len(flat) - a + 1))) for a in rng.integers(0, len(flat), size=300)]
    for start, count in [*ranges, (0, len(flat)), (len(flat), 0), (len(flat) - 1, 1)]:
        tokens = shards.read_tokens(start, count)
        assert tokens.dtype == dtype
        np.testing.assert_array_equal(tokens, flat[start : start + count])
    for start, count in [(-1, 2), (0, len(flat) + 1), (len(flat), 1), (3, -1)]:
        with pytest.raises(IndexError):
            shards.read_tokens(start, count)


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
    held = [link for link in links if os.path.lexists(link) and os.readlink(link).startswith(str(folder))]
    assert len(shards.shards) > 3 and len(held) == 2


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


def edit_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


def edit_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def edit_index(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "shard-000001.index.npy"
        np.save(path, change(np.load(path)))

    return edit


def add(row: int, column: int, amount: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(index: np.ndarray) -> np.ndarray:
        index[row, column] += amount
        return index

    return change


def flip_byte(content: bytes, place: int = 700) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: missing"),
    "manifest cut": (edit_file("manifest.json", lambda b: b[: len(b) // 2]), r"manifest\.json: not JSON"),
    "manifest not text": (edit_file("manifest.json", lambda b: b"\xff\xfe" + b), r"manifest\.json: not JSON"),
    "manifest a list": (edit_file("manifest.json", lambda b: b"[]"), "must be a JSON object"),
    "other version": (edit_manifest(lambda m: m.update(format_version=2)), "format_version is 2.*reads 1"),
    "missing field": (edit_manifest(lambda m: m.pop("utf8_bytes")), "field utf8_bytes is missing"),
    "missing shard field": (edit_manifest(lambda m: m["shards"][1].pop("sha256")), r"shards\[1\]\.sha256 is missing"),
    "ill-typed": (edit_manifest(lambda m: m.update(vocab_size="300")), "vocab_size must be a whole number"),
    "negative": (edit_manifest(lambda m: m["special"].update(mask=-1)), r"special\.mask must be a whole number"),
    "unknown dtype": (edit_manifest(lambda m: m.update(dtype="int64")), "dtype is 'int64'"),
    "vocab over dtype": (edit_manifest(lambda m: m.update(vocab_size=65537)), "65537 does not fit dtype uint16"),
    "special outside": (edit_manifest(lambda m: m["special"].update(bos=300)), r"special\.bos is 300, outside"),
    "mask is eos": (edit_manifest(lambda m: m["special"].update(mask=1)), r"special\.mask is 1, the same"),
    "mask is eos only": (edit_manifest(lambda m: m["special"].update(mask=1, pad=5)), r"special\.mask is 1, the same"),
    "mask is pad only": (edit_manifest(lambda m: m["special"].update(mask=5, pad=5)), r"special\.mask is 5, the same"),
    "totals disagree": (edit_manifest(lambda m: m.update(tokens=5)), "tokens is 5 but the shards add up"),
    "nothing in it": (
        edit_manifest(lambda m: m.update(shards=[], **dict.fromkeys(["tokens", "documents", "utf8_bytes"], 0))),
        "add up to|no tokens",
    ),
    "path upwards": (edit_manifest(lambda m: m["shards"][0].update(file="../x.tar")), r"'\.\./x\.tar' is not a plain"),
    "absolute path": (edit_manifest(lambda m: m["shards"][0].update(file="/x.tar")), r"'/x\.tar' is not a plain"),
    "tokenizer path": (edit_manifest(lambda m: m["tokenizer"].update(file="a/b")), "'a/b' is not a plain"),
    "listed twice": (
        edit_manifest(lambda m: m["shards"][1].update(file="shard-000000.tar")),
        r"shard-000000\.tar is listed twice",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json: .* cannot be read"),
    "other tokenizer": (edit_file("tokenizer.json", lambda b: b + b"\n"), r"tokenizer\.json: differs"),
    "no shard": (lambda f: (f / "shard-000001.tar").unlink(), r"shard-000001\.tar: .*cannot be read"),
    "shard is a folder": (
        lambda f: ((f / "shard-000001.tar").unlink(), (f / "shard-000001.tar").mkdir()),
        r"shard-000001\.tar: ",
    ),
    "shard cut": (edit_file("shard-000001.tar", lambda b: b[:-512]), r"shard-000001\.tar: cut short"),
    "shard grown": (edit_file("shard-000001.tar", lambda b: b + b"\0"), r"shard-000001\.tar: too long"),
    "one bit": (edit_file("shard-000001.tar", flip_byte), r"shard-000001\.tar: its content was changed"),
    "no index": (lambda f: (f / "shard-000001.index.npy").unlink(), r"shard-000001\.index\.npy: .*cannot be read"),
    "index junk": (edit_file("shard-000001.index.npy", lambda b: b"junk"), r"index\.npy: not a readable index"),
    "index cut": (edit_file("shard-000001.index.npy", lambda b: b[:-8]), r"index\.npy: not a readable index"),
    "index shape": (edit_index(lambda a: a[:-1]), r"index\.npy: the index is int64"),
    "index type": (edit_index(lambda a: a.astype(np.float64)), r"index\.npy: the index is float64"),
    "index sums": (edit_index(add(0, 1, 1)), r"index\.npy: \d+ tokens and"),
    "index documents": (edit_index(add(0, 2, 1)), r"index\.npy: \d+ tokens and"),
    "offset beyond the tar": (edit_index(add(-1, 0, 1 << 40)), r"index\.npy: an offset lies outside"),
    "offset negative": (edit_index(add(0, 0, -4096)), r"index\.npy: an offset lies outside"),
    "offset in another chunk": (edit_index(add(1, 0, -1536)), r"index\.npy: an offset lies outside"),
    "offset shifted": (edit_index(add(0, 0, 2)), r"index\.npy: the index was changed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_at_opening_with_one_line_that_names_the_file(
    write_set: WriteSet, documents: list[np.ndarray], kind: str
) -> None:
    folder = write_set(documents)
    assert ShardSet.open(folder).tokens
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        ShardSet.open(folder)
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text and "python -m pretrain prepare" in text


def test_an_index_with_pickled_objects_is_refused_without_running_them(
    write_set: WriteSet, documents: list[np.ndarray], tmp_path: Path
) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    folder = write_set(documents)
    np.save(folder / "shard-000000.index.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not a readable index"):
        ShardSet.open(folder)
    assert not (tmp_path / "ran").exists()


def test_a_missing_folder_and_the_parent_of_a_set_say_what_to_do(
    write_set: WriteSet, documents: list[np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no such folder"):
        ShardSet.open(tmp_path / "nowhere")
    write_set(documents, folder="train")
    with pytest.raises(InputError, match=re.escape(f"did you mean {tmp_path / 'train'}")):
        ShardSet.open(tmp_path)
    with pytest.raises(InputError, match="verify: 'deep'"):
        ShardSet.open(tmp_path / "train", verify="deep")


def test_each_verify_depth_finds_what_it_promises(
    write_set: WriteSet, documents: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write_set(documents)
    offset = int(np.load(good / "shard-000001.index.npy")[-1, 0])
    places = {"payload": offset, "tar header": offset - 128 - 512, "npy header": offset - 120, "end": -1}
    monkeypatch.setattr(data.shard_set, "FULL_CHECK_BYTES", 0)  # so that auto stands for a large set
    found = {}
    for damage, place in places.items():
        folder = tmp_path / damage.replace(" ", "-")
        shutil.copytree(good, folder)
        edit_file("shard-000001.tar", lambda b, place=place: flip_byte(b, place % len(b)))(folder)
        found[damage] = set()
        for verify in ("size", "auto", "full"):
            try:
                ShardSet.open(folder, verify=verify)
            except InputError as error:
                assert "shard-000001.tar" in str(error)
                found[damage].add(verify)
    headers = {"auto", "full"}
    assert found == {"payload": {"full"}, "tar header": headers, "npy header": headers, "end": {"full"}}


def test_an_id_outside_the_vocabulary_is_refused_when_read_and_named(
    write_set: WriteSet, documents: list[np.ndarray]
) -> None:
    documents[40][:-1] = 300  # the vocabulary ends at 299
    shards = ShardSet.open(write_set(documents, vocab_size=300))
    start = sum(map(len, documents[:40]))
    with pytest.raises(InputError, match="token id 300, outside the vocabulary of 300") as caught:
        shards.read_tokens(start - 3, 4)
    chunk = int(np.searchsorted(shards.chunk_starts, start, side="right")) - 1
    shard = int(shards.chunk_shards[chunk])
    first = [i for i, s in enumerate(shards.chunk_shards) if s == shard][0]
    assert shards.shards[shard].file in str(caught.value) and f"chunk {chunk - first} " in str(caught.value)
    assert len(shards.read_tokens(0, start)) == start


def test_a_shard_cut_short_after_opening_is_named(write_set: WriteSet, documents: list[np.ndarray]) -> None:
    folder = write_set(documents)
    shards = ShardSet.open(folder)
    os.truncate(folder / "shard-000002.tar", 700)
    with pytest.raises(InputError, match=r"shard-000002\.tar: ends inside chunk 0"):
        shards.read_tokens(0, shards.tokens)
    shards.close()
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(InputError, match=r"shard-000002\.tar: cannot be read at chunk 0"):
        shards.read_tokens(0, shards.tokens)


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
