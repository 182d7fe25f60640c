"""The lab itself: beside another one, started twice, behind a crash."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from tests.slurm.lab import PROGRAMS, Lab


@pytest.fixture
def second(tmp_path_factory):
    """Another lab of one node, stopped at the end."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"no {missing[0]}: `make slurm-lab` installs Slurm and starts a lab")
    lab = Lab(tmp_path_factory.mktemp("lab"), count=1)
    yield lab
    lab.down()


def test_a_second_lab_runs_beside_the_first_may_be_started_twice_and_comes_back_after_a_crash(second):
    first = Lab()
    before = first.ask("scontrol", "show", "config") if first.runs() else ""
    second.up()
    pid = second.pid("slurmctld")
    second.up()
    assert second.runs() and second.pid("slurmctld") == pid
    if before:
        assert first.runs() and first.ask("scontrol", "show", "config").count("\n") == before.count("\n")
        assert (
            first.conf.read_text().split("SlurmctldPort=")[1][:5]
            != second.conf.read_text().split("SlurmctldPort=")[1][:5]
        )
    os.kill(pid, signal.SIGKILL)  # its pid file stays
    second.up()
    assert second.runs() and second.pid("slurmctld") != pid
    second.down()
    assert not second.runs() and not second.pid("slurmctld") and not second.pid("munged")
