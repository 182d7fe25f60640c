"""Damage to a shard set is found and named: at opening what the manifest can tell, at reading what happens later."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data.shard_set
from data.chunk_index import npy_bytes
from data.errors import InputError, ShardError
from data.shard_set import ShardSet

WriteSet = Callable[..., Path]


def edit_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


def edit_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def edit_index(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """The index of the set changed by someone who also knew to put its new hash into the manifest."""

    def edit(folder: Path) -> None:
        content = npy_bytes(change(np.load(folder / "index.npy")))
        (folder / "index.npy").write_bytes(content)
        edit_manifest(lambda m: m.update(index_sha256=hashlib.sha256(content).hexdigest()))(folder)

    return edit


def add(row: int, column: int, amount: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(index: np.ndarray) -> np.ndarray:
        index[row, column] += amount
        return index

    return change


def first_of_shard_1(amount: int) -> Callable[[np.ndarray], np.ndarray]:
    """Moves tokens from the last chunk of shard 0 to shard 1, or back."""

    def change(index: np.ndarray) -> np.ndarray:
        index[0, np.flatnonzero(index[1] == 640)[1]] += amount
        return index

    return change


def edit_shard(**fields: int) -> Callable[[Path], None]:
    """Counts of shard 1 changed, and the totals of the manifest with them."""

    def change(manifest: dict) -> None:
        for name, amount in fields.items():
            manifest["shards"][1][name] += amount
            if name in manifest:
                manifest[name] += amount

    return edit_manifest(change)


def flip_byte(content: bytes, place: int = 700) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: missing"),
    "manifest cut": (edit_file("manifest.json", lambda b: b[: len(b) // 2]), r"manifest\.json: not JSON"),
    "manifest not text": (edit_file("manifest.json", lambda b: b"\xff\xfe" + b), r"manifest\.json: not JSON"),
    "manifest a list": (edit_file("manifest.json", lambda b: b"[]"), "must be a JSON object"),
    "other version": (edit_manifest(lambda m: m.update(format_version=1)), "format_version is 1.*reads 2"),
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
    "no index": (lambda f: (f / "index.npy").unlink(), r"index\.npy: .*cannot be read"),
    "index is a folder": (
        lambda f: ((f / "index.npy").unlink(), (f / "index.npy").mkdir()),
        r"index\.npy: .*cannot be",
    ),
    "index junk": (edit_file("index.npy", lambda b: b"junk"), r"index\.npy: the index was changed"),
    "index one bit": (edit_file("index.npy", lambda b: flip_byte(b, 300)), r"index\.npy: the index was changed"),
    "index cut": (edit_index(lambda a: a[:, :-1]), r"index\.npy: the index is <i8"),
    "index shape": (edit_index(lambda a: a[:-1]), r"index\.npy: the index is <i8"),
    "index type": (edit_index(lambda a: a.astype(np.float64)), r"index\.npy: the index is <f8"),
    "index order": (edit_index(np.asfortranarray), r"index\.npy: not a readable index .*Fortran"),
    "index starts": (edit_index(add(0, 0, 1)), r"index\.npy: shards do not hold"),
    "index backwards": (edit_index(add(0, 2, 200)), r"index\.npy: a chunk has no tokens"),
    "index overflow": (edit_index(add(0, 2, 1 << 62)), r"index\.npy: a chunk has no tokens"),
    "index shard starts": (edit_index(first_of_shard_1(1)), r"index\.npy: shards do not hold"),
    "index documents": (edit_index(add(3, 8, -1)), r"index\.npy: \d+ documents in shard-000001\.tar"),
    "index spans": (edit_index(add(4, 8, 1)), r"index\.npy: \d+ spans in shard-000001\.tar"),
    "index many spans": (edit_index(add(4, 8, 1 << 40)), r"index\.npy: a chunk has a count"),
    "index pieces": (edit_index(add(2, 8, 1 << 40)), r"index\.npy: a chunk has a count"),
    "index no pieces": (edit_index(add(2, 8, -100)), r"index\.npy: a chunk has a count"),
    "index checksum": (edit_index(add(5, 8, 1 << 32)), r"index\.npy: a chunk has a count .* checksum"),
    "offset beyond the tar": (edit_index(add(1, -1, 1 << 40)), r"index\.npy: an offset lies outside"),
    "offset overflow": (edit_index(add(1, -1, (1 << 63) - 100_000)), r"index\.npy: an offset lies outside"),
    "offset negative": (edit_index(add(1, 0, -4096)), r"index\.npy: an offset lies outside"),
    "offset in another chunk": (edit_index(add(1, 2, -1536)), r"index\.npy: an offset lies outside"),
    "tar without chunks": (edit_shard(chunks=-100), "chunks must be|cannot be true together"),
    "chunks moved": (
        edit_manifest(
            lambda m: [m["shards"][i].update(chunks=m["shards"][i]["chunks"] + d) for i, d in ((1, 1), (2, -1))]
        ),
        "shards do not hold|an offset lies outside",
    ),
    "tokens over bytes": (edit_shard(tokens=1 << 40), r"manifest\.json: the counts of shard shard-000001\.tar"),
    "numbers without end": (edit_shard(bytes=1 << 70), r"manifest\.json: the counts of shard shard-000001\.tar"),
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
    np.save(folder / "index.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not a readable index .*pickled objects"):
        ShardSet.open(folder, verify="size")
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
    offset = int(np.load(good / "shard-000001.index.npy")[1, -1])
    shape = (good / "shard-000001.tar").read_bytes().index(b"'shape': (", offset - 128) + len("'shape': (")
    places = {
        "payload": offset,
        "tar header": offset - 128 - 512,
        "npy header": offset - 120,
        "npy shape": shape,
        "end": -1,
    }
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
    assert found == {
        "payload": {"full"},
        "tar header": headers,
        "npy header": headers,
        "npy shape": headers,
        "end": {"full"},
    }


def test_an_id_outside_the_vocabulary_is_refused_when_read_and_named(
    write_set: WriteSet, documents: list[np.ndarray]
) -> None:
    documents[40][:-1] = 300  # the vocabulary ends at 299
    folder = write_set(documents, vocab_size=300)
    shards = ShardSet.open(folder)
    start = sum(map(len, documents[:40]))
    with pytest.raises(ShardError, match="token id 300, outside the vocabulary of 300") as caught:
        shards.read_tokens(start - 3, 4)
    (shard,) = shards.shards_of(start, 1)
    starts = np.load(folder / f"shard-{shard:06d}.index.npy")[0] + sum(e.tokens for e in shards.shards[:shard])
    assert caught.value.shard == shard and f"chunk {(starts <= start).sum() - 1} " in caught.value.reason
    assert shards.shards[shard].file in str(caught.value)
    assert len(shards.read_tokens(0, start)) == start


def test_a_shard_cut_or_gone_after_opening_is_named_and_the_others_still_read(
    write_set: WriteSet, documents: list[np.ndarray]
) -> None:
    folder, flat = write_set(documents), np.concatenate(documents)
    shards = ShardSet.open(folder)
    shards.read_tokens(0, shards.tokens)  # its files are open now
    before = sum(entry.tokens for entry in shards.shards[:2])
    after = before + shards.shards[2].tokens
    for damage, reason in (
        (lambda p: os.truncate(p, 700), "cut short since"),
        (lambda p: p.write_bytes(b""), "cut short"),
        (lambda p: p.unlink(), "cannot be read"),
    ):
        damage(folder / "shard-000002.tar")
        for _ in range(2):
            for read in (shards.read_tokens, shards.read_pieces):
                shards.close() if reason == "cannot be read" else None
                with pytest.raises(ShardError, match=rf"shard-000002\.tar: {reason}") as caught:
                    read(before - 4, 10)
                assert caught.value.shard == 2 and caught.value.reason.startswith(reason)
        np.testing.assert_array_equal(shards.read_tokens(0, before), flat[:before])
        np.testing.assert_array_equal(shards.read_tokens(after, len(flat) - after), flat[after:])


@pytest.mark.parametrize("how", ["in place", "renamed over it"])
def test_a_shard_replaced_while_running_is_refused_unless_its_bytes_are_the_same(
    write_set: WriteSet, documents: list[np.ndarray], how: str
) -> None:
    folder = write_set(documents)
    path, flat = folder / "shard-000001.tar", np.concatenate(documents)
    shards = ShardSet.open(folder)
    first = shards.shards[0].tokens
    shards.read_tokens(first, 20)
    good = path.read_bytes()
    bad = good[:640] + good[642:644] + good[640:642] + good[644:]  # two ids changed their places

    def replace(content: bytes) -> None:
        if how == "in place":
            with open(path, "r+b") as file:
                file.write(content)
        else:
            path.with_suffix(".new").write_bytes(content)
            os.replace(path.with_suffix(".new"), path)
            shards.close()
        os.utime(path, ns=(5, os.stat(path).st_mtime_ns + 1000))

    replace(bad)
    with pytest.raises(ShardError, match=r"shard-000001\.tar: replaced or changed since"):
        shards.read_tokens(first, 20)
    replace(good)
    np.testing.assert_array_equal(shards.read_tokens(first, 20), flat[first : first + 20])


def test_lengths_and_spans_that_cannot_be_are_named_with_their_chunk(write_set: WriteSet) -> None:
    documents = [np.append(np.full(29, 7), 1)] * 16
    spans = [np.array([[2, 5, 0], [9, 3, 1]], np.int32)] * 16
    folder = write_set(documents, spans=spans, metas=[{"a": 1}] * 16)
    path = folder / "shard-000001.tar"
    index = np.load(folder / "shard-000001.index.npy")
    lengths_at = int(index[1, 0]) + 60 * 2 + -(128 + 60 * 2) % 512 + 640
    spans_at = lengths_at + 8 + -(128 + 8) % 512 + 640
    meta_at = spans_at + 48 + -(128 + 48) % 512 + 512
    good = path.read_bytes()
    assert np.frombuffer(good, "<i4", 2, lengths_at).tolist() == [30, 30] and good[meta_at : meta_at + 4] == b'[{"a'
    start = ShardSet.open(folder).shards[0].tokens
    for at, new, read, message in (
        (lengths_at, np.int32(31).tobytes(), "pieces", "chunk 0 has document lengths that do not sum to its 60 tokens"),
        (lengths_at, np.array([-1, 61], np.int32).tobytes(), "pieces", "chunk 0 has document lengths"),
        (spans_at, np.array([50, 11], np.int32).tobytes(), "spans", "chunk 0 has a span that is empty or outside"),
        (spans_at, np.array([8, 2], np.int32).tobytes(), "spans", "chunk 0 has spans out of order"),
        (spans_at + 8, np.int32(3).tobytes(), "spans", "chunk 0 has a span of an unknown kind"),
        (meta_at, b"{", "meta", r"chunk 0 has an unusable \.meta\.json"),
        (meta_at, b'[{"a": 1}          ]', "meta", r"chunk 0 has an unusable \.meta\.json"),
        (meta_at, b"[[", "meta", r"chunk 0 has an unusable \.meta\.json"),
    ):
        path.write_bytes(good[:at] + new + good[at + len(new) :])
        shards = ShardSet.open(folder, verify="size")
        reads = {
            "pieces": shards.read_pieces,
            "spans": shards.read_spans,
            "meta": lambda a, b, s=shards: s.read_meta(4),
        }
        with pytest.raises(ShardError, match=message) as caught:
            reads[read](start + 3, 10)
        assert caught.value.shard == 1 and "shard-000001.tar" in str(caught.value)


def test_as_many_bad_shards_as_are_tolerated_are_listed_and_one_more_is_refused(
    write_set: WriteSet, documents: list[np.ndarray]
) -> None:
    folder, flat = write_set(documents), np.concatenate(documents)
    (folder / "shard-000001.tar").unlink()
    (folder / "shard-000003.tar").write_bytes(b"")
    edit_file("shard-000004.tar", flip_byte)(folder)
    with pytest.raises(
        InputError, match=r"shard-000001.*shard-000003.*shard-000004.*3 bad shards, 2 are tolerated"
    ) as caught:
        ShardSet.open(folder, tolerate=2)
    assert "\n" not in str(caught.value)
    shards = ShardSet.open(folder, tolerate=3)
    assert list(shards.bad) == [1, 3, 4] and "cut short, 0 bytes" in shards.bad[3] and "sha256" in shards.bad[4]
    shards = pickle.loads(pickle.dumps(shards))
    starts = np.cumsum([0, *(entry.tokens for entry in shards.shards)]).tolist()
    for shard in range(len(shards.shards)):
        for read in (shards.read_tokens, shards.read_pieces):
            if shard in shards.bad:
                with pytest.raises(ShardError, match=f"shard-00000{shard}") as error:
                    read(starts[shard + 1] - 1, 1)
                assert (error.value.shard, error.value.reason) == (shard, shards.bad[shard])
            else:
                assert len(read(starts[shard], 1)) == 1
    np.testing.assert_array_equal(shards.read_tokens(0, starts[1]), flat[: starts[1]])
    (folder / "index.npy").unlink()
    with pytest.raises(InputError, match="index.npy"):
        ShardSet.open(folder, tolerate=9)


def test_a_shard_error_comes_back_from_another_process_whole() -> None:
    error = pickle.loads(pickle.dumps(ShardError("x.tar: gone; copy it", 7, "gone")))
    assert (str(error), error.shard, error.reason) == ("x.tar: gone; copy it", 7, "gone")
