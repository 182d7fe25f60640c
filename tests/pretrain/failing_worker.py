"""One rank of: python -m tests.pretrain.failing_worker WHO HOW - rank WHO fails while the others are busy elsewhere."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

from data.errors import InputError
from parallel.mesh import build_mesh
from pretrain.first_failure import failing_together


def main() -> None:
    who, how = int(sys.argv[1]), sys.argv[2]
    mesh = build_mesh(timeout_seconds=600)
    with failing_together(mesh):
        dist.all_reduce(torch.ones(1))
        if mesh.rank == who:
            time.sleep(1)
            if how == "killed":
                os.kill(os.getpid(), 9)
            raise InputError("shard-000003.tar is cut short") if how == "input" else ZeroDivisionError("a bug")
        if mesh.rank == (who + 1) % mesh.world_size:
            time.sleep(300)  # not in a collective: nobody's closed connection wakes it
        dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    main()
