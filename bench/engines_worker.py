"""One rank of the engine benchmark: python -m bench.engines_worker TASK.json FOLDER [--turns].

It builds one contender, trains it, and writes FOLDER/RANK.json. With --turns it takes one step for every line on its standard
input instead, and answers each with a line, so that several contenders can take turns on one machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench import engines_cases as cases
from bench import step_trace
from bench.comm_counter import CommCounter
from bench.timing import synchronize
from parallel.engine import LossOutput, Microbatch, StepResult, model_inputs
from parallel.engines import build_engine
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh, leave
from pretrain.metrics import sum_over_ranks
from pretrain.model import build_chunks, model_shape

WARM_UP = 2  # steps: buckets are laid out and pools filled in them
ANSWER = "answer "  # begins the lines of --turns; libraries print too


class PlainTrainer:
    """The yardstick, torch alone: DistributedDataParallel where there are several ranks, clipping, AdamW; nothing is sharded."""

    def __init__(self, model: nn.Module, mesh: Mesh):
        self.mesh = mesh
        model.to(mesh.device)
        self.parameters = list(model.parameters())
        self.model: Any = model
        if mesh.dp > 1:
            self.model = DistributedDataParallel(
                model, process_group=mesh.dp_group, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": cases.ADAMW.weight_decay},
            {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        fused = mesh.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, betas=cases.ADAMW.betas, eps=cases.ADAMW.eps, fused=fused)

    def train_step(self, microbatches: list[Microbatch], normalizer: float, lr: float) -> StepResult:
        denominator = torch.tensor(normalizer, dtype=torch.float64, device=self.mesh.device)
        outputs = []
        for microbatch in microbatches:
            alone = self.mesh.dp == 1 or microbatch is microbatches[-1]
            with contextlib.nullcontext() if alone else self.model.no_sync():
                output = self.model(**model_inputs(microbatch, self.mesh.device, denominator))
                (output.loss * self.mesh.dp).backward()  # DistributedDataParallel takes the mean over ranks
            outputs.append(LossOutput(*(x.detach() for x in output)))
        # In float64, as the engines: a float32 sum over millions of squares is off in the fourth digit on a CPU.
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
        norm = float(torch.stack(norms).norm())
        torch._foreach_mul_(gradients, min(1.0, cases.CLIP / (norm + 1e-6)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(outputs, norm, True)


class Memory:
    """Resident memory of this process (on a GPU: what is allocated on it), in bytes; None where nobody tells."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def now(self) -> int | None:
        return torch.cuda.memory_allocated() if self.cuda else self._read("VmRSS")

    def start(self) -> None:
        """The peak begins here. What was freed goes back to the system first."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.cuda else self._read("VmHWM")

    @staticmethod
    def _read(field: str) -> int | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Rank:
    """One contender on this rank, built and warmed up. idle: memory before the model was made."""

    def __init__(self, task: dict[str, Any]):
        self.sizes = cases.sizes_from(task["sizes"])
        layout = Layout(**task["layout"] | {"layers_per_stage": ()})
        self.mesh = build_mesh(layout.tensor, layout.pipeline, layout.shard_group, task["timeout_seconds"])
        if not task["plain"]:
            _import_engine(layout.engine)
        dist.barrier()
        self.memory = Memory(self.mesh.device)
        self.memory.start()
        self.idle = self.memory.now()
        self.microbatches, self.normalizer = cases.microbatches(self.sizes, self.mesh)
        model = self.sizes.model
        chunks = build_chunks(model, self.mesh, layout, cases.SEED)
        if task["traced"]:
            for chunk in chunks:
                step_trace.mark_model(chunk)
        self.trainer: Any
        if task["plain"]:
            self.trainer = PlainTrainer(chunks[0], self.mesh)
        else:
            self.trainer = build_engine(
                chunks,
                model_shape(model),
                self.mesh,
                layout,
                optimizer=cases.ADAMW,
                micro_batch_size=self.sizes.micro_batch,
                accumulation=len(self.microbatches),
                sequence_length=self.sizes.sequence,
                grad_clip=cases.CLIP,
                bf16=False,
            )
        del chunks
        self.built = self.memory.peak()
        self.memory.start()
        for _ in range(WARM_UP):
            self.step()

    def step(self) -> StepResult:
        result = self.trainer.train_step(self.microbatches, self.normalizer, cases.RATE)
        synchronize(self.mesh.device.type)
        return result

    def timed_step(self) -> dict[str, float]:
        """Seconds of one step on this rank: wall, and cpu of all its threads; the global loss and gradient norm."""
        if self.mesh.world_size > 1:
            dist.barrier()
        synchronize(self.mesh.device.type)
        began, cpu_began = time.perf_counter(), time.process_time()
        result = self.step()
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        local = torch.stack([output.loss.double() for output in result.outputs]).sum().reshape(1)
        loss = float(sum_over_ranks(local, self.mesh))
        return {"wall": wall, "cpu": cpu, "loss": loss, "norm": float(result.grad_norm)}

    def measure(self, traced: bool) -> dict[str, Any]:
        """The timed steps; then one step whose collectives are counted, and one that is traced."""
        steps = [self.timed_step() for _ in range(self.sizes.steps)]
        peak = self.memory.peak()
        with CommCounter() as counter:
            self.step()
        found: dict[str, Any] = {
            "steps": steps,
            "volumes": {kind: asdict(volume) for kind, volume in counter.volumes.items()},
            "idle_bytes": self.idle,
            "build_peak_bytes": self.built,
            "peak_bytes": peak,
        }
        if traced and step_trace.supported():
            found["trace"] = asdict(step_trace.trace_step(self.step))
        return found


def _import_engine(engine: str) -> None:
    """So that its modules count as idle memory."""
    if engine == "fsdp2":
        import parallel.engine_fsdp2  # noqa: F401
    else:
        from parallel.engine_deepspeed import import_deepspeed

        import_deepspeed()


def _take_turns(rank: Rank) -> None:
    print(f"{ANSWER}{{}}", flush=True)
    for _ in sys.stdin:
        print(f"{ANSWER}{json.dumps(rank.timed_step())}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    task = json.loads(Path(sys.argv[1]).read_text())
    rank = Rank(task)
    if "--turns" in sys.argv:
        _take_turns(rank)
    else:
        found = rank.measure(task["traced"])
        (Path(sys.argv[2]) / f"{rank.mesh.rank}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
