"""Stacks of a process: told by itself with all its threads, read from outside where it cannot answer, never at the price of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pretrain.watching import stacks
from pretrain.watching.stacks import STACKS, dump_stacks, process_state
from tests.distributed.launch import ROOT, environment

PROGRAM = """
import sys, threading, time
there = threading.Event()
def in_a_thread():
    there.set()
    time.sleep(300)
def in_the_main_thread():
    there.wait()
    print("ready", flush=True)
    time.sleep(300)
if sys.argv[1] == "registered":
    from pretrain.watching.stacks import register_stack_dump
    register_stack_dump()
threading.Thread(target=in_a_thread, daemon=True).start()
in_the_main_thread()
"""


@pytest.fixture
def answers() -> Iterator[int]:
    descriptor = os.memfd_create("answers", 0)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def process(request, answers) -> Iterator[subprocess.Popen]:
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, request.param],
        cwd=ROOT,
        env=environment(**{STACKS: f"/proc/self/fd/{answers}"}),
        pass_fds=(answers,),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    yield started
    started.kill()
    started.wait()
    started.stdout.close()


@pytest.mark.parametrize("process", ["registered"], indirect=True)
def test_a_process_tells_the_stacks_of_all_its_threads_as_often_as_it_is_asked(process, answers):
    for _ in range(2):
        said = dump_stacks(process.pid, answers, "a header\n")
        assert said.startswith("a header\n") and "from inside" in said
        assert said.count("in in_a_thread") == 1 and said.count("in in_the_main_thread") == 1
    assert process.poll() is None


@pytest.mark.parametrize("process", ["registered", "not yet registered"], indirect=True)
def test_one_that_cannot_answer_is_read_from_outside_and_left_alone(process, answers):
    if process.args[-1] == "registered":
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while process_state(process.pid) != "T":
            assert time.monotonic() < deadline
    said = dump_stacks(process.pid, answers)
    assert "from outside" in said and "in_a_thread" in said and "in_the_main_thread" in said
    assert "threads, as the kernel sees them" in said and "State:" in said
    assert process.poll() is None


@pytest.mark.parametrize("process", ["not yet registered"], indirect=True)
def test_without_py_spy_the_kernels_view_is_kept_and_it_is_said(process, answers, monkeypatch):
    monkeypatch.setattr(stacks, "_find_py_spy", lambda: None)
    said = dump_stacks(process.pid, answers)
    assert "py-spy is not installed" in said and said.count("\n  ") > 5 and "State:" in said


def test_a_process_that_is_gone_is_said_to_be_gone(answers):
    ended = subprocess.Popen(["true"])
    ended.wait()
    said = dump_stacks(ended.pid, answers)
    assert f"process {ended.pid}, state gone" in said and "it is gone" in said
