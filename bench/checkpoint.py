"""Seconds and extra memory of saving a rank's state, beside torch.save of the same tensors: python bench/checkpoint.py

Each row is measured in processes of its own. The state lies in one flat buffer, as under ZeRO, and its tensors are views of
it. Extra memory is the most that is resident (VmHWM, set back through /proc/self/clear_refs) above what was before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MIB = 2**20
WAYS = ("torch.save", "save", "async save")


def resident(field: str) -> int:
    """Bytes; field: VmRSS (now) or VmHWM (the most since the last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def measure(way: str, folder: Path, rank: int, world: int, mib: int, tensors: int) -> dict[str, float]:
    """One save of `mib` MiB on this rank: seconds until training may go on and until it is complete, extra bytes."""
    import torch
    import torch.distributed as dist

    from parallel import checkpoint
    from parallel.async_save import AsyncSaver
    from parallel.boxes import Boxes

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    columns = 1024
    rows = mib * MIB // 4 // columns // tensors
    flat = torch.randn(tensors * rows * columns)
    views = {f"weight/{i}": v.view(rows, columns) for i, v in enumerate(flat.split(rows * columns))}
    state = {name: Boxes((rows * world, columns), [((rank * rows, 0), view)]) for name, view in views.items()}
    saver = AsyncSaver()
    checkpoint.save(folder / "warm", 1, {"weight/a": Boxes((world,), [((rank,), flat[:1])])}, {})
    dist.barrier()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    begun = time.perf_counter()
    if way == "torch.save":
        with open(folder / f"plain-{rank}.pt", "wb") as file:
            torch.save(views, file)
            file.flush()
            os.fsync(file.fileno())
    elif way == "save":
        checkpoint.save(folder / "checkpoints", 2, state, {})
    else:
        saver.start(folder / "checkpoints", 2, state, {})
    blocked = time.perf_counter() - begun
    saver.wait()
    dist.barrier()
    return {"blocked": blocked, "seconds": time.perf_counter() - begun, "extra": resident("VmHWM") - before}


def ranks(way: str, world: int, arguments: argparse.Namespace) -> dict[str, float]:
    """The slowest rank's seconds and the largest rank's memory."""
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    options = ["--worker", way, "--mib", str(arguments.mib), "--tensors", str(arguments.tensors)]
    try:
        children = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, *options, "--folder", str(folder), "--rank", f"{r}/{world}"],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
            for r in range(world)
        ]
        told = [json.loads(child.communicate(timeout=300)[0].splitlines()[-1]) for child in children]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {key: max(t[key] for t in told) for key in told[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=300, help="state of each rank")
    parser.add_argument("--tensors", type=int, default=24, help="tensors that the state consists of")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to write; default: the system's temporary folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rank, world = map(int, arguments.rank.split("/"))
        found = measure(arguments.worker, Path(arguments.folder), rank, world, arguments.mib, arguments.tensors)
        print(json.dumps(found), flush=True)
        os._exit(0)
    print(f"{arguments.mib} MiB a rank in {arguments.tensors} tensors; medians of {arguments.repeats}\n")
    print("| way | ranks | training waits, s | complete after, s | MB/s, all ranks | extra MiB a rank |")
    print("|---|---|---|---|---|---|")
    for world in (1, 2):
        for way in WAYS:
            runs = [ranks(way, world, arguments) for _ in range(arguments.repeats)]
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rate = world * arguments.mib * MIB / 1e6 / middle["seconds"]
            print(
                f"| {way} | {world} | {middle['blocked']:.2f} | {middle['seconds']:.2f} | {rate:.0f} "
                f"| {middle['extra'] / MIB:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
