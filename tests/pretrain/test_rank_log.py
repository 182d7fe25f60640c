"""Each rank's own file: everything that it and the libraries under it say, and the console for rank 0's lines alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.watching.rank_log import log_path
from tests.distributed.launch import ROOT, environment

PROGRAM = """
import os, resource, sys
from pathlib import Path
from pretrain.watching.rank_log import RankLog
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
print("before")
try:
    with RankLog(folder, rank, int(sys.argv[3]), "launch") as log:
        print("python says")
        print("python warns", file=sys.stderr)
        os.write(2, b"native warns\\n")
        os.system("echo child says; echo child warns >&2")
        log.line("stamped")
        if sys.argv[4] == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size, resource.RLIM_INFINITY))
            import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            log.line("lost")
            print("lost", file=sys.stderr)
        if sys.argv[4] == "fails":
            raise ZeroDivisionError("a bug")
except ZeroDivisionError as error:
    print("failed with", error, file=sys.stderr)
print("after")
os.write(2, b"native after\\n")
"""


def said(folder: Path, rank: int, world: int = 2, how: str = "ends") -> tuple[str, str, str]:
    """(standard output, standard error, the rank's file)."""
    command = [sys.executable, "-c", PROGRAM, str(rank), str(folder), str(world), how]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, log_path(folder, rank).read_text()


def test_rank_0_keeps_its_console_and_its_file_has_every_warning_of_native_code_too(tmp_path):
    out, err, log = said(tmp_path, 0)
    assert out.split("\n")[:2] == ["before", "python says"] and "child says" in out and "after" in out
    assert "python warns" in err and "native after" in err and "native warns" not in err
    assert all(f"{who} warns\n" in log for who in ("python", "native", "child")) and "native after" not in log
    assert log.count("=== start launch: rank 0 of 2 on ") == 1 and " stamped\n" in log


def test_other_ranks_say_everything_to_their_files_and_get_the_console_back(tmp_path):
    out, err, log = said(tmp_path, 1)
    assert out == "before\nafter\n" and err == "native after\n"
    assert all(f"{who} says\n" in log for who in ("python", "child"))
    assert all(f"{who} warns\n" in log for who in ("python", "native", "child"))


def test_a_second_start_appends(tmp_path):
    said(tmp_path, 1)
    assert said(tmp_path, 1)[2].count("=== start launch") == 2


@pytest.mark.fault(
    "a full disk under a rank's log",
    happens="training goes on",
    lost="the lines of the log that there was no room for",
)
def test_a_log_that_cannot_grow_stops_nothing(tmp_path):
    out, err, log = said(tmp_path, 0, how="full")
    assert "after" in out and "lost" in err and "lost" not in log


def test_a_failure_leaves_its_traceback_in_the_file(tmp_path):
    out, err, log = said(tmp_path, 0, world=1, how="fails")
    assert (
        "ZeroDivisionError: a bug" in log
        and "Traceback" in log
        and "failed with a bug" in err
        and "native after" in err
    )
    _, err, log = said(tmp_path, 1, world=2, how="fails")
    # Among other ranks the process ends with its failure: what says so is to reach its file, not the console.
    assert "failed with a bug" in log and err == ""
