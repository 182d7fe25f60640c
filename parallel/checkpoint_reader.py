"""What can be known of a stored checkpoint without a process group: its files, its boxes, and whether they are whole."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from parallel.checkpoint_names import TRAINER
from parallel.errors import CheckpointError

FORMAT = 1
METADATA, FILES = ".metadata", "files.json"
READ_BYTES = 1 << 22


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


class Reader(FileSystemReader):
    """FileSystemReader that unpickles no more than metadata needs, and reads it once."""

    _metadata: Optional[Metadata] = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
            self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


def read_metadata(checkpoint: Path) -> Metadata:
    """Which boxes of which tensors lie where; CheckpointError if that cannot be read or names anything foreign."""
    try:
        with open(checkpoint / METADATA, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        assert isinstance(metadata, Metadata), "it holds something else"
        for stored in metadata.state_dict_metadata.values():
            assert isinstance(stored, TensorStorageMetadata), "it holds something else than tensors"
    # A pickle that was cut or changed may raise nearly anything.
    except Exception as error:
        raise CheckpointError(f"checkpoint {checkpoint}: its .metadata cannot be read ({error})") from None
    return metadata


def _read_json(checkpoint: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((checkpoint / name).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoint}: {name} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {checkpoint}: {name} is not an object")
    return content


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """The trainer.json of a checkpoint; CheckpointError if there is none or it is of another format."""
    trainer = _read_json(checkpoint, TRAINER)
    if trainer.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {checkpoint}: format {trainer.get('format')}, this version reads {FORMAT}")
    return trainer


@dataclass(frozen=True)
class FileReport:
    """One file of a checkpoint: its recorded size in bytes, and what is wrong with it (None = nothing)."""

    name: str
    bytes: int
    problem: Optional[str]


def recorded_files(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Name -> (bytes, SHA-256) of every file of the checkpoint but files.json itself, as they were written."""
    try:
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in _read_json(checkpoint, FILES).items()}
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {checkpoint}: {FILES} makes no sense ({error})") from None
    for name in (METADATA, TRAINER):
        if name not in files:
            raise CheckpointError(f"checkpoint {checkpoint}: {FILES} does not name {name}")
    for name in files:
        if "/" in name or name in ("", ".", ".."):
            raise CheckpointError(f"checkpoint {checkpoint}: {FILES} names a file outside the checkpoint, {name!r}")
    return files


def file_reports(checkpoint: Path, read: bool = True) -> Iterator[FileReport]:
    """Every file: is it there, has it its size, and (if `read`) its hash. CheckpointError if files.json itself is bad."""
    for name, (size, digest) in recorded_files(checkpoint).items():
        yield FileReport(name, size, _file_problem(checkpoint / name, size, digest if read else None))


def _file_problem(path: Path, size: int, digest: Optional[str]) -> Optional[str]:
    try:
        found = path.stat().st_size
        if found != size:
            kind = "truncated" if found < size else "too long"
            return f"{kind}: {found} bytes, {size} were written"
        if digest is not None and sha256_of(path) != digest:
            return "its content changed after it was written (SHA-256 differs)"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_files(checkpoint: Path) -> None:
    """CheckpointError if a file of the checkpoint is missing or has another size than when it was written."""
    for report in file_reports(checkpoint, read=False):
        if report.problem:
            raise CheckpointError(
                f"checkpoint {checkpoint}: {report.name} is {report.problem}; resume from an older one"
            )


def check_tensors(checkpoint: Path, metadata: Metadata, shapes: Mapping[str, Sequence[int]]) -> None:
    """CheckpointError if a tensor of `shapes` (logical name -> full shape) is not there, or has another shape there."""
    for name, shape in shapes.items():
        found = metadata.state_dict_metadata.get(name)
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointError(f"checkpoint {checkpoint}: no tensor {name}: it is of another architecture")
        if tuple(found.size) != tuple(shape):
            raise CheckpointError(
                f"checkpoint {checkpoint}: {name} is {tuple(found.size)} there and {tuple(shape)} in this model"
            )


def check_boxes(checkpoint: Path, metadata: Metadata) -> None:
    """CheckpointError if the stored boxes do not tile every tensor, or one of them lies outside its file."""
    check_tiling(metadata, f"checkpoint {checkpoint}")
    files = recorded_files(checkpoint)
    places = {(index.fqn, tuple(index.offset or ())): place for index, place in (metadata.storage_data or {}).items()}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        for chunk in stored.chunks:
            place = places.get((name, tuple(chunk.offsets)))
            if place is None:
                raise CheckpointError(f"checkpoint {checkpoint}: {name} {tuple(chunk.offsets)} is in no file")
            size, _ = files.get(place.relative_path, (-1, ""))
            if place.offset < 0 or place.length <= 0 or place.offset + place.length > size:
                raise CheckpointError(
                    f"checkpoint {checkpoint}: {name} {tuple(chunk.offsets)} lies outside {place.relative_path}"
                )


def check_tiling(metadata: Metadata, what: str) -> None:
    """CheckpointError if the boxes of a tensor overlap, leave a gap or stick out."""
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks]
        fault = tiling_fault(tuple(stored.size), boxes)
        if fault:
            raise CheckpointError(
                f"{what}: {name} {tuple(stored.size)} is not wholly covered by its boxes, once: {fault}"
            )


def tiling_fault(shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Optional[str]:
    """Why the boxes (offset, size) do not tile `shape` exactly, or None if they do.

    The first dimension is cut where a box begins or ends; between two cuts the boxes there must tile the rest.
    """
    for offset, size in boxes:
        if len(offset) != len(shape) or any(o < 0 or n <= 0 or o + n > s for o, n, s in zip(offset, size, shape)):
            return f"the box at {tuple(offset)} of size {tuple(size)} sticks out"
    return _tiling_fault(shape, boxes, ()) if math.prod(shape) or boxes else None


def _tiling_fault(
    shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]], at: tuple[int, ...]
) -> Optional[str]:
    if not shape:
        return None if len(boxes) == 1 else f"{len(boxes)} boxes hold the value at {at}"
    begins = sorted(boxes, key=lambda box: box[0][0])
    cuts = sorted({0, shape[0]} | {o[0] for o, _ in boxes} | {o[0] + n[0] for o, n in boxes})
    here: list[tuple[Sequence[int], Sequence[int]]] = []
    following = 0
    for cut, _ in zip(cuts, cuts[1:]):
        here = [box for box in here if box[0][0] + box[1][0] > cut]
        while following < len(begins) and begins[following][0][0] == cut:
            here.append(begins[following])
            following += 1
        if fault := _tiling_fault(shape[1:], [(o[1:], n[1:]) for o, n in here], (*at, cut)):
            return fault
    return None
