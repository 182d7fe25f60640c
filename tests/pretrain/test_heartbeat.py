"""Heartbeats: never torn, true to the last beat of a killed process, cheap, and not silenced by a full disk."""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import time

import pytest

from pretrain.launch import LAUNCH, launch_name, never_used_before, rank_and_world
from pretrain.watching import heartbeat as module
from pretrain.watching.heartbeat import (
    HEARTBEAT,
    RECORD_BYTES,
    Heartbeat,
    rank_path,
    read_local,
    read_published,
    write_in_place,
)
from tests.distributed.launch import ROOT, environment


@pytest.fixture
def memory(tmp_path, monkeypatch):
    path = tmp_path / "memory"
    path.write_bytes(bytes(RECORD_BYTES))
    monkeypatch.setenv(HEARTBEAT, str(path))
    with open(path, "r+b") as file:
        yield mmap.mmap(file.fileno(), RECORD_BYTES)


WRITER = """
import os, sys
from pathlib import Path
from pretrain.watching.heartbeat import PHASES, Heartbeat
heart = Heartbeat(Path(sys.argv[1]), 0, 1, publish_seconds=3600)
step = 0
print("ready", flush=True)
while True:
    step += 1
    for phase in PHASES:
        heart.beat(phase, step, f"{phase} of {step} " + "x" * (step % 90))
        os.pwrite(1, b"%d %s\\n" % (step, phase.encode()), 0) if sys.argv[2] == "told" else None
"""


def writer(tmp_path, how, **options):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "run"), how],
        cwd=ROOT,
        env=environment(**{HEARTBEAT: str(tmp_path / "memory")}),
        **options,
    )


def test_a_reader_sees_only_whole_beats_and_the_very_last_one_of_a_killed_process(tmp_path, memory):
    with open(tmp_path / "told", "w+b") as told:
        process = writer(tmp_path, "told", stdout=told)
        try:
            deadline = time.monotonic() + 20
            while read_local(memory) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            seen, until = 0, time.monotonic() + 0.5
            while time.monotonic() < until:
                record = read_local(memory)
                assert record is not None and record.beats >= seen
                if record.step is not None:
                    step, filler = record.step, "x" * (record.step % 90)
                    assert record.doing == f"{record.phase} of {step} {filler}"
                seen = record.beats
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        last = read_local(memory)
        step, phase = os.pread(told.fileno(), 100, 0).split(b"\n")[0].split()
    assert last is not None and last.step is not None
    # The writer says each beat behind it: what is read is that one, or the one after it if it was killed between the two.
    order = [(int(step), phase.decode())]
    following = module.PHASES.index(order[0][1]) + 1
    order.append((int(step), module.PHASES[following]) if following < 6 else (int(step) + 1, "start"))
    assert (last.step, last.phase) in order and last.idle >= 0


def test_a_beat_cut_short_leaves_the_one_before(memory, tmp_path):
    heart = Heartbeat(tmp_path, 0, 1, publish_seconds=3600)
    heart.beat("step", 5, "first")
    heart.beat("save", 5, "second")
    before = read_local(memory)
    assert before is not None and (before.phase, before.step, before.doing) == ("save", 5, "second")
    slot = (before.beats & 1) * module.SLOT_BYTES
    memory[slot + 40 : slot + 41] = bytes([memory[slot + 40] ^ 1])
    left = read_local(memory)
    assert left is not None and (left.phase, left.step, left.doing) == ("step", 5, "first")
    heart.close()


def test_a_beat_costs_microseconds(memory, tmp_path):
    heart = Heartbeat(tmp_path, 0, 1, publish_seconds=3600)
    fastest = 1.0
    for _ in range(20):  # the best of several: other processes use this machine as well
        began = time.perf_counter()
        for step in range(1000):
            heart.beat("step", step, "train_step")
        fastest = min(fastest, (time.perf_counter() - began) / 1000)
    heart.close()
    assert fastest < 20e-6, f"{fastest * 1e6:.1f} us"


