"""The process mesh (dp, tp): built once; everything else asks it. Tensor-parallel ranks are neighbours."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class Mesh:
    """Coordinates and groups of this process. Global rank = dp_rank * tp + tp_rank."""

    dp: int
    tp: int
    dp_rank: int
    tp_rank: int
    device: torch.device
    dp_group: Optional[dist.ProcessGroup]
    tp_group: Optional[dist.ProcessGroup]

    @property
    def rank(self) -> int:
        return self.dp_rank * self.tp + self.tp_rank

    @property
    def world_size(self) -> int:
        return self.dp * self.tp


def world_from_environment(environ: Optional[dict[str, str]] = None) -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun or srun set them; (0, 0, 1) without a launcher."""
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), int(env["SLURM_NTASKS"])
    return 0, 0, 1


def build_mesh(tensor: int = 1, timeout_seconds: int = 600) -> Mesh:
    """Joins the process group (gloo on CPU, nccl on GPUs) and lays the mesh over it.

    A collective that waits longer than `timeout_seconds` (in the mesh's own groups: the next full minute) ends with an
    error. The world size must be a multiple of `tensor` (parallel.legality says so earlier and nicer). A second call gives
    the same mesh.
    """
    rank, local_rank, world = world_from_environment()
    timeout = timedelta(seconds=timeout_seconds)
    # DeepSpeed, megatron-core and others look these up.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if world == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, distributed_timeout_minutes=math.ceil(timeout_seconds / 60)
        )
    elif parallel_state.get_tensor_model_parallel_world_size() != tensor:
        raise ValueError("this process already has a mesh with another number of tensor-parallel ranks")
    return Mesh(
        dp=world // tensor,
        tp=tensor,
        dp_rank=rank // tensor,
        tp_rank=rank % tensor,
        device=device,
        dp_group=parallel_state.get_data_parallel_group(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )


def single_process_mesh() -> Mesh:
    """A mesh without any process group: enough to build a model (on the meta device, say), not to run it."""
    return Mesh(1, 1, 0, 0, torch.device("cpu"), None, None)
