"""Boxes tile tensors; checkpoints are read without executing anything, refused when incomplete, and survive a kill."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import checkpoint
from parallel.boxes import Boxes, boxes_of_flat_partition, flat_range_boxes
from parallel.errors import CheckpointError


@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
@settings(max_examples=200, deadline=None)
def test_boxes_of_a_flat_range_cover_exactly_that_range_in_order(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    index = torch.arange(size).view(shape)
    boxes = flat_range_boxes(start, stop, shape)
    found = [index[tuple(slice(o, o + n) for o, n in zip(*box))].flatten() for box in boxes]
    assert torch.cat([*found, torch.zeros(0, dtype=torch.long)]).tolist() == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1


@pytest.mark.parametrize("dp", [1, 2, 3, 5])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shape, dim, padded", [((13,), None, 13), ((10, 8), 0, 16), ((12, 7), 0, 12), ((6, 8), 1, 6)])
def test_the_partitions_of_all_ranks_tile_the_tensor_once_and_leave_padding_out(shape, dim, padded, tp, dp):
    """ZeRO-3's layout: each tensor-parallel share is flattened, padded to a multiple of dp, and cut."""
    full = torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + 1
    with_padding = torch.cat([full, torch.full((padded - shape[0], *shape[1:]), -1.0)])
    rebuilt = torch.zeros(shape)
    for tp_rank in range(tp):
        share = with_padding if dim is None else with_padding.chunk(tp, dim)[tp_rank]
        if dim is None and tp_rank:
            continue
        flat = share.flatten()
        flat = torch.cat([flat, torch.full((-len(flat) % dp,), -2.0)])
        for dp_rank, partition in enumerate(flat.chunk(dp)):
            for offset, view in boxes_of_flat_partition(shape, share.shape, dim, tp_rank, partition, dp_rank).parts:
                region = rebuilt[tuple(slice(o, o + n) for o, n in zip(offset, view.shape))]
                assert not region.any(), "a value is held twice"
                region.copy_(view)
    assert torch.equal(rebuilt, full)


def whole(values: dict[str, torch.Tensor]) -> dict[str, Boxes]:
    return {name: Boxes(t.shape, [((0,) * t.dim(), t)]) for name, t in values.items()}


@pytest.fixture
def saved(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    values = {"weight/a": torch.randn(5, 7), "weight/b": torch.randn(11)}
    return checkpoint.save(tmp_path / "checkpoints", 3, whole(values), {"note": 1}), values


def test_what_is_saved_is_what_is_loaded_bit_for_bit(saved):
    path, values = saved
    loaded = {name: torch.full_like(t, float("nan")) for name, t in values.items()}
    checkpoint.load(path, whole(loaded))
    assert all(torch.equal(loaded[name], values[name]) for name in values)
    assert checkpoint.read_trainer(path) == {"format": 1, "step": 3, "note": 1}


def test_metadata_that_names_anything_foreign_is_refused_and_not_executed(saved, tmp_path):
    path, values = saved
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return (Path.touch, (marker,))

    for payload in (Attack(), {"state_dict_metadata": Attack()}):
        (path / ".metadata").write_bytes(pickle.dumps(payload))
        with pytest.raises(CheckpointError, match="metadata"):
            checkpoint.load(path, whole(values))
    assert not marker.exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda v: v | {"weight/c": torch.zeros(2)}, "no tensor weight/c"),
        (lambda v: v | {"weight/a": torch.zeros(5, 8)}, r"weight/a is \(5, 7\) there and \(5, 8\)"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_before_anything_is_written(saved, change, said):
    path, values = saved
    wanted = change({name: torch.full_like(t, 7.0) for name, t in values.items()})
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(path, whole(wanted))
    assert all((t == 7).all() or (t == 0).all() for t in wanted.values())


def test_a_tensor_that_is_not_wholly_covered_is_refused(tmp_path):
    part = {"weight/a": Boxes((6, 2), [((0, 0), torch.ones(4, 2))])}
    path = checkpoint.save(tmp_path, 1, part, {})
    with pytest.raises(CheckpointError, match="weight/a is not wholly covered"):
        checkpoint.load(path, whole({"weight/a": torch.zeros(6, 2)}))


@pytest.mark.parametrize("damage", ["cut payload", "cut metadata", "no metadata", "no payload"])
def test_a_damaged_checkpoint_is_one_clear_error(saved, damage):
    path, values = saved
    payload, metadata = next(path.glob("*.distcp")), path / ".metadata"
    file = payload if "payload" in damage else metadata
    if damage.startswith("cut"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path, whole({name: torch.zeros_like(t) for name, t in values.items()}))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def save_and_die(point: int, *arguments, **options) -> bool:
    """Saves in a forked child that kills itself with SIGKILL just before its `point`-th change of the file system.

    Python tells audit hooks of every open, mkdir, rename, remove and rmdir. True if the child lived to the end.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, details: tuple) -> None:
            nonlocal seen
            writes = (
                event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                seen += 1
                if seen == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            checkpoint.save(*arguments, **options)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_kill_9_at_every_change_of_the_file_system_leaves_a_newest_checkpoint_that_loads_and_the_next_save_works(
    tmp_path,
):
    older, newer = ({"weight/a": torch.randn(5, 7)} for _ in range(2))
    point, newest_seen, lived = 0, [], False
    while not lived:
        point += 1
        root = tmp_path / str(point)
        checkpoint.save(root, 2, whole(older), {})
        checkpoint.save(root, 3, whole(older), {})
        lived = save_and_die(point, root, 4, whole(newer), {}, keep=2)
        newest = checkpoint.latest(root)
        newest_seen.append(newest.name)
        loaded = {"weight/a": torch.zeros(5, 7)}
        checkpoint.load(newest, whole(loaded))
        assert torch.equal(loaded["weight/a"], (newer if newest.name == "step-00000004" else older)["weight/a"])
        assert checkpoint.save(root, 5, whole(newer), {}, keep=1).name == "step-00000005"
        assert [p.name for p in root.iterdir() if p.is_dir()] == ["step-00000005"], "something of the dead save is left"
    assert set(newest_seen) == {"step-00000003", "step-00000004"}
    assert newest_seen == sorted(newest_seen) and point > 8


def test_another_format_is_refused_by_name(saved):
    path, _ = saved
    (path / "trainer.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.read_trainer(path)
