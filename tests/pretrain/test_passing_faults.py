"""A fault of storage or network in mid-run is not taken for a mistake: exit code 1, after which a run is started again."""

from __future__ import annotations

import errno
import io
import os
import pickle
import time
from pathlib import Path
from typing import BinaryIO

import pytest

import data.loader
import data.shard_files
import pretrain.loop.preflight
from data.errors import InputError, ShardError
from data.loader import Slice, StageOptions, training_batches
from data.masking import MaskingOptions
from data.shard_files import OpenShards
from data.stream import Block
from parallel.agreement import agreed
from parallel.errors import CheckpointError
from pretrain import cli
from pretrain.loop.preflight import hold
from tests.pretrain.test_training_run import arguments

CODES = {
    "EIO": 1,
    "ESTALE": 1,
    "ETIMEDOUT": 1,
    "ENOSPC": 1,
    "EDQUOT": 1,
    "EACCES": 1,  # a ticket of Kerberos that ran out
    "EROFS": 1,
    "ECONNRESET": 1,
    "ENOENT": 2,
    "ENOTDIR": 2,
    "EISDIR": 2,
}


class Broken:
    """A place of shards where opening one always fails alike."""

    def __init__(self, number: int):
        self.number = number

    def where(self, shard: int) -> str:
        return f"/shards/{shard}.tar"

    def open(self, shard: int) -> BinaryIO:
        raise OSError(self.number, os.strerror(self.number))

    open_unchecked = open

    def read_file(self, name: str, most_bytes: int) -> bytes:
        raise OSError(self.number, os.strerror(self.number))


def code_of(error: Exception, monkeypatch, capsys) -> int:
    """What a command ends with that raises `error`, in one line."""

    def fails(arguments) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fails)
    code = cli.execute(["train"])
    assert capsys.readouterr().err == f"error: {error}\n"
    return code


@pytest.mark.parametrize("name, code", CODES.items())
def test_what_the_system_says_decides_between_a_mistake_and_what_may_pass(name, code, monkeypatch, capsys):
    number = getattr(errno, name)
    monkeypatch.setattr(data.shard_files, "PAUSES", (0.0,))
    with pytest.raises(ShardError, match="cannot be read") as shard:
        OpenShards(Broken(number), 2).read(0, memoryview(bytearray(4)), 0)
    assert code_of(shard.value, monkeypatch, capsys) == code
    assert code_of(pickle.loads(pickle.dumps(shard.value)), monkeypatch, capsys) == code

    def fails() -> None:
        raise OSError(number, os.strerror(number))

    def says_why() -> None:
        try:
            fails()
        except OSError as error:
            raise CheckpointError(f"checkpoint x cannot be read ({error})") from None

    for function in (fails, says_why):
        with pytest.raises(CheckpointError) as checkpoint:
            agreed(function)
        assert code_of(checkpoint.value, monkeypatch, capsys) == code


def test_damaged_contents_and_mistakes_stay_mistakes(monkeypatch, capsys):
    class Cut(Broken):
        def open(self, shard: int) -> BinaryIO:
            return open(os.devnull, "rb", buffering=0)  # type: ignore[return-value]

    with pytest.raises(ShardError, match="cut short") as shard:
        OpenShards(Cut(0), 2).read(0, memoryview(bytearray(4)), 0)

    def damaged() -> None:
        raise CheckpointError("checkpoint x: format 9, this version reads 1")

    with pytest.raises(CheckpointError) as checkpoint:
        agreed(damaged)
    with pytest.raises(CheckpointError) as unknown:  # an OSError of Python's own, which no system call made
        agreed(lambda: (_ for _ in ()).throw(io.UnsupportedOperation("not readable")))
    for error in (shard.value, checkpoint.value, unknown.value, InputError("config: x")):
        assert code_of(error, monkeypatch, capsys) == 2


class Blocks:
    """Blocks that a worker never gets (`error` None), or that fail in it."""

    sequence_length = 16

    def __init__(self, error: Exception | None):
        self.error = error

    def source(self, g: int) -> tuple[int, int]:
        return 0, 0

    def block(self, g: int) -> Block:
        if self.error is None:
            time.sleep(60)
        raise self.error or AssertionError


@pytest.mark.parametrize(
    "error, passing, said",
    [
        (None, True, "gave nothing for 2 s"),
        (ShardError("x.tar: cannot be read (Stale file handle)", 0, passing=True), True, "Stale file handle"),
        (ShardError("x.tar: cut short", 0), False, "cut short"),
    ],
)
def test_what_ends_a_loader_s_worker_says_whether_it_may_pass(error, passing, said, monkeypatch):
    monkeypatch.setattr(data.loader, "WAIT_SECONDS", 60.0 if error else 2.0)
    batches = training_batches(Blocks(error), StageOptions(MaskingOptions(0, 8)), Slice(8, 4), 1, workers=1, steps=1)
    with pytest.raises(InputError, match=said) as caught:
        next(batches)
    assert caught.value.passing is passing


@pytest.mark.parametrize("name, code", [("EIO", 1), ("ENOENT", 2)])
def test_a_training_run_whose_shards_cannot_be_read_any_more(name, code, corpus, tmp_path, monkeypatch, capsys):
    real, left = os.preadv, [20]

    def failing(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        return real(*given)

    monkeypatch.setattr(os, "preadv", failing)
    assert cli.execute(arguments(corpus, tmp_path, "run", **{"train.validate_every": 0})) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and "cannot be read" in last and os.strerror(getattr(errno, name)) in last


@pytest.mark.parametrize("again", [None, "0", "3"])
def test_a_folder_in_use_is_waited_for_only_where_slurm_started_the_job_again(again, tmp_path, monkeypatch):
    """The lock of a node that died may stay for a while: it is a fault that passes. In a first start it is a mistake."""
    if again is None:
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    else:
        monkeypatch.setenv("SLURM_RESTART_COUNT", again)
    monkeypatch.setattr(pretrain.loop.preflight, "HOLD_SECONDS", 1.2)
    waits = again == "3"
    with hold(tmp_path / "r"):
        began = time.monotonic()
        with pytest.raises(InputError, match="is in use by another process") as caught, hold(tmp_path / "r"):
            pass
        waited = time.monotonic() - began
    assert caught.value.passing is waits
    assert 1.2 <= waited < 5 if waits else waited < 0.5


def test_a_lock_that_goes_while_it_is_waited_for_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held = hold(tmp_path / "r")
    held.__enter__()
    sleep = time.sleep

    def gone(seconds: float) -> None:
        held.__exit__(None, None, None)
        sleep(0.01)

    monkeypatch.setattr(pretrain.loop.preflight.time, "sleep", gone)
    with hold(tmp_path / "r"):
        assert Path(tmp_path / "r" / ".lock").exists()
