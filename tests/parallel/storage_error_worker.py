"""One rank of: python -m tests.parallel.storage_error_worker FOLDER - rank 1's storage fails in a save and in a load."""

from __future__ import annotations

import builtins
import errno
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from parallel import checkpoint, checkpoint_writer
from parallel.boxes import Boxes
from parallel.errors import CheckpointError


def state(rank: int) -> dict[str, Boxes]:
    return {"weight/a": Boxes(torch.Size((4, 3)), [((2 * rank, 0), torch.full((2, 3), float(rank)))])}


def main() -> None:
    dist.init_process_group("gloo")
    rank, root = dist.get_rank(), Path(sys.argv[1])
    path = checkpoint.save(root, 3, state(rank), {})
    told: dict[str, tuple[bool, str]] = {}

    def refusal(name: str, action) -> None:
        try:
            action()
        except CheckpointError as error:
            told[name] = error.passing, str(error)

    def fails(*arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write, opened = checkpoint_writer.HashedFile.write, builtins.open
    if rank == 1:
        checkpoint_writer.HashedFile.write = fails
    refusal("save", lambda: checkpoint.save(root, 4, state(rank), {}))
    checkpoint_writer.HashedFile.write = write

    def open_stale(file, *arguments, **options):
        if str(file).endswith(".distcp"):
            fails()
        return opened(file, *arguments, **options)

    path_open = Path.open
    if rank == 1:
        builtins.open = open_stale
        Path.open = lambda self, *a, **k: open_stale(self, *a, **k)
    refusal("load", lambda: checkpoint.load(path, state(rank)))
    builtins.open, Path.open = opened, path_open
    refusal("sound", lambda: checkpoint.load(path, state(rank)))
    dist.barrier()
    if rank == 0:
        next(path.glob("__1*.distcp")).write_bytes(b"x" * next(path.glob("__1*.distcp")).stat().st_size)
    dist.barrier()
    refusal("damaged", lambda: checkpoint.load(path, state(rank)))
    dist.barrier()
    if rank == 0:
        next(path.glob("__1*.distcp")).unlink()
    dist.barrier()
    refusal("missing", lambda: checkpoint.load(path, state(rank)))
    (root / f"told-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
