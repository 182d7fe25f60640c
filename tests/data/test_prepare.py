"""Laws of `prepare`: every document in one set, output that depends on input and options alone, clear refusals."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data.prepare
import data.workspace
from data.document import Segment
from data.encode_pool import encode_in_order
from data.errors import InputError
from data.prepare import PrepareOptions, prepare
from data.progress import ByteProgress, duration
from data.shard_set import ShardSet
from data.survey import split_value
from data.tokenizer import TextTokenizer, load_tokenizer
from data.workspace import Workspace
from tests.data.small_corpus import tree_bytes, write_corpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, str]:
    return write_corpus(tmp_path / "corpus", documents=90)


@pytest.fixture
def options(tmp_path: Path, corpus: dict[str, str]) -> PrepareOptions:
    return PrepareOptions(
        out=str(tmp_path / "out"),
        inputs=[str(tmp_path / "corpus")],
        vocab_size=300,
        val_fraction=0.2,
        chunk_tokens=100,
        shard_tokens=1000,
        processes=1,
    )


def texts_of(folder: Path) -> list[str]:
    """The documents of a set, found by their EOS alone."""
    shards = ShardSet.open(folder)
    tokenizer = load_tokenizer(shards.tokenizer_path, special=shards.special)
    tokens = shards.read_tokens(0, shards.tokens)
    ends = np.flatnonzero(tokens == shards.special.eos)
    assert ends[-1] == shards.tokens - 1 and len(ends) == shards.documents
    return [tokenizer.decode(document) for document in np.split(tokens, ends[:-1] + 1)]


def test_every_document_is_in_exactly_one_set_in_order_and_comes_back_exactly(
    options: PrepareOptions, corpus: dict[str, str]
) -> None:
    report = prepare(options, progress=False)
    sets = {name: texts_of(Path(options.out) / name) for name in ("train", "val")}
    val = [split_value(name, options.seed) < 0.2 for name in corpus]
    assert sets["val"] == [text for text, held_out in zip(corpus.values(), val, strict=True) if held_out]
    assert sets["train"] == [text for text, held_out in zip(corpus.values(), val, strict=True) if not held_out]
    assert 8 <= len(sets["val"]) <= 30
    for name, texts in sets.items():
        shards = ShardSet.open(Path(options.out) / name)
        assert report.sets[name].documents == shards.documents == len(texts)
        assert shards.utf8_bytes == sum(len(text.encode()) for text in texts)
        (source,) = shards.manifest.sources
        assert (source.name, source.licence, source.documents) == ("corpus", "unspecified", len(texts))
    assert "train: " in report.lines()[0] and len(ShardSet.open(Path(options.out) / "train").shards) > 2
    assert not list(Path(options.out).glob(".partial-*"))


def test_output_does_not_depend_on_the_number_of_processes(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.prepare, "BATCH_BYTES", 700)  # many batches, so that workers finish out of order
    prepare(options, progress=False)
    monkeypatch.setattr(data.prepare, "BATCH_BYTES", 2000)
    prepare(replace(options, out=str(tmp_path / "three"), processes=3), progress=False)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "three")


def test_adding_files_moves_no_document_from_set_to_set(options: PrepareOptions, tmp_path: Path) -> None:
    prepare(options, progress=False)
    write_corpus(tmp_path / "corpus" / "more", documents=40, seed=5)
    more = replace(options, out=str(tmp_path / "more"))
    prepare(more, progress=False)
    for name in ("train", "val"):
        before, after = texts_of(Path(options.out) / name), texts_of(Path(more.out) / name)
        assert len(after) > len(before) and [text for text in after if text in set(before)] == before


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_set_gets_a_document_however_small_the_share(
    options: PrepareOptions, corpus: dict[str, str], fraction: float
) -> None:
    report = prepare(replace(options, val_fraction=fraction), progress=False)
    counts = {name: s.documents for name, s in report.sets.items()}
    assert counts == ({"train": 89, "val": 1} if fraction < 0.5 else {"train": 1, "val": 89})
    together = sorted(texts_of(Path(options.out) / "train") + texts_of(Path(options.out) / "val"))
    assert together == sorted(corpus.values())
    for name in counts:
        manifest = ShardSet.open(Path(options.out) / name).manifest
        assert manifest.sources[0].utf8_bytes == manifest.utf8_bytes


def test_without_a_share_there_is_no_val_set_and_one_document_is_enough(
    options: PrepareOptions, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("a single document")
    single = replace(options, inputs=[str(tmp_path / "one.txt")])
    with pytest.raises(InputError, match="only one document"):
        prepare(single, progress=False)
    report = prepare(replace(single, val_fraction=0.0), progress=False)
    assert list(report.sets) == ["train"] and not (Path(options.out) / "val").exists()


def test_a_complete_folder_is_left_alone_and_another_preparation_refused(
    options: PrepareOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(options, progress=False)
    before = tree_bytes(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "train").iterdir()}
    again = prepare(replace(options, processes=2))
    assert again.already_complete and "nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in times} == times
    changes = {"vocab_size": 310, "chunk_tokens": 99, "shard_tokens": 999, "seed": 1, "val_fraction": 0.0}
    for name, value in changes.items():
        with pytest.raises(InputError, match=rf"not the same: .*{name}.*choose another --out"):
            prepare(replace(options, **{name: value}), progress=False)
    (tmp_path / "corpus" / "part0" / "doc0000.txt").write_text("changed")
    with pytest.raises(InputError, match="not the same: the input text"):
        prepare(options, progress=False)
    assert tree_bytes(tmp_path / "out") == before


def test_a_lost_set_is_made_again_with_the_same_bytes(options: PrepareOptions, tmp_path: Path) -> None:
    """The state after a kill between publishing train/ and publishing val/."""
    prepare(options, progress=False)
    before = tree_bytes(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "val")
    report = prepare(options, progress=False)
    assert not report.already_complete and tree_bytes(tmp_path / "out") == before


def test_a_folder_with_something_else_in_it_is_refused_and_kept(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is no finished shard set"):
        prepare(options, progress=False)
    assert (tmp_path / "out" / "train" / "mine.txt").read_text() == "keep"
    with pytest.raises(InputError, match="cannot write to the folder"):
        prepare(replace(options, out=str(tmp_path / "corpus" / "part0" / "doc0000.txt")), progress=False)


def test_an_existing_tokenizer_is_taken_over(options: PrepareOptions, tmp_path: Path, corpus: dict[str, str]) -> None:
    prepare(options, progress=False)
    given = replace(options, out=str(tmp_path / "given"), tokenizer=str(tmp_path / "out" / "train"), vocab_size=999)
    prepare(given, progress=False)
    first, second = (ShardSet.open(Path(o.out) / "train") for o in (options, given))
    assert [shard.sha256 for shard in first.shards] == [shard.sha256 for shard in second.shards]
    with pytest.raises(InputError, match="tokenizer: .*missing.* does not exist"):
        prepare(replace(given, tokenizer=str(tmp_path / "missing.json")), progress=False)


def test_a_limit_stops_after_that_much_text(options: PrepareOptions, corpus: dict[str, str]) -> None:
    report = prepare(replace(options, limit_bytes=3000), progress=False)
    total, expected = 0, 0
    for text in corpus.values():
        if total < 3000:
            total, expected = total + len(text.encode()), expected + 1
    assert sum(s.documents for s in report.sets.values()) == expected < 90
    assert sum(s.utf8_bytes for s in report.sets.values()) == total


def test_skipped_documents_are_in_the_report_and_the_manifests(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "corpus" / "bad.txt").write_bytes(b"\xff")
    report = prepare(options, progress=False)
    assert report.skipped == {"invalid_utf8": 1} and "skipped: 1 invalid_utf8" in report.lines()
    assert ShardSet.open(tmp_path / "out" / "val").manifest.sources[0].skipped == {"invalid_utf8": 1}


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(data.prepare.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(InputError, match=r"0\.00 GB free, about 0\.02 GB are needed"):
        prepare(options, progress=False)
    assert not list(tmp_path.glob("out/**/*.tar*"))


def test_a_disk_that_fills_up_on_the_way_is_said_and_the_work_goes_on_later(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="is full; free some space"):
        patch.setattr(data.workspace.os, "rename", full)
        prepare(options, progress=False)
    report = prepare(options, progress=False)
    assert report.resumed_shards == sum(s.shards for s in report.sets.values())


def test_an_encoding_process_that_dies_ends_the_work_with_advice(tokenizer: TextTokenizer) -> None:
    def batches() -> Iterator[tuple[int, list[tuple[Segment, ...]]]]:
        for i in range(50):
            yield i, [(Segment("some text"),)]
            if i == 3:
                multiprocessing.active_children()[0].kill()

    with pytest.raises(RuntimeError, match="run the same command again"):
        for _ in encode_in_order(batches(), tokenizer, processes=2):
            pass
    assert not multiprocessing.active_children()


def test_input_that_changes_while_it_is_read_is_refused_and_nothing_is_kept(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare_tokenizer_and_edit(*args: object, **kwargs: object) -> object:
        tokenizer = original(*args, **kwargs)
        (tmp_path / "corpus" / "part2" / "doc0002.txt").write_text("changed in between")
        return tokenizer

    original = data.prepare.prepare_tokenizer
    monkeypatch.setattr(data.prepare, "prepare_tokenizer", prepare_tokenizer_and_edit)
    with pytest.raises(InputError, match="the files changed while they were read"):
        prepare(options, progress=False)
    assert not (tmp_path / "out" / "train").exists() and not list(tmp_path.glob("out/.partial-*"))


def test_a_second_prepare_on_the_same_folder_is_refused(options: PrepareOptions, tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", {}), pytest.raises(InputError, match="another `prepare` is writing"):
        prepare(options, progress=False)
    assert prepare(options, progress=False).sets["train"].documents


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 200), ("chunk_tokens", 0), ("shard_tokens", 0), ("processes", -1), ("val_fraction", 1.0),
     ("val_fraction", -0.1), ("limit_bytes", 0), ("train_bytes", 0), ("chunk_tokens", 1 << 31)],
)  # fmt: skip
def test_an_impossible_option_is_named(options: PrepareOptions, field: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{field}: "):
        prepare(replace(options, **{field: value}), progress=False)


def test_a_large_vocabulary_is_stored_in_four_bytes(options: PrepareOptions, tmp_path: Path) -> None:
    prepare(options, progress=False)
    record = json.loads((tmp_path / "out" / "train" / "tokenizer.json").read_bytes())
    record["model"]["vocab"] |= {f"rare {i}": 300 + i for i in range(70000)}
    (tmp_path / "large.json").write_text(json.dumps(record))
    large = replace(options, out=str(tmp_path / "large"), tokenizer=str(tmp_path / "large.json"))
    prepare(large, progress=False)
    first, second = (ShardSet.open(Path(o.out) / "train") for o in (options, large))
    assert (first.dtype, second.dtype) == (np.uint16, np.uint32) and second.vocab_size == 70300
    np.testing.assert_array_equal(first.read_tokens(0, first.tokens), second.read_tokens(0, second.tokens))


def test_preparing_needs_no_torch() -> None:
    code = "import sys, data.prepare, data.shard_set; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_terminal_gets_a_bar_and_a_quiet_run_nothing() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, silent = Terminal(), Terminal()
    for enabled, stream in ((True, terminal), (False, silent)):
        progress = ByteProgress(enabled, stream)
        progress.say("hello")
        with progress.stage("encoding", 1000) as advance:
            advance(1000)
    assert "hello" in terminal.getvalue() and "1.0/1.0 kB" in terminal.getvalue() and silent.getvalue() == ""


def test_a_log_gets_plain_lines_with_rate_and_time_left() -> None:
    now, stream = [0.0], io.StringIO()
    with ByteProgress(stream=stream, clock=lambda: now[0]).stage("encoding", 100_000_000) as advance:
        for _ in range(8):
            now[0] += 1.0
            advance(2_000_000)
    assert stream.getvalue() == "encoding: 10.0 MB of 100.0 MB (10%), 2.0 MB/s, about 45 s left\n"
    assert [duration(s) for s in (0.2, 61, 3 * 3600 + 65)] == ["0 s", "1 min 01 s", "3 h 01 min"]
