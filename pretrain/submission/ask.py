"""Slurm's own commands, asked with a bound, their refusals in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from data.errors import InputError

SLURM_SECONDS = 60  # longest wait for an answer of Slurm's


def ask(command: Sequence[str]) -> str:
    """What one of Slurm's commands prints; InputError with its own words if it fails."""
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]} is not found: submit from a login node of the Slurm cluster")
    # What Slurm sets in a job, and what overrides options, is not meant for a job that is submitted from it.
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_")) or k == "SLURM_CONF"}
    try:
        done = subprocess.run(command, env=environ, text=True, capture_output=True, timeout=SLURM_SECONDS)
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]} did not answer within {SLURM_SECONDS} s: see `scontrol ping`") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise InputError(f"{command[0]}: {' / '.join(lines)[:400]}")
    return done.stdout.strip()
