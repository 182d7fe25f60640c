"""Saves that go wrong, in forked ranks over gloo: python -m tests.parallel.checkpoint_faults FOLDER SUITE -> FOLDER/SUITE.json.

A forked rank counts every change it makes to the file system, every fsync and every tenth write, and can kill itself with SIGKILL
just before one of them. What is left is judged here, by the product's own reading: bit-equal values, a next save that works.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist

from parallel import checkpoint, checkpoint_writer
from parallel.async_save import AsyncSaver
from parallel.boxes import Boxes
from parallel.errors import CheckpointError

SHAPES = {"weight/a": (6, 5), "exp_avg/a": (6, 5), "weight/norm": (4,)}
HANG_SECONDS = 40
GLOO_SECONDS = 15


def values(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def share(tensors: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, Boxes]:
    """Matrices are cut by rows; the vector is held by every rank alike."""
    state = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            state[name] = Boxes(tensor.shape, [((0,), tensor)])
        else:
            rows = tensor.shape[0] // world
            state[name] = Boxes(tensor.shape, [((rank * rows, 0), tensor[rank * rows : (rank + 1) * rows])])
    return state


class Killer:
    """Ends this process before its `point`-th change of the file system (0 = never); counts them."""

    def __init__(self, point: int):
        self.seen, self.point, self.writes = 0, point, 0
        write, fsync = checkpoint_writer.HashedFile.write, os.fsync

        def counted_write(file, data):
            self.writes += 1
            if self.writes % 10 == 1:  # the serialiser writes some thirty times for each box
                self.tick()
            return write(file, data)

        def counted_fsync(descriptor):
            self.tick()
            return fsync(descriptor)

        checkpoint_writer.HashedFile.write = counted_write
        os.fsync = counted_fsync
        sys.addaudithook(self.hook)

    def hook(self, event: str, details: tuple) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            self.tick()

    def tick(self) -> None:
        self.seen += 1
        if self.seen == self.point:
            os.kill(os.getpid(), signal.SIGKILL)


def save(
    root: Path, step: int, tensors: dict, rank: int, world: int, saver: Optional[AsyncSaver], keep: int = 2
) -> None:
    state = share(tensors, rank, world)
    if saver is None:
        checkpoint.save(root, step, state, {"note": step}, keep)
        return
    saver.start(root, step, state, {"note": step}, keep)
    for tensor in tensors.values():  # training goes on
        tensor.fill_(float("nan"))
    saver.wait()


class Ranks:
    """`world` forked ranks in one gloo group, each running body(rank) and leaving {"error": ..., ...} in a file."""

    def __init__(self, folder: Path, world: int, body: Callable[[int], Optional[dict]]):
        self.folder = folder
        folder.mkdir(parents=True)
        self.children = [self._fork(rank, world, body) for rank in range(world)]

    def _fork(self, rank: int, world: int, body: Callable[[int], Optional[dict]]) -> int:
        child = os.fork()
        if child:
            return child
        code = 9
        try:
            if world > 1:
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(str(self.folder / "store"), world),
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=GLOO_SECONDS),
                )
                dist.barrier()  # as in training, the ranks have met before they save
            told = body(rank) or {}
            (self.folder / f"told-{rank}.json").write_text(json.dumps(told))
            code = 0
        except CheckpointError as error:
            (self.folder / f"told-{rank}.json").write_text(json.dumps({"refused": str(error)}))
            code = 4
        except RuntimeError as error:
            (self.folder / f"told-{rank}.json").write_text(json.dumps({"crashed": str(error)}))
            code = 3
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self, all_die_with_the_first: bool = False) -> list[int]:
        """Exit codes in rank order, -9 for a killed rank, 99 for one that hung."""
        codes: dict[int, int] = {}
        deadline = time.monotonic() + HANG_SECONDS
        while len(codes) < len(self.children):
            for rank, child in enumerate(self.children):
                if rank in codes:
                    continue
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    if codes[rank] == -9 and all_die_with_the_first:
                        for other in set(range(len(self.children))) - set(codes):
                            os.kill(self.children[other], signal.SIGKILL)
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[rank] = 99
            time.sleep(0.002)
        return [codes[rank] for rank in range(len(self.children))]

    def told(self, rank: int) -> dict:
        file = self.folder / f"told-{rank}.json"
        return json.loads(file.read_text()) if file.exists() else {}


def loads(path: Path, step: int) -> bool:
    found = {name: torch.full(shape, float("nan")) for name, shape in SHAPES.items()}
    checkpoint.load(path, share(found, 0, 1))
    return all(torch.equal(found[name], tensor) for name, tensor in values(step).items())


def kill_everywhere(folder: Path, world: int, asynchronous: bool, victims: set[int], again: bool) -> dict:
    """Saves step 4 over checkpoints of 2 and 3 (`again`: step 3 anew over an only checkpoint, of step 3), killed at every point.

    Returns the points walked, the newest step (or, for `again`, which version of it) after each, and what went wrong.
    """
    template = folder / "template"
    for step in (3,) if again else (2, 3):
        checkpoint.save(template, step, share(values(step), 0, 1), {})
    target, new = (3, 7) if again else (4, 4)
    newest, wrong, codes, point = [], [], [], 0
    while True:
        point += 1
        root = folder / f"root-{point}"
        shutil.copytree(template, root)

        def body(rank: int, point: int = point, root: Path = root) -> None:
            saver = AsyncSaver(GLOO_SECONDS) if asynchronous else None
            tensors = values(new)
            Killer(point if rank in victims else 0)
            save(root, target, tensors, rank, world, saver)

        ranks = Ranks(folder / f"ranks-{point}", world, body)
        codes.append(ranks.wait(all_die_with_the_first=len(victims) == world > 1))
        with contextlib.suppress(StopIteration):
            found = checkpoint.latest(root)
            if found is None:
                wrong.append(f"point {point}: no checkpoint is left")
            elif again:
                newest.append(next(version for version in (3, 7) if loads(found, version)))
            else:
                newest.append(checkpoint.read_trainer(found)["step"])
                if not loads(found, newest[-1]):
                    wrong.append(f"point {point}: {found} has other values")
        if len(newest) != point:
            wrong.append(f"point {point}: what is left does not hold what was saved")
            break
        checkpoint.save(root, 5, share(values(5), 0, 1), {}, keep=1)
        left = sorted(p.name for p in root.iterdir())
        if left != ["latest", "step-00000005"] or not loads(root / "step-00000005", 5):
            wrong.append(f"point {point}: after the next save there is {left}")
        shutil.rmtree(root)
        if -9 not in codes[-1]:
            break
    survivors = sorted({code for line in codes[:-1] for rank, code in enumerate(line) if rank not in victims})
    return {"points": point, "newest": newest, "wrong": wrong, "survivors": survivors, "last": codes[-1]}


def full_disk(folder: Path, asynchronous: bool, poor: int) -> dict:
    """Two ranks, one of which cannot write more than 64 KiB; then it can again."""
    root = folder / "root"
    checkpoint.save(root, 3, share(values(3), 0, 1), {})

    def body(rank: int) -> dict:
        saver = AsyncSaver(GLOO_SECONDS) if asynchronous else None
        big = {"weight/a": torch.randn(64, 1024), "weight/b": torch.randn(64, 1024)}
        if rank == poor:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        try:
            save(root, 4, big, rank, 2, saver)
            said = "nothing"
        except CheckpointError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        dist.barrier()
        left = sorted(p.name for p in root.iterdir())
        kept = loads_alone(root / "step-00000003")
        dist.barrier()
        save(root, 5, values(5), rank, 2, saver)
        return {"said": said, "left": left, "kept": kept}

    ranks = Ranks(folder / "ranks", 2, body)
    codes = ranks.wait()
    return {"codes": codes, "told": [ranks.told(r) for r in (0, 1)], "next": loads(root / "step-00000005", 5)}


def loads_alone(path: Path) -> bool:
    """Whether the values are those of step 3, read without the process group that this rank is in."""
    import torch.distributed.checkpoint as dcp

    from parallel.boxes import BoxLoadPlanner
    from parallel.checkpoint_reader import Reader

    found = {name: torch.full(shape, float("nan")) for name, shape in SHAPES.items()}
    dcp.load(share(found, 0, 1), storage_reader=Reader(str(path)), planner=BoxLoadPlanner(), no_dist=True)
    return all(torch.equal(found[name], tensor) for name, tensor in values(3).items())


def other_mishaps(folder: Path) -> dict:
    """No room as rank 0 sees it; a folder that the ranks do not share; ranks that see another checkpoint when they load."""
    root = folder / "root"
    checkpoint.save(root, 3, share(values(3), 0, 1), {})

    def body(rank: int) -> dict:
        told = {}

        def refusal(name: str, action: Callable[[], object]) -> None:
            try:
                action()
                told[name] = "nothing"
            except CheckpointError as error:
                told[name] = str(error)
            dist.barrier()

        real = shutil.disk_usage
        shutil.disk_usage = lambda path: real(path)._replace(free=checkpoint_writer.SPARE + 100)
        refusal("room", lambda: save(root, 4, values(4), rank, 2, None))
        told["left"] = sorted(p.name for p in root.iterdir())
        saver = AsyncSaver(GLOO_SECONDS)
        saver.start(root, 4, share(values(4), rank, 2), {})
        refusal("room behind", lambda: saver.start(root, 6, share(values(6), rank, 2), {}))
        shutil.disk_usage = real
        told["waits once"] = saver.wait() is None
        refusal("not shared", lambda: save(folder / f"own-{rank}", 4, values(4), rank, 2, None))
        if rank == 1:
            (folder / "broken").mkdir()
        dist.barrier()
        path = root / "step-00000003" if rank == 0 else folder / "broken"
        found = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        refusal("load", lambda: checkpoint.load(path, share(found, rank, 2)))
        told["untouched"] = all(not tensor.any() for tensor in found.values())
        checkpoint.load(root / "step-00000003", share(found, rank, 2))
        half = share(found, rank, 2)["weight/a"].parts[0][1]
        told["loaded"] = torch.equal(half, share(values(3), rank, 2)["weight/a"].parts[0][1])
        return told

    ranks = Ranks(folder / "ranks", 2, body)
    return {"codes": ranks.wait(), "told": [ranks.told(r) for r in (0, 1)]}


def main() -> None:
    torch.set_num_threads(1)
    folder, suite = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}
    if suite == "alone":
        for asynchronous in (False, True):
            for again in (False, True):
                name = f"{'async' if asynchronous else 'sync'}{' again' if again else ''}"
                results[name] = kill_everywhere(folder / name, 1, asynchronous, {0}, again)
    elif suite == "pair":
        for asynchronous in (False, True):
            for victims in ({0}, {1}, {0, 1}):
                name = f"{'async' if asynchronous else 'sync'} {sorted(victims)}"
                results[name] = kill_everywhere(folder / name, 2, asynchronous, victims, again=False)
    else:
        for asynchronous in (False, True):
            for poor in (0, 1):
                name = f"{'async' if asynchronous else 'sync'} {poor}"
                results[name] = full_disk(folder / name, asynchronous, poor)
        results["mishaps"] = other_mishaps(folder / "mishaps")
    (folder / f"{suite}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
