"""The process mesh (pp, dp, tp): built once; everything else asks it. Tensor-parallel ranks are neighbours.

global rank = (pp_rank * dp + dp_rank) * tp + tp_rank
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Optional

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class Mesh:
    """Coordinates and groups of this process.

    The data-parallel ranks are cut into groups of `shard` neighbours that share one set of parameter shards; ranks at the
    same place of different groups hold replicas of the same shard. shard == dp is plain ZeRO.
    """

    pp: int
    dp: int
    tp: int
    shard: int
    pp_rank: int
    dp_rank: int
    tp_rank: int
    device: torch.device
    pp_group: Optional[dist.ProcessGroup] = None
    dp_group: Optional[dist.ProcessGroup] = None
    tp_group: Optional[dist.ProcessGroup] = None
    model_group: Optional[dist.ProcessGroup] = None  # pp x tp: the ranks that hold one copy of the whole model
    shard_group: Optional[dist.ProcessGroup] = None
    replica_group: Optional[dist.ProcessGroup] = None
    store: Optional[dist.Store] = None  # where the ranks met; None in a world of one

    @property
    def rank(self) -> int:
        return (self.pp_rank * self.dp + self.dp_rank) * self.tp + self.tp_rank

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def shard_rank(self) -> int:
        return self.dp_rank % self.shard

    @property
    def replicas(self) -> int:
        return self.dp // self.shard

    def peer(self, pp_rank: int) -> int:
        """Global rank of this rank's counterpart in another pipeline stage."""
        return (pp_rank * self.dp + self.dp_rank) * self.tp + self.tp_rank


def world_from_environment(environ: Optional[dict[str, str]] = None) -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun or srun set them; (0, 0, 1) without a launcher."""
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), int(env["SLURM_NTASKS"])
    return 0, 0, 1


def build_mesh(tensor: int = 1, pipeline: int = 1, shard: int = 0, timeout_seconds: int = 600) -> Mesh:
    """Joins the process group (gloo on CPU, nccl on GPUs) and lays a mesh over it. Collective over all ranks.

    `shard` data-parallel ranks share one set of shards (0 = all). A collective that waits longer than `timeout_seconds` ends
    with an error. The sizes must divide each other (parallel.legality says so earlier and nicer). May be called again, for
    the same or another layout of the same ranks.
    """
    rank, local_rank, world = world_from_environment()
    timeout = timedelta(seconds=timeout_seconds)
    # DeepSpeed, megatron-core and others look these up.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world))
    cuda = torch.cuda.is_available()
    # A launcher that shows each task its own GPU alone (srun --gpus-per-task) leaves one, number 0.
    number = 0 if cuda and torch.cuda.device_count() == 1 else local_rank
    if cuda:
        torch.cuda.set_device(number)
    device = torch.device("cuda", number) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        _join("nccl" if cuda else "gloo", rank, world, timeout)
    dp = world // tensor // pipeline
    shard = shard or dp
    ranks = torch.arange(world).view(pipeline, dp // shard, shard, tensor)
    pp, replica, share, tp = range(4)
    groups = {
        name: _group(ranks, axes, rank, timeout)
        for name, axes in (
            ("pp_group", [pp]),
            ("dp_group", [replica, share]),
            ("tp_group", [tp]),
            ("model_group", [pp, tp]),
            ("shard_group", [share]),
            ("replica_group", [replica]),
        )
        if name != "replica_group" or shard < dp
    }
    return Mesh(
        pp=pipeline,
        dp=dp,
        tp=tensor,
        shard=shard,
        pp_rank=rank // (dp * tensor),
        dp_rank=rank // tensor % dp,
        tp_rank=rank % tensor,
        device=device,
        store=_store,
        **groups,
    )


_store: Optional[dist.Store] = None
_groups: dict[tuple[int, ...], Any] = {}


def _join(backend: str, rank: int, world: int, timeout: timedelta) -> None:
    global _store
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    _store, *_ = next(rendezvous("env://", timeout=timeout))
    groups = dist.PrefixStore("groups", _store)
    dist.init_process_group(backend, store=groups, rank=rank, world_size=world, timeout=timeout)


def _group(ranks: torch.Tensor, axes: list[int], rank: int, timeout: timedelta) -> Optional[dist.ProcessGroup]:
    """This rank's group along `axes` of the array of ranks. One group for each set of ranks, however often it is asked for:
    a gloo group costs threads that never sleep long, an nccl group memory.
    """
    others = [axis for axis in range(ranks.dim()) if axis not in axes]
    size = ranks[tuple(slice(None) if axis in axes else 0 for axis in range(ranks.dim()))].numel()
    mine = None
    for members in ranks.permute(*others, *axes).reshape(-1, size).tolist():
        if tuple(members) not in _groups:
            whole = size == dist.get_world_size()
            _groups[tuple(members)] = dist.group.WORLD if whole else dist.new_group(members, timeout=timeout)
        if rank in members:
            mine = _groups[tuple(members)]
    return mine


def leave(code: int, together: bool = True) -> NoReturn:
    """Ends a distributed process: gloo aborts in the interpreter's own shutdown while a group is alive.

    together: wait for the other ranks to come here, too; not where one of them has failed.
    """
    if dist.is_initialized() and together:
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def single_process_mesh() -> Mesh:
    """A mesh without any process group: enough to build a model (on the meta device, say), not to run it."""
    return Mesh(pp=1, dp=1, tp=1, shard=1, pp_rank=0, dp_rank=0, tp_rank=0, device=torch.device("cpu"))
