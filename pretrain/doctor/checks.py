"""What `doctor` looks at: one check per part of the machine, each a function from Machine to findings.

Other programs, torch and deepspeed among them, are asked in child processes (pretrain.doctor.probes), and nothing is ever compiled.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from parallel.apex_support import detect_apex
from pretrain.doctor.probes import command_output, link_kinds, one_line, run_probe

SUPPORTED_TORCH = ((2, 11), (2, 13))
SLURM_COMMANDS = ("sbatch", "srun", "scontrol", "sinfo")
INSTALL = "pip install -r requirements.txt"
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it stands, what was seen, what to do (empty when all is well)."""

    name: str
    status: Literal["ok", "missing", "warn"]
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """What the checks look at: the folder that runs are written to, the root of /proc and /sys, the pinned versions."""

    folder: Path
    pins: Mapping[str, str]
    root: Path = Path("/")


def pinned_versions(requirements: Path) -> dict[str, str]:
    """The `name==version` and `name[extras]==version` lines of a requirements file."""
    return dict(re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==([^\s;#]+)", _read(requirements), re.MULTILINE))


def at_least(name: str, amount: Any, enough: Any, detail: str, advice: str) -> Finding:
    """ok if `amount` >= `enough`, else a warning with `advice`."""
    return Finding(name, "ok", detail) if amount >= enough else Finding(name, "warn", detail, advice)


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def check_python(machine: Machine) -> list[Finding]:
    detail = f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}"
    return [at_least("Python", sys.version_info, (3, 11), detail, "use Python 3.11 or newer")]


def package_finding(name: str, pins: Mapping[str, str], why: str) -> Finding:
    """Whether an installed package is the pinned one; `why` says what it is for."""
    pinned = pins.get(name)
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", f"not installed ({why})", INSTALL)
    if pinned and installed.split("+")[0] != pinned:
        return Finding(name, "warn", f"{installed}, tested with {pinned} ({why})", f"pip install {name}=={pinned}")
    return Finding(name, "ok", installed)


def check_packages(machine: Machine) -> list[Finding]:
    named = {
        "deepspeed": "ZeRO-3; with pipeline stages exactly this version is needed",
        "megatron-core": "tensor-parallel layers",
        "webdataset": "data stages",
        "tokenizers": "text to tokens",
        "mlflow": "tracking",
    }
    findings = [package_finding(name, machine.pins, why) for name, why in named.items()]
    rest = [package_finding(n, machine.pins, "a requirement") for n in machine.pins if n not in named and n != "torch"]
    wrong = [f"{finding.name}: {finding.detail}" for finding in rest if finding.status != "ok"]
    detail = "; ".join(wrong) or f"{len(rest)} as pinned"
    return [*findings, at_least("other packages", not wrong, True, detail, INSTALL)]


def check_apex(machine: Machine) -> list[Finding]:
    status = detect_apex()
    if status.fused_rms_norm and status.fused_adam:
        return [Finding("NVIDIA apex", "ok", f"{status.reason}: usable for model.norm_impl and optimizer.impl")]
    advice = "optional (the fused kernels of model.norm_impl=apex, optimizer.impl=apex): see requirements-cluster.txt"
    if status.found and not status.is_nvidia:
        advice = f"pip uninstall apex, unless something else needs it; {advice}"
    return [Finding("NVIDIA apex", "warn" if status.found else "missing", status.reason, advice)]


def check_torch(machine: Machine) -> list[Finding]:
    package = package_finding("torch", machine.pins, "everything")
    if package.status == "missing":
        return [package]
    return torch_findings(run_probe("torch"), machine.pins.get("torch", ""), shutil.which("nvidia-smi") is not None)


def torch_findings(probe: Mapping[str, Any], pinned: str, has_driver: bool) -> list[Finding]:
    """torch, its GPUs and its communication, from what the probe saw."""
    if "error" in probe:
        advice = "try `python -c 'import torch'`; a first import can be slow on a network filesystem: run doctor again"
        return [Finding("torch", "warn", f"could not be asked: {probe['error']}", advice)]
    build = f"CUDA {probe['cuda']} build" if probe["cuda"] else "CPU build"
    low, high = SUPPORTED_TORCH
    supported = low <= tuple(map(int, re.findall(r"\d+", probe["version"])[:2])) <= high
    advice = f"supported are {low[0]}.{low[1]} to {high[0]}.{high[1]}: pip install torch=={pinned}"
    findings = [at_least("torch", supported, True, f"{probe['version']}, {build}", advice)]
    if probe["devices"]:
        kinds = {f"{name} ({memory / GIB:.0f} GiB)" for name, memory in probe["devices"]}
        findings.append(Finding("GPUs", "ok", f"{len(probe['devices'])} x {', '.join(sorted(kinds))}"))
    else:
        advice = "the CPU is enough for the quickstart; to train a large model use a node with NVIDIA GPUs"
        if has_driver and probe["cuda"]:
            advice = "check `nvidia-smi`, CUDA_VISIBLE_DEVICES and the Slurm allocation (--gpus)"
        elif has_driver:
            advice = "this node has an NVIDIA driver: install the CUDA build of torch (pytorch.org, Get started)"
        findings.append(Finding("GPUs", "missing", "torch sees none", advice))
    without_nccl = Finding("NCCL", "missing", "not in this torch", "needed on GPUs only; CUDA builds have it")
    findings.append(Finding("NCCL", "ok", probe["nccl"]) if probe["nccl"] else without_nccl)
    advice = "set GLOO_SOCKET_IFNAME to a network interface (`ip -br addr`), or let the host's own name resolve"
    error = probe.get("gloo_error", "")
    return [*findings, at_least("gloo", not error, True, error or "a process group starts", advice)]


def check_deepspeed_ops(machine: Machine) -> list[Finding]:
    probe = run_probe("deepspeed")
    if "error" in probe:
        advice = "try `python -m deepspeed.env_report`; a first import can be slow: run doctor again"
        return [Finding("DeepSpeed ops", "warn", f"could not be asked: {probe['error']}", advice)]
    compiled, compatible = (", ".join(probe[key]) or "none" for key in ("compiled", "compatible"))
    tools = [tool for tool in ("ninja", "g++") if shutil.which(tool) is None]
    detail = f"compiled: {compiled}; this machine could compile: {compatible}"
    lacks = f" (but lacks {', '.join(tools)})" if tools else ""
    return [Finding("DeepSpeed ops", "ok", f"{detail}{lacks}; none is needed by default")]


def check_tracking_store(machine: Machine) -> list[Finding]:
    folder = machine.folder.resolve()
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder, ignore_cleanup_errors=True) as scratch:
            probe = run_probe("sqlite", scratch)
    except OSError as error:
        probe = {"error": one_line(error)}
    if probe.get("rows") == 1:
        return [Finding("tracking store", "ok", f"an SQLite store can be written in {folder}")]
    advice = "choose a run.dir that you can write to and that has file locks, or set tracking.uri to an MLflow server"
    return [Finding("tracking store", "warn", f"no SQLite store in {folder}: {probe['error']}", advice)]


def check_gpu_links(machine: Machine) -> list[Finding]:
    if shutil.which("nvidia-smi") is None:
        return []  # without GPUs there is nothing to connect; check_torch says that there are none
    text, error = command_output(["nvidia-smi", "topo", "-m"])
    kinds = link_kinds(text)
    detail = ", ".join(f"{kind} between {count} pair{'s' * (count > 1)}" for kind, count in sorted(kinds.items()))
    if error and not kinds:
        return [Finding("GPU links", "warn", f"nvidia-smi topo -m: {error}", "check the driver with `nvidia-smi`")]
    if all(kind.startswith("NV") for kind in kinds):
        return [Finding("GPU links", "ok", detail or "one GPU, nothing to link")]
    return [Finding("GPU links", "warn", detail, "not all NVLink: tensor parallelism is slow, try parallel.tensor=1")]


def check_infiniband(machine: Machine) -> list[Finding]:
    active: list[str] = []
    other: list[str] = []
    for port in sorted(machine.root.glob("sys/class/infiniband/*/ports/*")):
        state = _read(port / "state")
        port_list = active if "ACTIVE" in state else other
        port_list.append(f"{port.parts[-3]} port {port.name} ({_read(port / 'rate')}, {state})")
    if active:
        return [Finding("InfiniBand", "ok", ", ".join(active))]
    advice = "needed between nodes only; without it NCCL uses Ethernet"
    if other:
        return [Finding("InfiniBand", "warn", f"no port is active: {', '.join(other)}", f"see `ibstat`; {advice}")]
    return [Finding("InfiniBand", "missing", "no device", advice)]


def check_slurm(machine: Machine) -> list[Finding]:
    absent = [command for command in SLURM_COMMANDS if shutil.which(command) is None]
    if absent:
        advice = "needed for sbatch launchers only: log in to a Slurm node, or start ranks with torchrun"
        return [Finding("Slurm", "missing", f"no {', '.join(absent)}", advice)]
    version, _ = command_output(["sbatch", "--version"])
    text, error = command_output(["sinfo", "--noheader", "--format=%P %D %T"])
    if error:
        advice = "the commands are here but the controller does not answer: see `scontrol ping`"
        return [Finding("Slurm", "warn", f"{version.strip()}; sinfo: {error}", advice)]
    partitions = "; ".join(" ".join(line.split()) for line in text.splitlines()[:6])
    return [Finding("Slurm", "ok", f"{version.strip()}; partition, nodes, state: {partitions or 'none'}")]


def check_disk(machine: Machine) -> list[Finding]:
    free = shutil.disk_usage(machine.folder).free
    advice = "a checkpoint takes 12 bytes per parameter, token shards 2 to 4 bytes per token: use a larger run.dir"
    return [at_least("disk", free, 20 * GIB, f"{free / GIB:.0f} GiB free in {machine.folder.resolve()}", advice)]


def check_memory(machine: Machine) -> list[Finding]:
    memory = {k: int(v) * 1024 for k, v in re.findall(r"(\w+):\s+(\d+) kB", _read(machine.root / "proc/meminfo"))}
    total, available = memory["MemTotal"], memory["MemAvailable"]
    detail = f"{total / GIB:.0f} GiB, {available / GIB:.0f} GiB available"
    limit = _read(machine.root / "sys/fs/cgroup/memory.max")
    if limit.isdigit() and int(limit) < total:
        available = min(available, int(limit))
        detail += f", limited to {int(limit) / GIB:.0f} GiB here"
    return [at_least("RAM", available, 4 * GIB, detail, "even the quickstart wants 4 GiB: ask for more memory")]


def check_limits(machine: Machine) -> list[Finding]:
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    shared = shutil.disk_usage(machine.root / "dev/shm").free
    soft, hard = (sys.maxsize if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    few = "loading and training share the core: set data.workers=0, or ask Slurm for --cpus-per-task"
    small = "loader workers hand batches over through it: docker run --shm-size=8g, or data.workers=0"
    return [
        at_least("CPU cores", usable, 2, f"{usable} usable of {total}", few),
        at_least("/dev/shm", shared, GIB, f"{shared / GIB:.1f} GiB free", small),
        at_least("open files", soft, 4096, f"limit {soft}", f"ulimit -n {min(hard, 65536)} before the start"),
    ]
