"""Which start of a run this process belongs to, and which rank it is, from the launcher's variables alone: no torch, no talking."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

LAUNCH = "PALIMPSEST_LAUNCH"  # set by `watch` for its training process, so that both say the same


def rank_and_world(environ: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world size) as torchrun or srun set them; (0, 1) without a launcher. ValueError if they are no whole numbers."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if _of_srun(environ) and int(environ.get("SLURM_NTASKS", 1)) > 1:
        return int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"])
    return 0, 1


def launch_name(environ: Mapping[str, str]) -> str:
    """One name for one start of all ranks, made of letters, digits and `_.-`: equal on all of them.

    Under srun JOBID-STEPID-RESTARTCOUNT, under torchrun RDZVID-RESTARTCOUNT-PORT, else ADDRESS-PORT of where the ranks meet;
    without a launcher `pid-PID`.
    """
    if name := environ.get(LAUNCH):
        return _plain(name)
    if "TORCHELASTIC_RUN_ID" in environ:
        parts = [
            environ["TORCHELASTIC_RUN_ID"],
            environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            environ.get("MASTER_PORT", "0"),
        ]
    elif _of_srun(environ):
        parts = [environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"], environ.get("SLURM_RESTART_COUNT", "0")]
    elif "RANK" in environ and environ.get("WORLD_SIZE", "1") != "1":
        parts = [environ.get("MASTER_ADDR", "localhost"), environ.get("MASTER_PORT", "0")]
    else:
        parts = ["pid", str(os.getpid())]
    return _plain("-".join(parts))


def never_used_before(environ: Mapping[str, str]) -> bool:
    """Whether no earlier start can have had this launch name: Slurm counts its jobs and requeues, while ports and pids come again,
    and from one interactive step of a single task a run may be started many times.
    """
    several = _of_srun(environ) and int(environ.get("SLURM_NTASKS", 1)) > 1
    return several and "TORCHELASTIC_RUN_ID" not in environ


def job_id(environ: Mapping[str, str]) -> str:
    """The Slurm job that this process is part of, "" if none; requeues keep it."""
    return environ.get("SLURM_JOB_ID", "")


def _of_srun(environ: Mapping[str, str]) -> bool:
    return all(key in environ for key in ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_JOB_ID"))


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:120]
