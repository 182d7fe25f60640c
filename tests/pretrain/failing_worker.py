"""One rank of: python -m tests.pretrain.failing_worker WHO HOW FOLDER - rank WHO fails while the others are busy elsewhere."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data.errors import InputError, ShardError
from parallel.errors import CheckpointError
from parallel.mesh import build_mesh
from pretrain.watching.first_failure import failing_together


def main() -> None:
    who, how = int(sys.argv[1]), sys.argv[2]
    mesh = build_mesh(timeout_seconds=600)
    with failing_together(mesh, Path(sys.argv[3])):
        dist.all_reduce(torch.ones(1))
        if mesh.rank == who:
            time.sleep(1)
            if how == "killed":
                os.kill(os.getpid(), 9)
            if how == "storage":
                raise ShardError("shard-000003.tar: cannot be read (Input/output error)", 3, passing=True)
            if how == "checkpoint":
                raise CheckpointError("checkpoint x cannot be read (Stale file handle)", passing=True)
            raise InputError("shard-000003.tar is cut short") if how == "input" else ZeroDivisionError("a bug")
        if mesh.rank == (who + 1) % mesh.world_size:
            time.sleep(300)  # not in a collective: nobody's closed connection wakes it
        dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    main()
