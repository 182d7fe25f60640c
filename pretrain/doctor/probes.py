"""What other programs say about this machine: a command with a time limit, and probes in a child process.

An import of torch or deepspeed may be slow, hang or crash, and so may a lock on a network filesystem; in a child process
each costs the report one line only. `python -m pretrain.doctor.probes NAME ARGUMENT` runs one probe.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND_SECONDS = 9.0  # less than a check has (doctor.CHECK_SECONDS), so that the check can say what hung
REPOSITORY = Path(__file__).resolve().parents[2]
_MARK = "doctor-answer: "


def one_line(error: BaseException) -> str:
    """The kind of an error and its message without line breaks, at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def command_output(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[str, str]:
    """(standard output, error): the error is empty if the command ended with 0 within COMMAND_SECONDS."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer in {COMMAND_SECONDS:g} s"
    except OSError as error:
        return "", one_line(error)
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.stdout, last if done.returncode else ""


def link_kinds(topology: str) -> dict[str, int]:
    """GPU pairs per kind of link (NV18, PIX, PHB, NODE, SYS, ...) in the output of `nvidia-smi topo -m`."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines()
    rows = [cells for cells in map(str.split, lines) if cells and re.match(r"GPU\d", cells[0]) and "X" in cells]
    return Counter(cell for i, cells in enumerate(rows) for cell in cells[i + 2 : len(rows) + 1])


def run_probe(name: str, argument: str = "") -> dict[str, Any]:
    """The dict that `_PROBES[name](argument)` gives in a child process; {"error": one line} if it dies or hangs."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    if shutil.which("nvidia-smi") is None and not Path("/dev/nvidiactl").exists():
        environment["DS_ACCELERATOR"] = "cpu"
    text, error = command_output([sys.executable, "-m", "pretrain.doctor.probes", name, argument], environment)
    answers = [line for line in text.splitlines() if line.startswith(_MARK)]
    return json.loads(answers[-1][len(_MARK) :]) if answers else {"error": error or "it ended without an answer"}


def _answer(name: str, argument: str) -> None:
    try:
        found = _PROBES[name](argument)
    except Exception as error:
        found = {"error": one_line(error)}
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
        found["gloo_error"] = one_line(error)
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

if __name__ == "__main__":
    _answer(*sys.argv[1:])
