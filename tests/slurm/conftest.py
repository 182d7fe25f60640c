"""The lab that these tests run on; without one they are skipped, all with one line."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from data.durable import take_lock
from tests.slurm.lab import Lab

TURN_SECONDS = 900  # for another pytest process to be done with the lab


NO_LAB = "no Slurm here: `make slurm-lab` starts one on this machine"


def pytest_collection_modifyitems(config, items) -> None:
    """Without a lab one test stands for all of them, so that one line says what is missing."""
    for item in items:
        if "tests/slurm/" in item.nodeid:
            item.add_marker(pytest.mark.slurm)
    on_lab = [item for item in items if "tests/slurm/" in item.nodeid and "lab" in item.fixturenames]
    if on_lab and not config.option.collectonly and not Lab().runs():
        on_lab[0].add_marker(pytest.mark.skip(reason=f"{NO_LAB} ({len(on_lab)} tests)"))
        config.hook.pytest_deselected(items=on_lab[1:])
        items[:] = [item for item in items if item not in on_lab[1:]]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab with all nodes up and no jobs, this process's own for the time of a module; it is left so."""
    lab = Lab()
    if not lab.runs():
        pytest.skip(NO_LAB)
    lock = _take_turn(lab)
    try:
        lab.clear()
        yield lab
        lab.clear()
    finally:
        os.close(lock)


def _take_turn(lab: Lab) -> int:
    """A lock on the lab: tests take nodes down and cancel whatever runs."""
    deadline = time.monotonic() + TURN_SECONDS
    while True:
        try:
            return take_lock(lab.folder / "lock")
        except BlockingIOError:
            assert time.monotonic() < deadline, f"the lab was somebody else's for {TURN_SECONDS} s"
            time.sleep(0.5)
