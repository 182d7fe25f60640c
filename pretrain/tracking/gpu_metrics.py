"""What the driver says of a host's GPUs, through NVIDIA's management library (libnvidia-ml, part of every driver).

No CUDA context is made on any GPU, no package is needed; what a GPU cannot say (a MIG slice its utilisation) is left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_TEMPERATURE_OF_THE_CHIP = 0


class _Utilization(ctypes.Structure):  # nvmlUtilization_t, percent of the last sampling period
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Memory(ctypes.Structure):  # nvmlMemory_t, bytes
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Gpus:
    """The GPUs of this host that belong to the job; none where there is no driver."""

    def __init__(self, environ: Mapping[str, str] = os.environ, library: str = _LIBRARY):
        self._handles: dict[int, ctypes.c_void_p] = {}
        try:
            self._nvml: Any = ctypes.CDLL(library)
        except OSError:
            return
        count = ctypes.c_uint()
        try:
            if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
                return
            for index in chosen(count.value, environ):
                handle = ctypes.c_void_p()
                if not self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)):
                    self._handles[index] = handle
        except AttributeError:  # a library that lacks one of these calls
            self._handles = {}

    def __len__(self) -> int:
        return len(self._handles)

    def sample(self) -> dict[str, float]:
        """{"gpu0_utilization_percent", "gpu0_memory_used_gib", "gpu0_memory_percent", "gpu0_power_watts",
        "gpu0_temperature_celsius", ...} as far as the driver says them.
        """
        found: dict[str, float] = {}
        for index, handle in self._handles.items():
            utilization, memory = _Utilization(), _Memory()
            milliwatts, celsius = ctypes.c_uint(), ctypes.c_uint()
            with contextlib.suppress(AttributeError):
                if not self._nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(utilization)):
                    found[f"gpu{index}_utilization_percent"] = float(utilization.gpu)
                if not self._nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) and memory.total:
                    found[f"gpu{index}_memory_used_gib"] = round(memory.used / 2**30, 3)
                    found[f"gpu{index}_memory_percent"] = round(100 * memory.used / memory.total, 2)
                if not self._nvml.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts)):
                    found[f"gpu{index}_power_watts"] = milliwatts.value / 1000
                if not self._nvml.nvmlDeviceGetTemperature(
                    handle, ctypes.c_uint(_TEMPERATURE_OF_THE_CHIP), ctypes.byref(celsius)
                ):
                    found[f"gpu{index}_temperature_celsius"] = float(celsius.value)
        return found


def chosen(count: int, environ: Mapping[str, str]) -> list[int]:
    """Which of the `count` GPUs that the driver shows belong to the job.

    All, unless a list by number names fewer of them: SLURM_JOB_GPUS, else CUDA_VISIBLE_DEVICES if it holds a GPU for every
    local process (a launcher may show each process its own one only). Slurm's device cgroups leave exactly the job's, renumbered.
    """
    local = int(environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    for name, least in (("SLURM_JOB_GPUS", 1), ("CUDA_VISIBLE_DEVICES", local)):
        parts = [part.strip() for part in environ.get(name, "").split(",") if part.strip()]
        if len(parts) >= least and all(part.isdigit() for part in parts):
            numbers = sorted({int(part) for part in parts})
            if len(numbers) < count and numbers[-1] < count:
                return numbers
            return list(range(count))
    return list(range(count))
