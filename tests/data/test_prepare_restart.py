"""Law of restarting: killed at any moment and run again, `prepare` goes on from its finished shards to equal bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import data.prepare
from data.prepare import PrepareOptions, prepare
from tests.data.small_corpus import tree_bytes, write_corpus, write_talks

ROOT = Path(__file__).resolve().parents[2]
# A short pause for each document keeps the run long enough to be killed in the middle on any machine.
KILLABLE = """
import sys, time
import data.prepare
from data.prepare import PrepareOptions, prepare
from data.shard_writer import ShardWriter
if __name__ == "__main__":
    data.prepare.BATCH_BYTES = 2000
    add = ShardWriter.add_document
    ShardWriter.add_document = lambda *a, **k: (time.sleep(0.005), add(*a, **k))
    prepare(PrepareOptions(out=sys.argv[1], inputs=[sys.argv[2]], processes=2, **eval(sys.argv[3])), progress=False)
"""
TEXT = {"vocab_size": 300, "val_fraction": 0.2, "chunk_tokens": 100, "shard_tokens": 1000}
# Conversations, conditions and rows; and long documents left out, which a restart must not count twice.
TALKS = {
    "vocab_size": 330, "val_fraction": 0.2, "chunk_tokens": 400, "shard_tokens": 2500, "chat": "llada",
    "condition_fields": "title", "row_tokens": 128, "long_documents": "drop",
}  # fmt: skip
ROWS = TEXT | {"row_tokens": 50, "long_documents": "truncate"}
SPLIT = TEXT | {"max_document_tokens": 33, "long_documents": "split"}
ALL_SETTINGS = {"text": TEXT, "talks": TALKS, "rows": ROWS, "split": SPLIT}


def wait_for(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(params=["text"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ALL_SETTINGS[request.param]


@pytest.fixture
def options(tmp_path: Path, settings: dict[str, Any]) -> PrepareOptions:
    if "chat" in settings:
        write_talks(tmp_path / "corpus" / "talks.jsonl", 400)
    else:
        write_corpus(tmp_path / "corpus", documents=300)
    return PrepareOptions(out=str(tmp_path / "out"), inputs=[str(tmp_path / "corpus")], processes=1, **settings)


@pytest.mark.parametrize("settings", ["text", "talks"], indirect=True)
def test_killed_half_way_it_goes_on_from_the_finished_shards_to_identical_bytes(
    options: PrepareOptions, settings: dict[str, Any], tmp_path: Path
) -> None:
    prepare(replace(options, out=str(tmp_path / "uninterrupted")), progress=False)
    script = tmp_path / "killable.py"
    script.write_text(KILLABLE)
    arguments = [sys.executable, str(script), options.out, options.inputs[0], repr(settings)]
    finished: set[tuple[str, int]] = set()
    for shards_wanted in (2, 5):  # killed twice: the second run goes on from the first and is killed as well
        run = subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})

        def journal_lines() -> int:
            return sum(path.read_bytes().count(b"\n") for path in Path(options.out).glob(".partial-*/journal.jsonl"))

        wait_for(lambda wanted=shards_wanted, run=run: journal_lines() >= wanted or run.poll() is not None)
        workers = psutil.Process(run.pid).children(recursive=True)
        assert len(workers) >= 2 and run.poll() is None
        run.send_signal(signal.SIGKILL)
        run.wait(10)
        wait_for(lambda workers=workers: not any(map(alive, workers)), 10)
        tars = {(path.name, path.stat().st_mtime_ns) for path in Path(options.out).glob(".partial-*/*/shard-*.tar")}
        assert finished <= tars and len(tars) >= shards_wanted
        assert not (Path(options.out) / "train").exists()
        finished = tars
    report = prepare(options, progress=False)
    assert report.resumed_shards >= len(finished) - 1 >= 4  # the last may have been renamed and not yet journalled
    kept = {(path.name, path.stat().st_mtime_ns) for path in Path(options.out).glob("*/shard-*.tar")}
    assert len(finished & kept) >= report.resumed_shards
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "uninterrupted")


class Killed(BaseException):
    """Stands for the death of the process at a chosen instruction."""


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        *(("text", call) for call in range(0, 40, 3)),
        *((name, call) for name in ("talks", "rows", "split") for call in range(4, 40, 9)),
    ],
    indirect=["settings"],
)
def test_death_at_any_rename_or_sync_leaves_work_that_goes_on_to_identical_bytes(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    small = replace(options, limit_bytes=12000 if options.chat is None else 30000)
    prepare(replace(small, out=str(tmp_path / "uninterrupted")), progress=False)
    calls = 0

    def dying(original: object) -> object:
        def step(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise Killed
            return original(*args)

        return step

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "fsync"):
            patch.setattr(os, name, dying(getattr(os, name)))
        with pytest.raises(Killed):
            prepare(small, progress=False)
    assert prepare(small, progress=False).sets["train"].documents
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "uninterrupted")


@pytest.mark.parametrize("settings", ["talks", "rows"], indirect=True)
def test_rows_and_conversations_do_not_depend_on_processes(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(options, progress=False)
    monkeypatch.setattr(data.prepare, "BATCH_BYTES", 2000)
    report = prepare(replace(options, out=str(tmp_path / "two"), processes=2), progress=False)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "two")
    assert report.skipped.get("too_long", 0) > 10 or report.sets["train"].truncated_documents > 10


def test_a_torn_or_lying_journal_costs_only_the_shards_it_is_wrong_about(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(replace(options, out=str(tmp_path / "uninterrupted")), progress=False)

    def die_when_publishing() -> Path:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "rename", lambda *args: (_ for _ in ()).throw(Killed()))
            prepare(options, progress=False)
        (journal,) = (tmp_path / "out").glob(".partial-*/journal.jsonl")
        return journal

    journal = die_when_publishing()
    lines = journal.read_bytes().splitlines(keepends=True)
    shards = sorted(journal.parent.glob("train/shard-*.tar"))
    os.truncate(shards[-2], 512)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])  # the last line was being written
    untouched = {path: path.stat().st_mtime_ns for path in shards[:-2]}
    die_when_publishing()
    assert {path: path.stat().st_mtime_ns for path in shards[:-2]} == untouched
    report = prepare(options, progress=False)
    assert report.resumed_shards == sum(s.shards for s in report.sets.values()) == len(lines)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "uninterrupted")
