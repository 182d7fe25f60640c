"""One rank of: python -m tests.bench.comm_worker FOLDER - a step of known collectives under the benchmark's counter."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from bench.comm_counter import CommCounter


class _ReducedInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        return total


def known_step(rank: int) -> None:
    """Two ranks; what each line moves is written out in the test."""
    dist.all_reduce(torch.ones(10))
    dist.all_reduce(torch.ones(3, dtype=torch.int64), async_op=True).wait()
    _ReducedInBackward.apply(torch.ones(4, requires_grad=True)).sum().backward()
    dist.all_gather_into_tensor(torch.empty(10), torch.ones(5))
    dist.all_gather([torch.empty(6), torch.empty(6)], torch.ones(6))
    dist.reduce_scatter_tensor(torch.empty(4), torch.ones(8))
    dist.broadcast(torch.ones(7, dtype=torch.bfloat16), 0)
    if rank == 0:
        dist.send(torch.ones(9), 1)
    else:
        dist.recv(torch.empty(9), 0)
    dist.barrier()


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with CommCounter() as counter:
        known_step(rank)
    refused = False
    try:
        with CommCounter():
            functional.all_reduce(torch.ones(2), "sum", [0, 1])
    except NotImplementedError:
        refused = True
    found = {kind: asdict(volume) for kind, volume in counter.volumes.items()}
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps({"volumes": found, "refused": refused}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
