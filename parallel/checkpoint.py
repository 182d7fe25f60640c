"""Checkpoints: one logical format by full-tensor name, written atomically, read at any layout.

    checkpoints/step-00000100/   .metadata, *.distcp (torch.distributed.checkpoint), trainer.json
    checkpoints/latest           the name of the newest complete one

A checkpoint is written to a fresh temporary folder, fsynced and renamed, then `latest` moves; dying at any point leaves the
newest complete one in place. Inside: float32 master weights and both Adam moments by logical name, and trainer.json with
whatever the training loop needs to go on (step, samples consumed, config, MLflow run id, ...).
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from parallel.boxes import Boxes, BoxLoadPlanner, BoxSavePlanner
from parallel.errors import CheckpointError

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")


class _MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's metadata, which is a pickle, without letting it name anything but DCP's own plain classes."""

    _allowed = {
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
            "BytesStorageMetadata",
        )
    } | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # the writer's own path; never opened
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with open(Path(self.path) / ".metadata", "rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as error:
            raise CheckpointError(f"checkpoint {self.path}: its .metadata cannot be read ({error})") from None
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """All complete checkpoints, oldest first. A folder has its final name only when it is complete."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _NAME.fullmatch(p.name) and (p / "trainer.json").is_file())


def latest(root: Path) -> Optional[Path]:
    """The newest complete checkpoint, or None."""
    found = complete_checkpoints(root)
    return found[-1] if found else None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync(path.parent)


def _remove(folder: Path) -> None:
    """Takes the name away first, so that a folder with a checkpoint's name is never half removed."""
    doomed = folder.with_name(f".removing-{folder.name}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def save(root: Path, step: int, state: Mapping[str, Boxes], trainer: Mapping[str, Any], keep: int = 2) -> Path:
    """Writes the checkpoint of `step` and returns its folder. Collective; on return it is complete on every rank.

    state: logical name -> boxes this rank holds. trainer: JSON-able, the same on all ranks. `keep` newest complete
    checkpoints stay; older ones are removed only after this one is complete.
    """
    final = step_folder(root, step)
    temporary = root / f".writing-{final.name}"
    rank = dist.get_rank() if _distributed() else 0
    if rank == 0:
        root.mkdir(parents=True, exist_ok=True)
        for pattern in (".writing-*", ".removing-*"):  # of a run that died while saving
            for leftover in root.glob(pattern):
                shutil.rmtree(leftover)
        temporary.mkdir()
    if _distributed():
        dist.barrier()
    dcp.save(
        dict(state),
        storage_writer=FileSystemWriter(str(temporary), sync_files=True),
        planner=BoxSavePlanner(),
        no_dist=not _distributed(),
    )
    if rank == 0:
        _write_text(temporary / "trainer.json", json.dumps({"format": FORMAT, "step": step, **trainer}, indent=1))
        _fsync(temporary)
        if final.exists():  # the same step again, after a roll-back
            _remove(final)
        os.rename(temporary, final)
        _fsync(root)
        _write_text(root / "latest", final.name + "\n")
        for old in complete_checkpoints(root)[:-keep]:
            _remove(old)
    if _distributed():
        dist.barrier()
    return final


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """The trainer.json of a checkpoint; CheckpointError if there is none or it is of another format."""
    try:
        trainer = json.loads((checkpoint / "trainer.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoint}: trainer.json cannot be read ({error})") from None
    if not isinstance(trainer, dict):
        raise CheckpointError(f"checkpoint {checkpoint}: trainer.json is not an object")
    if trainer.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {checkpoint}: format {trainer.get('format')}, this version reads {FORMAT}")
    return trainer


def load(checkpoint: Path, state: Mapping[str, Boxes]) -> None:
    """Fills the boxes of `state` in place. Collective when distributed.

    Raises CheckpointError, before anything is written, if a tensor is missing, has another shape, or is not wholly there.
    """
    reader = _Reader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    for name, boxes in state.items():
        meta = stored.get(name)
        if not isinstance(meta, TensorStorageMetadata):
            raise CheckpointError(f"checkpoint {checkpoint}: no tensor {name}: it is of another architecture")
        if tuple(meta.size) != tuple(boxes.shape):
            raise CheckpointError(
                f"checkpoint {checkpoint}: {name} is {tuple(meta.size)} there and {tuple(boxes.shape)} in this model"
            )
        if sum(chunk.sizes.numel() for chunk in meta.chunks) != meta.size.numel():
            raise CheckpointError(f"checkpoint {checkpoint}: {name} is not wholly covered by the stored boxes")
    try:
        dcp.load(dict(state), storage_reader=reader, planner=BoxLoadPlanner(), no_dist=not _distributed())
    except CheckpointException as error:  # a payload that is missing, cut short or not a tensor file
        causes = [
            f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}" for cause, _ in error.failures.values()
        ]
        raise CheckpointError(
            f"checkpoint {checkpoint}: its values cannot be read ({causes[0]}); resume from an older one"
        ) from None
