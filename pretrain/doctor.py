"""`doctor`: what this machine has and lacks for pretraining, and what to do about each lack.

Every check runs beside the others and has CHECK_SECONDS: one that raises or hangs (a dead network filesystem, a driver
in trouble) becomes a finding. torch and deepspeed are imported in child processes, and nothing is ever compiled.
"""
from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Literal, Mapping, Sequence

from data.errors import InputError
from parallel.apex_support import detect_apex

CHECK_SECONDS = 10.0
COMMAND_SECONDS = 9.0  # of a child process: less than its check has, so that the check can say what hung
REPOSITORY = Path(__file__).resolve().parent.parent
SUPPORTED_TORCH = ((2, 11), (2, 13))
SLURM_COMMANDS = ("sbatch", "srun", "scontrol", "sinfo")
INSTALL = "pip install -r requirements.txt"
GIB = 2**30
_MARK = "doctor-answer: "


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


Check = Callable[[Machine], Sequence[Finding]]


def pinned_versions(requirements: Path) -> dict[str, str]:
    """The `name==version` and `name[extras]==version` lines of a requirements file."""
    return dict(re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==([^\s;#]+)", _read(requirements), re.MULTILINE))


def at_least(name: str, amount: Any, enough: Any, detail: str, advice: str) -> Finding:
    """ok if `amount` >= `enough`, else a warning with `advice`."""
    return Finding(name, "ok", detail) if amount >= enough else Finding(name, "warn", detail, advice)


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
    named = {"deepspeed": "ZeRO-3; with pipeline stages exactly this version is needed",
             "megatron-core": "tensor-parallel layers", "webdataset": "data stages", "tokenizers": "text to tokens",
             "mlflow": "tracking"}
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


def run_probe(name: str, argument: str = "") -> dict[str, Any]:
    """The dict that `_PROBES[name](argument)` gives in a child process; {"error": one line} if it dies or hangs."""
    code = "import sys; from pretrain import doctor; doctor._answer(*sys.argv[1:])"
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    if shutil.which("nvidia-smi") is None and not Path("/dev/nvidiactl").exists():
        environment["DS_ACCELERATOR"] = "cpu"
    text, error = _output([sys.executable, "-c", code, name, argument], environment)
    answers = [line for line in text.splitlines() if line.startswith(_MARK)]
    return json.loads(answers[-1][len(_MARK):]) if answers else {"error": error or "it ended without an answer"}


def _answer(name: str, argument: str) -> None:
    try:
        found = _PROBES[name](argument)
    except Exception as error:
        found = {"error": _one_line(error)}
    print("\n" + _MARK + json.dumps(found), flush=True)
    os._exit(0)  # a process that used gloo may abort in the interpreter's own shutdown


def _probe_torch(_: str) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    nccl = torch.cuda.nccl.version() if torch.version.cuda and dist.is_nccl_available() else ()
    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": [[device.name, device.total_memory] for device in devices],
        "nccl": ".".join(map(str, nccl)),
    }
    try:  # a group of one: finds the interface and resolves the host's name as a real group does
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
    except Exception as error:
        found["gloo_error"] = _one_line(error)
    return found


def _probe_deepspeed(_: str) -> dict[str, Any]:
    import ctypes

    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import OpBuilder, probe_is_compatible

    # The real one compiles a small program. Loading tells as much: it raises, which counts as not compatible.
    OpBuilder.has_function = lambda self, funcname, libraries, *a, **k: [ctypes.CDLL(f"lib{n}.so") for n in libraries]
    names = [name for name in ALL_OPS if name != "deepspeed_not_implemented"]
    return {
        "compiled": [name for name in names if installed_ops.get(name)],
        "compatible": [name for name in names if probe_is_compatible(ALL_OPS[name])],
    }


def _probe_sqlite(folder: str) -> dict[str, Any]:
    import sqlite3

    connection = sqlite3.connect(Path(folder, "store.db"), timeout=2)
    connection.execute("CREATE TABLE finding (name TEXT)")
    connection.execute("INSERT INTO finding VALUES ('written')")
    connection.commit()
    return {"rows": connection.execute("SELECT count(*) FROM finding").fetchone()[0]}


_PROBES = {"torch": _probe_torch, "deepspeed": _probe_deepspeed, "sqlite": _probe_sqlite}


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
        probe = {"error": _one_line(error)}
    if probe.get("rows") == 1:
        return [Finding("tracking store", "ok", f"an SQLite store can be written in {folder}")]
    advice = "choose a run.dir that you can write to and that has file locks, or set tracking.uri to an MLflow server"
    return [Finding("tracking store", "warn", f"no SQLite store in {folder}: {probe['error']}", advice)]


def link_kinds(topology: str) -> dict[str, int]:
    """GPU pairs per kind of link (NV18, PIX, PHB, NODE, SYS, ...) in the output of `nvidia-smi topo -m`."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines()
    rows = [cells for cells in map(str.split, lines) if cells and re.match(r"GPU\d", cells[0]) and "X" in cells]
    return Counter(cell for i, cells in enumerate(rows) for cell in cells[i + 2:len(rows) + 1])


def check_gpu_links(machine: Machine) -> list[Finding]:
    if shutil.which("nvidia-smi") is None:
        return []  # without GPUs there is nothing to connect; check_torch says that there are none
    text, error = _output(["nvidia-smi", "topo", "-m"])
    kinds = link_kinds(text)
    detail = ", ".join(f"{kind} between {count} pair{'s' * (count > 1)}" for kind, count in sorted(kinds.items()))
    if error and not kinds:
        return [Finding("GPU links", "warn", f"nvidia-smi topo -m: {error}", "check the driver with `nvidia-smi`")]
    if all(kind.startswith("NV") for kind in kinds):
        return [Finding("GPU links", "ok", detail or "one GPU, nothing to link")]
    return [Finding("GPU links", "warn", detail, "not all NVLink: tensor parallelism is slow, try parallel.tensor=1")]


def check_infiniband(machine: Machine) -> list[Finding]:
    active, other = [], []
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
    version, _ = _output(["sbatch", "--version"])
    text, error = _output(["sinfo", "--noheader", "--format=%P %D %T"])
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
    return [
        at_least("CPU cores", usable, 2, f"{usable} usable of {total}",
                 "loading and training share the core: set data.workers=0, or ask Slurm for --cpus-per-task"),
        at_least("/dev/shm", shared, GIB, f"{shared / GIB:.1f} GiB free",
                 "loader workers hand batches over through it: docker run --shm-size=8g, or data.workers=0"),
        at_least("open files", soft, 4096, f"limit {soft}", f"ulimit -n {min(hard, 65536)} before the start"),
    ]


CHECKS: dict[str, Check] = {
    "Python": check_python, "torch": check_torch, "GPU links": check_gpu_links, "InfiniBand": check_infiniband,
    "packages": check_packages, "DeepSpeed ops": check_deepspeed_ops, "NVIDIA apex": check_apex, "Slurm": check_slurm,
    "tracking store": check_tracking_store, "disk": check_disk, "RAM": check_memory, "limits": check_limits,
}


def run_checks(checks: Mapping[str, Check], machine: Machine, seconds: float = CHECK_SECONDS) -> list[Finding]:
    """All findings in the order of `checks`; takes at most `seconds`, and never raises."""
    found: dict[str, Sequence[Finding]] = {}

    def run(name: str, check: Check) -> None:
        try:
            found[name] = check(machine)
        except Exception as error:
            found[name] = [Finding(name, "warn", f"the check failed: {_one_line(error)}", "the rest is not affected")]

    deadline = time.monotonic() + seconds
    # Daemon threads: one that hangs in a system call can be left behind, the process still ends.
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = "the machine may be busy or a network filesystem may hang: run doctor again"
    return [f for name in checks for f in found.get(name, [Finding(name, "warn", f"no answer in {seconds:g} s", late)])]


def run_doctor(folder: str | Path = ".") -> list[Finding]:
    """Looks at this machine, and at `folder` as the place that runs are written to; InputError if it is no folder."""
    if not Path(folder).is_dir():
        raise InputError(f"doctor: {folder} is not a folder: give an existing one (where runs will be written)")
    return run_checks(CHECKS, Machine(Path(folder), pinned_versions(REPOSITORY / "requirements.txt")))


def print_doctor(findings: Sequence[Finding]) -> None:
    """One line per finding, what to do below it; coloured on a terminal, plain in a log."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    colours = {"ok": "green", "missing": "yellow", "warn": "bold red"}
    for finding in findings:
        line = Text(f"{finding.status:<8}", style=colours[finding.status])
        console.print(line.append(f"{finding.name:<15} {finding.detail}", style="default not bold"))
        if finding.advice:
            console.print(Text(f"{'':<24}-> {finding.advice}", style="dim"))
    counts = {status: sum(f.status == status for f in findings) for status in colours}
    console.print(Text(f"\n{counts['ok']} ok, {counts['missing']} missing, {counts['warn']} to look at"))


def doctor(json_path: str | None = None, folder: str = ".") -> int:
    """Prints the findings, writes them to `json_path` as well if given, and returns 0: a report is not a failure."""
    if json_path:
        try:
            Path(json_path).touch()
        except OSError as error:
            raise InputError(f"doctor: --json {json_path}: {error.strerror}; choose another file") from None
    findings = run_doctor(folder)
    print_doctor(findings)
    if json_path:
        Path(json_path).write_text(json.dumps({"findings": [asdict(f) for f in findings]}, indent=2) + "\n")
    return 0


def _output(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[str, str]:
    """(standard output, error): the error is empty if the command ended with 0 within COMMAND_SECONDS."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace",
                              stdin=subprocess.DEVNULL, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"no answer in {COMMAND_SECONDS:g} s"
    except OSError as error:
        return "", _one_line(error)
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.stdout, last if done.returncode else ""


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
