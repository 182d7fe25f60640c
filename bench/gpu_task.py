"""What every task of the GPU benchmark shares: its tables, its deadline, and rows that fail without ending the task."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_cases import Sizes, Task
from bench.tables import Table, write_tables
from pretrain.flops import peak_flops

_BACKEND = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


@dataclass
class Work:
    """One task at work in its own process. chosen: the micro batch found by an earlier task, None if there was none."""

    task: Task
    sizes: Sizes
    tables: list[Table]
    file: Path
    deadline: float
    chosen: Optional[int]

    @property
    def device(self) -> str:
        return self.sizes.device

    def table(self, key: str) -> Table:
        return next(t for t in self.tables if t.key == key)

    def save(self) -> None:
        write_tables(self.file, self.tables, environment=environment(self.device))

    @contextlib.contextmanager
    def row(self, table: Table, label: str) -> Iterator[dict[str, Any]]:
        """The block fills the dict given; an error in it becomes the row's status, and the next row goes on.

        A missing package is raised on: it concerns the whole task. Ask `late` first, so that nothing begins after the
        deadline.
        """
        cells: dict[str, Any] = {}
        try:
            yield cells
        except ModuleNotFoundError:
            raise
        except torch.OutOfMemoryError:
            table.refuse(label, "not run: out of device memory")
        except Exception as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                table.refuse(label, f"not run: no such attention kernel on {self.device} for these inputs")
            else:
                traceback.print_exc()
                table.refuse(label, f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")
        else:
            table.fill(label, cells)
        self.save()

    def late(self, table: Table, label: str) -> bool:
        """Whether the time is used up; then the row says so."""
        if time.monotonic() < self.deadline:
            return False
        table.refuse(label, "not run: time budget used up")
        self.save()
        return True

    def mfu(self, flops: float, seconds: float) -> Optional[float]:
        """Share of the device's dense bf16 peak; None on a device without one in the table of peaks."""
        peak = peak_flops(device_name(self.device))
        return flops / seconds / peak if peak else None


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def environment(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    from importlib import metadata

    versions = {}
    for package in ("torch", "triton", "megatron-core", "deepspeed"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    peak = peak_flops(device_name(device))
    return {
        "device": device_name(device),
        "python": sys.version.split()[0],
        "CUDA": torch.version.cuda or "none",
        **versions,
        "peak": f"{peak / 1e12:.0f} TFLOP/s dense bfloat16 (data sheet)" if peak else "none known: no MFU",
    }


def attention_backend(name: str) -> contextlib.AbstractContextManager[Any]:
    """`default`: PyTorch's own order of preference; else that one alone."""
    return contextlib.nullcontext() if name == "default" else sdpa_kernel(_BACKEND[name])


def compile_counts() -> dict[str, int]:
    """Graphs made and graph breaks met by torch.compile in this process since the last `torch._dynamo.reset`."""
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def forget_compiled() -> None:
    """The next call compiles anew, for its own shapes and attention kernel."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
