"""The spool is the source of truth: whole lines only, cut back safely, and a full disk never stops the run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from data.errors import InputError
from pretrain.tracking import spool
from pretrain.tracking.metric_log import SPOOL, MetricLog, last_step, read_metrics, truncate_metrics
from pretrain.tracking.run_events import read_events
from pretrain.tracking.spool import Changed, Spool, lines_backwards, lines_behind
from tests.distributed.launch import ROOT
from tests.pretrain.mlflow_server import points


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def test_a_value_that_is_not_finite_is_kept_as_a_flag_and_the_spool_stays_json(tmp_path):
    log = MetricLog(tmp_path)
    log.write(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.1})
    log.close()
    line = json.loads((tmp_path / SPOOL).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["train/loss"] == "nan" and line["train/grad_norm"] == "inf" and line["train/lr"] == 0.1
    assert line["train/loss_nonfinite"] == line["train/grad_norm_nonfinite"] == 1.0


@pytest.mark.parametrize("left", [b'{"step": 4, "train/lo', b"\0" * 700, b'\0\0{"step": 4}\n\0\0', b"\n"])
def test_what_a_crash_leaves_of_a_line_is_cut_off_at_the_next_start(left, tmp_path):
    points(tmp_path, range(1, 4))
    with open(tmp_path / SPOOL, "ab") as file:
        file.write(left)
    assert last_step(tmp_path) == 3
    truncate_metrics(tmp_path, 3)
    assert steps(tmp_path) == [1, 2, 3]
    points(tmp_path, range(4, 6))
    assert steps(tmp_path) == [1, 2, 3, 4, 5] and read_events(tmp_path) == []


def test_a_line_in_the_middle_that_is_not_json_is_named_by_its_byte(tmp_path):
    points(tmp_path, range(1, 4))
    raw = (tmp_path / SPOOL).read_bytes().splitlines(keepends=True)
    (tmp_path / SPOOL).write_bytes(raw[0] + b"garbage\n" + raw[2])
    with pytest.raises(InputError, match=f"byte {len(raw[0])} "):
        steps(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 4, 9, 12, 40])
def test_a_cut_keeps_exactly_the_lines_up_to_a_step_and_names_the_others(keep, tmp_path):
    points(tmp_path, range(1, 13))
    before = list(read_metrics(tmp_path))
    truncate_metrics(tmp_path, keep)
    assert list(read_metrics(tmp_path)) == [line for line in before if line["step"] <= keep]
    assert [(e["what"], e["step"], e["last"]) for e in read_events(tmp_path)] == (
        [("rolled_back", keep, 12)] if keep < 12 else []
    )
    assert last_step(tmp_path) == min(keep, 12)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_lines_backwards_are_the_lines_of_the_file_reversed(block, tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "_BLOCK", block)
    for content in (b"", b"\n", b"a\n", b"a", b"\n\nab\ncd", b"".join(b"x" * n + b"\n" for n in range(40))):
        (tmp_path / "f").write_bytes(content)
        offset, forward = 0, []
        for raw in content.splitlines(keepends=True):
            offset += len(raw)
            forward.append((raw, offset))
        assert list(lines_backwards(tmp_path / "f")) == forward[::-1]


def test_a_live_roll_back_goes_on_in_the_same_log(tmp_path):
    log = MetricLog(tmp_path)
    for step in range(1, 11):
        log.write(step, {"train/loss": 1.0})
    log.roll_back(6)
    for step in range(7, 9):
        log.write(step, {"train/loss": 2.0})
    log.close()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [
        *[(s, 1.0) for s in range(1, 7)],
        (7, 2.0),
        (8, 2.0),
    ]
    assert [(e["step"], e["last"]) for e in read_events(tmp_path)] == [(6, 10)]


def test_a_reader_beside_a_log_that_rolls_back_all_the_time_never_sees_half_a_line(tmp_path, monkeypatch):
    """Every line it sees was written as such; a file that changed under it is noticed."""
    monkeypatch.setattr(spool, "_CHUNK", 2048)  # many reads, so that some are in the middle of a change
    monkeypatch.setattr("pretrain.tracking.metric_log.record_roll_back", lambda *ignored: None)
    log, stop, seen, changed = MetricLog(tmp_path), threading.Event(), 0, 0

    def write() -> None:
        step, attempt = 0, 0
        while not stop.is_set():
            step += 1
            metrics = {f"m{n}": float(n) for n in range((step * 7 + attempt) % 20)}
            log.write(step, {"attempt": attempt, "count": len(metrics), **metrics})
            if step == 60:
                attempt += 1
                step = (attempt * 7) % 50
                log.roll_back(step)

    writer = threading.Thread(target=write)
    writer.start()
    until = time.monotonic() + 3
    try:
        while time.monotonic() < until:
            with open(tmp_path / SPOOL, "rb") as file:
                try:
                    for raw, _ in lines_behind(file.fileno(), 0, b""):
                        line = json.loads(raw)
                        assert line["count"] == (line["step"] * 7 + line["attempt"]) % 20 == len(line) - 4
                        seen += 1
                except Changed:
                    changed += 1
    finally:
        stop.set()
        writer.join()
        log.close()
    assert seen > 100 and changed > 0


def test_a_read_that_goes_on_in_a_file_that_was_cut_and_grew_again_is_noticed(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"1111\n2222\n3333\n")
    with open(path, "rb") as file:
        assert list(lines_behind(file.fileno(), 5, b"1111\n")) == [(b"2222\n", 10), (b"3333\n", 15)]
        os.truncate(path, 5)
        with pytest.raises(Changed):
            list(lines_behind(file.fileno(), 15, b"3333\n"))
        with open(path, "ab") as more:
            more.write(b"aaaa\nbbbb\ncccc\n")
        with pytest.raises(Changed):
            list(lines_behind(file.fileno(), 15, b"3333\n"))
        assert list(lines_behind(file.fileno(), 5, b"1111\n")) == [(b"aaaa\n", 10), (b"bbbb\n", 15), (b"cccc\n", 20)]


FULL = """
import json, resource, sys, time
from pathlib import Path
from pretrain.tracking import spool
from pretrain.tracking.metric_log import MetricLog
spool.RETRY_SECONDS = 0.0
folder, said = Path(sys.argv[1]), []
log = MetricLog(folder, said.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # in the middle of a line
slowest = 0.0
for step in range(1, 201):
    began = time.perf_counter()
    log.write(step, {"train/loss": step / 2})
    slowest = max(slowest, time.perf_counter() - began)
log.sync()
before = len((folder / "metrics.jsonl").read_bytes())
if sys.argv[2] == "roll back":
    log.roll_back(100)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.write(201 if sys.argv[2] != "roll back" else 101, {"train/loss": 0.0})
log.close()
print(json.dumps({"said": said, "before": before, "slowest": slowest}))
"""


@pytest.mark.parametrize("how", ["recovers", "roll back"])
def test_a_full_disk_costs_no_line_and_is_said_once(how, tmp_path):
    """By a limit on the size of files, whose errors come as those of a full disk do: a part of a line, then none."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), how], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["before"] == 1000, "the limit must be reached in the middle of a line"
    assert len(found["said"]) == 2 and "cannot be written" in found["said"][0]
    assert "can be written again, nothing is lost" in found["said"][1]
    assert found["slowest"] < 0.5
    assert steps(tmp_path) == list(range(1, 202 if how == "recovers" else 102))


@pytest.mark.fault(
    "the file system of the run folder is full (a real one)",
    happens="it is said once; metrics wait in memory (up to 64 MiB) and are written when there is room; a roll-back still works",
    lost="nothing",
)
def test_a_full_file_system_is_survived(tmp_path):
    """The real thing, where the test may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    said: list[str] = []
    try:
        (disk / "filling").write_bytes(b"x" * (40 << 10))
        log = MetricLog(disk, said.append)
        for step in range(1, 1001):
            log.write(step, {"train/loss": step / 2})
        log.sync()
        log.roll_back(990)  # cuts, also what is waiting; the disk has no room for the event that says so
        held = len(steps(disk))
        assert 0 < held < 990 and len(said) == 1 and read_events(disk) == []
        (disk / "filling").unlink()
        log._spool._retry_at = 0.0
        log.close()
        assert steps(disk) == list(range(1, 991))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_what_waits_in_memory_is_bounded_and_the_newest_lines_are_kept(monkeypatch):
    monkeypatch.setattr(spool, "KEPT_BYTES", 1000)
    said: list[str] = []
    waits = Spool(Path("/dev/full"), said.append)  # every write to it fails with ENOSPC
    for number in range(1000):
        waits.append(b"%09d\n" % number)
    assert waits.waiting() == [b"%09d\n" % number for number in range(900, 1000)] and waits.dropped == 900
    waits.close()
    assert [text.split(":")[0] for text in said] == ["WARNING"] * 3 and "are lost" in said[2]


def test_the_rest_of_a_line_that_was_begun_is_never_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "KEPT_BYTES", 100)
    monkeypatch.setattr(spool, "RETRY_SECONDS", 0.0)
    room, sound = [5], os.write

    def little(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        took = sound(descriptor, data[: room[0]])
        room[0] -= took
        return took

    monkeypatch.setattr(spool.os, "write", little)
    log = Spool(tmp_path / "f", lambda text: None)
    for number in range(50):
        log.append(b"%09d\n" % number)
    room[0] = 10_000
    log.close()
    lines = (tmp_path / "f").read_bytes().splitlines()
    assert lines[0] == b"000000000" and all(len(line) == 9 for line in lines) and lines[-1] == b"000000049"


def test_nothing_that_a_status_command_imports_needs_torch_or_mlflow():
    code = textwrap.dedent("""
        import sys, pretrain.tracking.shipper, pretrain.tracking.metric_log, pretrain.tracking.sync
        print([m for m in ("torch", "mlflow", "numpy") if m in sys.modules])
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
