"""A save that fails does not end training: it is said loudly, tried again soon, and becomes the run's failure only at its end."""

from __future__ import annotations

import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from parallel import checkpoint
from parallel.boxes import Boxes
from parallel.errors import CheckpointError
from pretrain.loop import saving
from pretrain.loop.saving import Saving


class Disk:
    """A disk whose room the test decides, a run of 100 steps that saves every 20, and what it said."""

    def __init__(self, folder: Path, monkeypatch, asynchronous: bool):
        self.root, self.free, self.said, self.slept = folder / "checkpoints", 1 << 40, [], []
        self.on_sleep = lambda: None
        monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(self.free))
        monkeypatch.setattr(saving.time, "sleep", self.sleep)
        self.saving = Saving(
            self.root, every=20, keep=9, asynchronous=asynchronous, timeout_seconds=60, say=self.said.append
        )

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.on_sleep()

    def state(self):
        return {"weight/a": Boxes((4,), [((0,), torch.ones(4))])}

    def steps(self, first: int, last: int, full: range = range(0)) -> list[int]:
        """Takes the steps; the disk is full during `full`. The steps at which a save was begun."""
        begun = []
        for step in range(first, last + 1):
            self.free = 0 if step in full else 1 << 40
            if self.saving.due(step):
                begun.append(step)
                self.saving.save(step, self.state, {})
        return begun

    def saved(self) -> list[int]:
        return [int(p.name[5:]) for p in checkpoint.complete_checkpoints(self.root)]


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def disk(tmp_path, monkeypatch, request) -> Disk:
    return Disk(tmp_path, monkeypatch, request.param)


def test_without_failures_every_due_step_is_saved_once_and_the_end_not_twice(disk):
    assert disk.steps(1, 40) == [20, 40]
    disk.saving.finish(40, disk.state, {})
    assert disk.saved() == [20, 40] and [said for said in disk.said if "WARNING" in said] == []
    assert disk.said == [f"step {s}: checkpoint {checkpoint.step_folder(disk.root, s)}" for s in (20, 40)]


def test_a_run_that_stops_between_saves_is_saved_at_its_end(disk):
    disk.steps(1, 30)
    disk.saving.finish(30, disk.state, {})
    assert disk.saved() == [20, 30]


@pytest.mark.fault(
    "a full disk when a save is due",
    happens="said loudly, tried again soon, training goes on",
    lost="that save, made up for when there is room",
)
def test_a_full_disk_is_said_loudly_tried_again_soon_and_forgotten_when_there_is_room(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch, asynchronous=False)
    assert disk.steps(1, 60, full=range(39, 45)) == [20, 40, 42, 44, 46, 60]
    assert disk.saved() == [20, 46, 60] and disk.saving.failed == 0
    warnings = [said for said in disk.said if said.startswith("WARNING")]
    assert len(warnings) == 3 and all("newest complete one: step 20" in said for said in warnings)
    assert "step 44 was NOT saved (3 failed in a row" in warnings[2] and "free some space" in warnings[2]


def landed(disk: Disk) -> None:
    """Lets the save behind training come to its end, good or bad."""
    disk.saving._saver._saving.exception(timeout=60)


def test_a_save_that_failed_behind_training_is_heard_of_soon_and_begun_again(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch, asynchronous=True)
    disk.steps(1, 20)
    landed(disk)
    disk.steps(21, 40, full=range(40, 41))
    landed(disk)  # badly, before the disk has room again
    assert disk.steps(41, 41) == [] and "NOT saved" not in disk.said[-1]
    assert disk.steps(42, 42) == [42], "two steps later it is heard of, and begun again at once"
    assert "step 40 was NOT saved (1 failed in a row, newest complete one: step 20)" in disk.said[-1]
    landed(disk)
    assert disk.steps(43, 60) == [60] and disk.saving.failed == 0
    disk.saving.finish(60, disk.state, {})
    assert disk.saved() == [20, 42, 60]


def test_a_slow_save_behind_training_is_never_waited_for_before_the_next_is_due(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch, asynchronous=True)
    slow, own = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (slow.wait(60), own(*a, **k))[1])
    assert disk.steps(1, 35) == [20] and disk.said == []
    slow.set()
    landed(disk)
    assert disk.steps(36, 39) == [] and disk.said == [f"step 20: checkpoint {checkpoint.step_folder(disk.root, 20)}"]
    disk.saving.close()


def test_the_end_of_a_run_is_tried_for_a_while_and_then_fails(disk):
    disk.free = 0
    with pytest.raises(CheckpointError, match="GiB free"):
        disk.saving.finish(7, disk.state, {})
    assert disk.slept == [saving.LAST_PAUSE_SECONDS] * (saving.LAST_TRIES - 1)
    assert len([said for said in disk.said if "the run is at its end" in said]) == saving.LAST_TRIES - 1


def test_the_end_of_a_run_is_saved_as_soon_as_there_is_room(disk):
    disk.free = 0
    disk.on_sleep = lambda: setattr(disk, "free", 1 << 40) if len(disk.slept) == 3 else None
    disk.saving.finish(7, disk.state, {})
    assert disk.saved() == [7] and len(disk.slept) == 3


def test_on_the_way_out_a_save_in_flight_is_completed_and_its_failure_is_only_said(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch, asynchronous=True)
    disk.steps(1, 20)
    disk.saving.close()
    assert disk.saved() == [20]
    disk = Disk(tmp_path, monkeypatch, asynchronous=True)
    disk.steps(21, 40, full=range(40, 41))
    landed(disk)
    disk.saving.close()
    assert disk.saved() == [20] and "step 40 was NOT saved" in disk.said[-1]
