"""Checkpoints: one logical format by full-tensor name, written atomically, read at any layout.

    checkpoints/step-00000100/   .metadata, *.distcp (torch.distributed.checkpoint), trainer.json, files.json
    checkpoints/latest           the name of the newest complete one, for people and scripts

A checkpoint is written to a fresh temporary folder, fsynced and renamed, then `latest` moves; dying at any point leaves the
newest complete one in place. Inside: float32 master weights and both Adam moments by logical name, trainer.json with
whatever the training loop needs to go on (step, samples consumed, config, MLflow run id, ...), and files.json with the size
and SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from parallel.agreement import agreed, distributed, first_cause, gone, passing, reason
from parallel.boxes import Boxes, BoxLoadPlanner
from parallel.checkpoint_names import REPLACED, TRAINER, complete_checkpoints, latest, step_folder
from parallel.checkpoint_reader import (
    FILES,
    FORMAT,
    METADATA,
    Reader,
    check_boxes,
    check_files,
    check_tensors,
    read_metadata,
    read_trainer,
    sha256_of,
)
from parallel.checkpoint_writer import FileRecord, RankWriter, RoomPlanner
from parallel.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "complete_checkpoints",
    "latest",
    "load",
    "read_metadata",
    "read_trainer",
    "save",
    "step_folder",
]

# While a checkpoint is written; while it is deleted.
_WRITING, _REMOVING = ".writing-", ".removing-"


def save(
    root: Path,
    step: int,
    state: Mapping[str, Boxes],
    trainer: Mapping[str, Any],
    keep: int = 2,
    group: Optional[dist.ProcessGroup] = None,
) -> Path:
    """Writes the checkpoint of `step` and returns its folder. Collective; on return it is complete on every rank.

    state: logical name -> boxes this rank holds. trainer: JSON-able, the same on all ranks. `keep` newest complete
    checkpoints stay; older ones are removed only after this one is complete. group: all ranks, for the talking (None = the
    default group).
    Raises the same error on all ranks: CheckpointError if there is no room or a rank cannot write (what was complete stays,
    the next save works), RuntimeError if a rank is gone or the boxes do not tile their tensors.
    """
    final = step_folder(root, step)
    temporary = root / f"{_WRITING}{final.name}"
    rank = dist.get_rank() if distributed() else 0
    agreed(lambda: _make_way(root, temporary) if rank == 0 else None, group)
    try:
        files = _write(temporary, rank, state, group)
        agreed(lambda: _publish(root, final, temporary, files, step, trainer, keep) if rank == 0 else None, group)
    except CheckpointError:
        if rank == 0:  # no rank writes any more; a full disk needs the room
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _make_way(root: Path, temporary: Path) -> None:
    """Clears what a run that died while saving left behind, and creates the folder to write to."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{REPLACED}*"):
            name = root / left.name.removeprefix(REPLACED)
            if name.exists():
                _remove(left)
            else:
                os.rename(left, name)
        for pattern in (f"{_WRITING}*", f"{_REMOVING}*"):
            for left in root.glob(pattern):
                shutil.rmtree(left)
        temporary.mkdir()
    except OSError as error:
        raise CheckpointError(f"checkpoint: {root} cannot be written: {reason(error)}") from error


def _write(
    temporary: Path, rank: int, state: Mapping[str, Boxes], group: Optional[dist.ProcessGroup]
) -> dict[str, FileRecord]:
    """Every rank writes its boxes; the files of all ranks, each complete on disk."""
    writer = RankWriter(temporary, rank)
    try:
        dcp.save(
            dict(state),
            storage_writer=writer,
            planner=RoomPlanner(temporary),
            process_group=group,
            no_dist=not distributed(),
        )
    except CheckpointException as error:
        raise first_cause(error) from None
    except RuntimeError as error:  # what a rank itself fails with comes as CheckpointException
        raise gone(error) from error
    return {name: record for files in agreed(lambda: writer.files, group) for name, record in files.items()}


def _publish(
    root: Path,
    final: Path,
    temporary: Path,
    files: dict[str, FileRecord],
    step: int,
    trainer: Mapping[str, Any],
    keep: int,
) -> None:
    """On rank 0, when every rank's file is on disk: the rest of the files, the final name, `latest`, retention."""
    try:
        for name, record in files.items():
            path = temporary / name
            if not path.is_file() or path.stat().st_size != record.bytes:
                raise CheckpointError(
                    f"checkpoint: {path} was written by another rank and rank 0 does not see it whole: run.dir must be a "
                    "folder that all nodes share"
                )
        metadata = temporary / METADATA
        files[METADATA] = FileRecord(metadata.stat().st_size, sha256_of(metadata))
        text = json.dumps({"format": FORMAT, "step": step, **trainer}, indent=1)
        files[TRAINER] = _write_text(temporary / TRAINER, text)
        _write_text(temporary / FILES, json.dumps(dict(sorted(files.items())), indent=1))
        _fsync(temporary)
        pointer = root / ".latest.tmp"
        _write_text(pointer, final.name + "\n")  # now, so that nothing needs room after the rename
        replaced = root / f"{REPLACED}{final.name}"
        if final.exists():  # the same step again, after a roll-back
            os.rename(final, replaced)
        os.rename(temporary, final)
        os.replace(pointer, root / "latest")
        _fsync(root)
        if replaced.exists():
            _remove(replaced)
        for old in complete_checkpoints(root)[:-keep]:
            _remove(old)
    except OSError as error:
        raise CheckpointError(f"checkpoint: {final} cannot be completed: {reason(error)}") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> FileRecord:
    content = text.encode()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def _remove(folder: Path) -> None:
    """Takes the name away first, so that a folder with a checkpoint's name is never half removed."""
    doomed = folder.with_name(f"{_REMOVING}{folder.name}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def load(checkpoint: Path, state: Mapping[str, Boxes]) -> None:
    """Fills the boxes of `state` in place. Collective when distributed.

    Raises CheckpointError on all ranks, before anything is written, if a file is missing or has another size than it was
    written with, if the stored boxes do not tile their tensors, or if a tensor of `state` is not there in its shape.
    """
    reader = Reader(str(checkpoint))

    def check() -> None:
        read_trainer(checkpoint)
        if not distributed() or dist.get_rank() == 0:  # of a thousand ranks one asks for the size of a thousand files
            check_files(checkpoint)
            check_boxes(checkpoint, reader.read_metadata())
        check_tensors(checkpoint, reader.read_metadata(), {name: boxes.shape for name, boxes in state.items()})

    agreed(check)
    try:
        dcp.load(dict(state), storage_reader=reader, planner=BoxLoadPlanner(), no_dist=not distributed())
    except CheckpointException as error:  # a payload that is not a tensor file, or has gone since
        cause = first_cause(error)
        raise CheckpointError(
            f"checkpoint {checkpoint}: its values cannot be read ({cause}); resume from an older one",
            passing=passing(cause),
        ) from None
    except RuntimeError as error:
        raise gone(error) from error
