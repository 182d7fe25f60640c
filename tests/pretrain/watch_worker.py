"""One rank under a watch: python -m tests.pretrain.watch_worker watch train --config FILE

The watch is the real one; the training process that it starts takes steps of one all_reduce, with heartbeats as `train` has them.
FAULTS in the environment says what goes wrong: `RANK:WHAT:STEP` each, separated by commas; with `alone` among them the ranks
take their steps without each other (and without torch, which takes seconds to import).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

from data.errors import InputError


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "watch":
        from pretrain.watching.watch import watch

        sys.exit(watch(arguments, [sys.executable, "-m", "tests.pretrain.watch_worker", *arguments]))
    train(arguments)


def train(arguments: list[str]) -> None:
    from pretrain.launch import launch_name, rank_and_world
    from pretrain.load_config import load_config
    from pretrain.watching.heartbeat import Heartbeat
    from pretrain.watching.rank_log import RankLog
    from pretrain.watching.stacks import register_stack_dump

    try:
        config = load_config(arguments)
    except InputError as error:
        sys.exit(_mistake(error))
    folder = Path(config.run.dir) / config.run.name
    rank, world = rank_and_world(os.environ)
    faults = os.environ.get("FAULTS", "").split(",")
    mine = {int(fault.split(":")[2]): fault.split(":")[1] for fault in faults if fault.startswith(f"{rank}:")}
    folder.mkdir(parents=True, exist_ok=True)
    _misbehave(mine.get(-1, ""), folder, rank)  # before anything can answer a signal
    register_stack_dump()
    heartbeat = Heartbeat(folder, rank, world, publish_seconds=config.health.beat_seconds)
    leaving: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: leaving.append(number))
    together = contextlib.nullcontext() if "alone" in faults else _meet(heartbeat)
    with RankLog(folder, rank, world, launch_name(os.environ)), together as reduced:
        for step in range(1, config.train.steps + 1):
            heartbeat.beat("step", step, "train_step")
            _misbehave(mine.get(step, ""), folder, rank)
            if reduced(bool(leaving)) if reduced else leaving:
                os._exit(75)
            time.sleep(0.01)
        heartbeat.beat("end", config.train.steps)
    heartbeat.close()
    os._exit(0)


@contextlib.contextmanager
def _meet(heartbeat):
    """The ranks' process group, and a failure of one of them as `train` handles it; yields whether any rank says so."""
    import torch
    import torch.distributed as dist

    from parallel.mesh import build_mesh
    from pretrain.watching.first_failure import failing_together
    from pretrain.watching.heartbeat import collective_counts

    heartbeat.beat("start", doing="meeting")
    mesh = build_mesh(timeout_seconds=120)
    heartbeat.collectives = collective_counts(mesh)

    def any_rank(mine: bool) -> bool:
        total = torch.tensor(float(mine))
        dist.all_reduce(total)
        return bool(total)

    with failing_together(mesh):
        yield any_rank


def _mistake(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _misbehave(what: str, folder: Path, rank: int) -> None:
    if what == "sleep":
        time.sleep(300)
    elif what == "hold":  # native code that never comes back and keeps Python's lock: no thread of this process runs
        ctypes.PyDLL(None).sleep(300)
    elif what == "raise":
        raise ZeroDivisionError("a bug")
    elif what == "mistake":
        sys.exit(_mistake(InputError("shard-000003.tar is cut short")))
    elif what == "leave":
        os._exit(75)
    elif what == "offspring":  # a loader, and one that left the process group and whose parent is gone
        loader = get_context("forkserver").Process(target=time.sleep, args=(300,), daemon=True)
        loader.start()
        script = "import subprocess; print(subprocess.Popen(['sleep', '300'], start_new_session=True, stdout=-3, stderr=-3).pid)"
        orphan = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        (folder / f"offspring-{rank}").write_text(f"{loader.pid} {orphan}")
    elif what:
        raise ValueError(what)


if __name__ == "__main__":
    main()
