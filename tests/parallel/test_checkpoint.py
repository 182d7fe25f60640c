"""Boxes tile tensors; checkpoints are read without executing anything, and refused with one line when anything is amiss."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import checkpoint, checkpoint_writer
from parallel.async_save import AsyncSaver
from parallel.boxes import Boxes, boxes_of_flat_partition, flat_range_boxes
from parallel.checkpoint_reader import file_reports, read_metadata, recorded_files, sha256_of, tiling_fault
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
        files = json.loads((path / "files.json").read_text())
        files[".metadata"] = [(path / ".metadata").stat().st_size, sha256_of(path / ".metadata")]
        (path / "files.json").write_text(json.dumps(files))  # whoever changes one file changes the other
        with pytest.raises(CheckpointError, match="has no place in a checkpoint's metadata"):
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


def rewrite_metadata(path: Path, change) -> None:
    """Changes the stored .metadata by `change(metadata)` and makes files.json agree, so that only the boxes are wrong."""
    metadata = read_metadata(path)
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    files = json.loads((path / "files.json").read_text())
    files[".metadata"] = [(path / ".metadata").stat().st_size, sha256_of(path / ".metadata")]
    (path / "files.json").write_text(json.dumps(files))


def move_box(metadata) -> None:
    stored = metadata.state_dict_metadata["weight/b"]
    stored.chunks = [dataclasses.replace(stored.chunks[0], offsets=torch.Size([3]))]


def halve_box(metadata) -> None:
    stored = metadata.state_dict_metadata["weight/b"]
    stored.chunks = [dataclasses.replace(stored.chunks[0], sizes=torch.Size([5]))]


def double_box(metadata) -> None:
    metadata.state_dict_metadata["weight/b"].chunks *= 2


def lose_place(metadata) -> None:
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != "weight/b"}


def read_beyond(metadata) -> None:
    for place in metadata.storage_data.values():
        place.length += 10**6


@pytest.mark.parametrize("change", [move_box, halve_box, double_box, lose_place, read_beyond])
def test_boxes_that_do_not_tile_their_tensor_or_lie_in_no_file_are_refused_even_if_nobody_asks_for_that_tensor(
    saved, change
):
    path, values = saved
    rewrite_metadata(path, change)
    wanted = {"weight/a": torch.zeros(5, 7)}
    with pytest.raises(CheckpointError, match="not wholly covered by its boxes, once|in no file|lies outside"):
        checkpoint.load(path, whole(wanted))
    assert not wanted["weight/a"].any()


def test_a_state_whose_boxes_do_not_tile_is_never_saved(tmp_path):
    part = {"weight/a": Boxes((6, 2), [((0, 0), torch.ones(4, 2))])}
    with pytest.raises(RuntimeError, match="weight/a .* is not wholly covered"):
        checkpoint.save(tmp_path, 1, part, {})
    assert checkpoint.latest(tmp_path) is None


@st.composite
def boxes_in_a_grid(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = draw(st.integers(0, 5))
    boxes = []
    for _ in range(count):
        offset = [draw(st.integers(0, s - 1)) for s in shape]
        boxes.append((offset, [draw(st.integers(1, s - o)) for s, o in zip(shape, offset)]))
    return shape, boxes


def paint(shape, boxes) -> torch.Tensor:
    painted = torch.zeros(shape, dtype=torch.long)
    for offset, size in boxes:
        painted[tuple(slice(o, o + n) for o, n in zip(offset, size))] += 1
    return painted


@given(boxes_in_a_grid())
@settings(max_examples=300, deadline=None)
def test_tiling_is_what_painting_every_box_says(case):
    shape, boxes = case
    assert (tiling_fault(shape, boxes) is None) == bool((paint(shape, boxes) == 1).all())


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), cuts=st.integers(1, 7), drop=st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_boxes_of_cut_flat_ranges_tile_and_no_longer_when_one_is_missing(shape, cuts, drop):
    size = math.prod(shape)
    edges = [size * i // cuts for i in range(cuts + 1)]
    boxes = [box for a, b in zip(edges, edges[1:]) for box in flat_range_boxes(a, b, shape)]
    assert tiling_fault(shape, boxes) is None
    assert tiling_fault(shape, boxes[1:]) is not None
    assert tiling_fault(shape, [*boxes, boxes[-1]]) is not None
    assert "sticks out" in tiling_fault(shape, [((1, *[0] * (len(shape) - 1)), shape)])


@pytest.mark.parametrize("view", ["whole", "transposed", "slice of a large storage"])
def test_a_save_writes_values_and_not_the_storage_behind_them(tmp_path, view):
    values = {"whole": torch.randn(64, 32), "transposed": torch.randn(32, 64).t()}.get(
        view, torch.randn(4096, 32)[100:164]
    )
    path = checkpoint.save(tmp_path, 1, whole({"weight/a": values}), {})
    assert sum(p.stat().st_size for p in path.glob("*.distcp")) < values.nbytes + 4096
    loaded = {"weight/a": torch.zeros(64, 32)}
    checkpoint.load(path, whole(loaded))
    assert torch.equal(loaded["weight/a"], values)


def test_room_is_asked_for_what_the_files_take_and_not_much_more(tmp_path, monkeypatch):
    """On a disk with just enough free bytes the save works; with fewer than its files took, it is refused."""
    values = {f"weight/{i}": torch.randn(300 + i, 400) for i in range(9)}
    path = checkpoint.save(tmp_path / "a", 1, whole(values), {})
    took = sum(p.stat().st_size for p in path.iterdir())
    free = namedtuple("usage", "total used free")
    margin = len(values) * checkpoint_writer.BOX_OVERHEAD
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free(0, 0, took + margin + checkpoint_writer.SPARE))
    checkpoint.save(tmp_path / "b", 1, whole(values), {})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free(0, 0, took + checkpoint_writer.SPARE - margin))
    with pytest.raises(CheckpointError, match="GiB free"):
        checkpoint.save(tmp_path / "c", 1, whole(values), {})
    assert [p.name for p in (tmp_path / "c").iterdir()] == []


def test_a_disk_that_fills_up_in_the_middle_is_one_line_and_its_leftovers_are_gone(saved, monkeypatch):
    path, values = saved

    def full(_file, _data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.HashedFile, "write", full)
        with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
            checkpoint.save(path.parent, 4, whole(values), {})
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", path.name]
    assert checkpoint.save(path.parent, 5, whole(values), {}).name == "step-00000005"


@pytest.mark.parametrize("payload", [{}, {"x": "../../etc/passwd"}])
def test_files_json_that_makes_no_sense_is_refused(saved, payload):
    path, values = saved
    files = json.loads((path / "files.json").read_text()) if payload else {}
    if payload:
        files["../outside"] = [1, "0"]
    (path / "files.json").write_text(json.dumps(files))
    with pytest.raises(CheckpointError, match=r"files\.json (does not name|names a file outside)"):
        checkpoint.load(path, whole(values))


@pytest.mark.parametrize("damage", ["cut", "longer", "missing"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "trainer.json", "files.json"])
def test_a_damaged_file_is_one_clear_error_that_names_it(saved, damage, name):
    path, values = saved
    file = path / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else content + b"}")
    wanted = {name: torch.zeros_like(t) for name, t in values.items()}
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path, whole(wanted))
    assert str(path) in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    assert not any(t.any() for t in wanted.values())


def test_reading_everything_finds_the_bit_that_changed_and_loading_alone_would_not(saved):
    path, _ = saved
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert all(report.problem is None for report in file_reports(path, read=False))
    assert [r.name for r in file_reports(path) if r.problem and "SHA-256" in r.problem] == ["__0_0.distcp"]


def test_what_is_recorded_of_every_file_is_what_is_there(saved):
    path, _ = saved
    recorded = recorded_files(path)
    assert set(recorded) | {"files.json"} == {p.name for p in path.iterdir()}
    for name, (size, digest) in recorded.items():
        content = (path / name).read_bytes()
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_background_save_takes_the_values_of_its_start_reports_its_error_once_and_goes_on(tmp_path, monkeypatch):
    saver = AsyncSaver()
    values = {"weight/a": torch.randn(50, 7)}
    expected, note = values["weight/a"].clone(), {"nested": [1]}
    state = whole({"weight/a": values["weight/a"].t().contiguous().t()})
    held = threading.Event()
    write = checkpoint_writer.HashedFile.write

    def slow(file, data):
        assert held.wait(30)
        return write(file, data)

    monkeypatch.setattr(checkpoint_writer.HashedFile, "write", slow)
    assert saver.start(tmp_path, 3, state, note) is None
    state["weight/a"].parts[0][1].fill_(float("nan"))
    note["nested"].append(2)
    assert checkpoint.latest(tmp_path) is None, "start waited for the write"
    held.set()
    assert saver.wait() == tmp_path / "step-00000003" and saver.wait() is None
    loaded = {"weight/a": torch.zeros(50, 7)}
    checkpoint.load(tmp_path / "step-00000003", whole(loaded))
    assert torch.equal(loaded["weight/a"], expected)
    assert checkpoint.read_trainer(tmp_path / "step-00000003")["nested"] == [1]

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(0))
        saver.start(tmp_path, 4, whole(values), {})
        with pytest.raises(CheckpointError, match="GiB free"):
            saver.start(tmp_path, 5, whole(values), {})
    assert saver.start(tmp_path, 6, whole(values), {}) is None
    saver.close()
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000006"]


def test_another_format_is_refused_by_name(saved):
    path, _ = saved
    (path / "trainer.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.read_trainer(path)