def test_what_is_published_is_whole_and_says_where_the_rank_is(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCH, "job-0-1")
    monkeypatch.delenv(HEARTBEAT, raising=False)
    counts = {"world": 3}
    heart = Heartbeat(tmp_path, 3, 8, publish_seconds=0.01, collectives=lambda: counts)
    heart.beat("validate", 40, "batch 2")
    deadline = time.monotonic() + 20
    path = rank_path(tmp_path, 3)
    while (found := read_published(tmp_path, 3)) is None or found.phase != "validate":
        assert time.monotonic() < deadline
    values = json.loads(path.read_text())
    contract = "rank world host pid time launch phase step doing since collectives beats".split()
    assert set(contract) <= set(values) and values["launch"] == "job-0-1" and values["collectives"] == counts
    assert (found.rank, found.world, found.step, found.doing, found.pid) == (3, 8, 40, "batch 2", os.getpid())
    until = time.monotonic() + 0.5
    torn = 0
    while time.monotonic() < until:
        found = read_published(tmp_path, 3)
        torn += found is None
        assert found is None or (found.step, found.collectives) == (40, counts)
    heart.beat("end", 41)
    heart.close()
    last = read_published(tmp_path, 3)
    assert last is not None and (last.phase, last.step) == ("end", 41)


def test_half_a_record_is_none(tmp_path):
    path = tmp_path / "health" / "rank-00000.json"
    path.parent.mkdir()
    write_in_place(path, {"phase": "step", "step": 123456}, 512)
    raw = path.read_bytes()
    write_in_place(path, {"phase": "save", "step": 999999}, 512)
    other = path.read_bytes()
    assert read_published(tmp_path, 0) is not None
    for cut in (12, 20, 30, 40):
        path.write_bytes(other[:cut] + raw[cut:])
        assert other[:cut] + raw[cut:] in (raw, other) or read_published(tmp_path, 0) is None


def test_publishing_outlives_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv(HEARTBEAT, raising=False)
    (tmp_path / "health").write_text("a file where the folder should be")
    heart = Heartbeat(tmp_path, 0, 1, publish_seconds=0.01)
    time.sleep(0.1)
    (tmp_path / "health").unlink()
    deadline = time.monotonic() + 20
    while read_published(tmp_path, 0) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    heart.close()


def test_a_published_record_needs_no_free_space_once_it_is_there(tmp_path):
    """It keeps its file and its size: a disk that fills up later does not make a healthy rank look silent."""
    path = tmp_path / "record"
    write_in_place(path, {"doing": "a"}, 2048)
    first = path.stat()
    write_in_place(path, {"doing": "b" * 3000, "collectives": {"x" * 3000: 1}}, 2048)
    assert (path.stat().st_ino, path.stat().st_size, first.st_size) == (first.st_ino, 2048, 2048)
    assert len(json.loads(path.read_text())["doing"]) == 100


def test_nothing_is_published_before_the_run_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv(HEARTBEAT, raising=False)
    heart = Heartbeat(tmp_path / "run", 0, 1, publish_seconds=0.01)
    time.sleep(0.1)
    heart.close()
    assert not (tmp_path / "run").exists()


def test_an_unknown_phase_is_a_mistake_of_the_caller(tmp_path):
    heart = Heartbeat(tmp_path / "run", 0, 1, publish_seconds=3600)
    with pytest.raises(KeyError):
        heart.beat("stepp", 1)
    heart.close()


def test_garbage_in_memory_is_no_beat(memory):
    assert read_local(memory) is None
    memory[:] = os.urandom(RECORD_BYTES)
    assert read_local(memory) is None
    memory[:] = struct.pack("<Q", 7).ljust(RECORD_BYTES, b"\xff")
    assert read_local(memory) is None


SLURM = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "8"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n 1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environ, name, rank, unique",
    [
        (SLURM, "12-0-0", (3, 8), True),
        (SLURM | {"SLURM_RESTART_COUNT": "2"}, "12-0-2", (3, 8), True),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "12-0-0", (0, 1), False),
        (
            TORCHRUN | {"TORCHELASTIC_RUN_ID": "a/b", "TORCHELASTIC_RESTART_COUNT": "1"} | SLURM,
            "a_b-1-29500",
            (1, 2),
            False,
        ),
        (TORCHRUN, "n_1-29500", (1, 2), False),
        ({}, "pid-PID", (0, 1), False),
        (SLURM | {LAUNCH: "given"}, "given", (3, 8), True),
    ],
)
def test_the_launch_is_known_without_talking(environ, name, rank, unique):
    name = name.replace("PID", str(os.getpid()))
    assert (launch_name(environ), rank_and_world(environ), never_used_before(environ)) == (name, rank, unique)


def test_nothing_that_a_watch_needs_imports_torch():
    code = (
        "import sys, pretrain.load_config\n"
        "from pretrain.watching import heartbeat, restart_command, watch\n"
        "found = {'torch', 'numpy', 'megatron', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
