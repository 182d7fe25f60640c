"""What one rank writes of a checkpoint: its boxes, one at a time, hashed on the way, after room was found for all of them."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo  # the stored form of "which bytes of which file"
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from parallel.agreement import passing, reason
from parallel.boxes import BoxSavePlanner
from parallel.checkpoint_reader import check_tiling
from parallel.errors import CheckpointError

GIB = 2**30
BOX_OVERHEAD = (
    4096  # bytes that one box takes at most besides its values: the serialiser's header, its place in .metadata
)
SPARE = 64 * 2**20  # bytes that must stay free: metrics, samples and logs are written to the same disk


class FileRecord(NamedTuple):
    """Size in bytes and SHA-256 of a file as it was written."""

    bytes: int
    sha256: str


class HashedFile:
    """A file that is only written to, from start to end, and knows its size and hash."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._hash.update(data)
        written = memoryview(data).nbytes
        self.bytes += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> FileRecord:
        """Waits until all of it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileRecord(self.bytes, self._hash.hexdigest())


class RankWriter(FileSystemWriter):
    """FileSystemWriter that holds one box at a time in memory (its own keeps every box of the file until the file is done),
    and keeps in `files` what this rank wrote: name -> FileRecord.
    """

    def __init__(self, folder: Path, rank: int):
        super().__init__(str(folder), sync_files=True)
        self._folder = folder
        self._name = f"__{rank}_0.distcp"
        self.files: dict[str, FileRecord] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        path = self._folder / self._name
        try:
            with open(path, "xb") as raw:
                stream = HashedFile(raw)
                for item in plan.items:
                    start = stream.bytes
                    torch.save(_compact(planner.resolve_data(item)), cast(IO[bytes], stream))  # it only calls write
                    length = stream.bytes - start
                    results.append(WriteResult(item.index, length, _StorageInfo(self._name, start, length)))
                self.files[self._name] = stream.sync()
        except Exception as error:
            said = f"checkpoint: {path} cannot be written: {reason(error)}"
            raise CheckpointError(said, passing=passing(error)) from error
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _compact(value: Any) -> Tensor:
    """On the host, in storage of its own size: the serialiser writes whole storages, and boxes are views."""
    tensor = value.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class RoomPlanner(BoxSavePlanner):
    """BoxSavePlanner that, on the coordinating rank and before any rank writes, refuses a checkpoint without room for it."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        if len(plans) == 1:  # torch checks this of several ranks only
            try:
                check_tiling(metadata, "this state")
            except CheckpointError as error:  # nothing that a person could mend
                raise RuntimeError(str(error)) from None
        check_room(self._folder, bytes_needed(plans))
        return plans, metadata


def bytes_needed(plans: Sequence[SavePlan]) -> int:
    """Bytes that the planned boxes take on disk, at most; of replicas, the plans hold one."""
    return sum(_bytes(item) + BOX_OVERHEAD for plan in plans for item in plan.items)


def _bytes(item: WriteItem) -> int:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is not a tensor"
    return math.prod(data.size if data.chunk is None else data.chunk.sizes) * data.properties.dtype.itemsize


def check_room(folder: Path, needed: int) -> None:
    """CheckpointError if the disk of `folder` has no room for `needed` bytes and some spare. A quota is not seen here."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise CheckpointError(
            f"checkpoint: needs {needed / GIB:.2f} GiB (and {SPARE / GIB:.2f} to spare) in {folder.parent}, "
            f"{free / GIB:.2f} GiB free: free some space, delete older step-* folders there (a lower "
            "train.keep_checkpoints keeps fewer), or move run.dir to a larger disk"
        )
