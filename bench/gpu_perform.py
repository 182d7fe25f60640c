"""Runs one task of the GPU benchmark: imports its part only now, so that a missing package costs that part alone."""

from __future__ import annotations

import os
import traceback

import torch

from bench.gpu_task import Work

PACKAGES = {"megatron": "megatron-core", "yaml": "PyYAML"}  # by import name, where they differ


def perform(work: Work) -> int:
    """Runs the task; every row ends with figures or a reason. Returns the exit code of the process."""
    torch.set_num_threads(1 if work.sizes.device == "cpu" else min(8, os.cpu_count() or 1))
    work.save()
    try:
        if work.task.part == "a":
            from bench.gpu_block import run
        elif work.task.part == "b":
            from bench.gpu_loss import run
        elif work.task.part == "d":
            from bench.gpu_correct import run
        else:
            from bench.gpu_step import run
        run(work)
    except ModuleNotFoundError as error:
        traceback.print_exc()
        name = (error.name or str(error)).partition(".")[0]
        why = f"not run: needs {PACKAGES.get(name, name)}, which is not installed"
    except Exception as error:
        traceback.print_exc()
        why = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
    else:
        why = "not run: the task passed over this row"
    for table in work.tables:
        table.refuse_rest(why)
    work.save()
    return 0
