"""A whole training step of a 1.5B model on one device: the product's engine, and a plain loop as the yardstick."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from bench.gpu_cases import micro_label
from bench.gpu_correct import random_batch
from bench.gpu_task import Work, compile_counts
from bench.timing import PeakMemory, time_phases
from parallel.engine import AdamWOptions, Microbatch, model_inputs
from parallel.engines import build_engine
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.shape import ModelShape
from pretrain.config import ModelConfig
from pretrain.flops import flops_per_token
from pretrain.model import DiffusionTransformer, model_shape

ROOT = Path(__file__).resolve().parents[1]
ADAMW, CLIP, RATE = AdamWOptions(), 1.0, 1e-4
MEMORY_SHARE = 0.95  # a micro batch predicted to need more of the device than this is not tried


class Trainer(Protocol):
    def step(self, microbatch: Microbatch, normalizer: float) -> float: ...


class EngineTrainer:
    """One of the product's engines."""

    def __init__(self, model: DiffusionTransformer, engine: str, micro_batch: int, sequence: int):
        self.engine = build_engine(
            [model],
            model.shape,
            model.head.mesh,
            Layout(engine),
            optimizer=ADAMW,
            micro_batch_size=micro_batch,
            accumulation=1,
            sequence_length=sequence,
            grad_clip=CLIP,
            bf16=True,
        )

    def step(self, microbatch: Microbatch, normalizer: float) -> float:
        """One optimizer step; returns the loss."""
        result = self.engine.train_step([microbatch], normalizer, RATE)
        if not result.applied:
            raise RuntimeError("the engine skipped the step: a gradient was not finite")
        return float(result.outputs[0].loss)


class PlainTrainer:
    """What one device needs and no more: bf16 model, fp32 master weights, clipping, torch's fused AdamW."""

    def __init__(self, model: DiffusionTransformer, device: str):
        self.model, self.device = model, torch.device(device)
        self.weights = list(model.parameters())
        self.masters = [nn.Parameter(w.detach().float()) for w in self.weights]
        model.bfloat16()
        groups = [
            {"params": [m for m in self.masters if m.dim() > 1], "weight_decay": ADAMW.weight_decay},
            {"params": [m for m in self.masters if m.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=ADAMW.betas, eps=ADAMW.eps, fused=True)

    def step(self, microbatch: Microbatch, normalizer: float) -> float:
        """One optimizer step; returns the loss."""
        denominator = torch.tensor(normalizer, dtype=torch.float64, device=self.device)
        loss = self.model(**model_inputs(microbatch, self.device, denominator)).loss
        loss.backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        norm = nn.utils.clip_grad_norm_(self.masters, CLIP, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        if not bool(norm.isfinite()):
            raise RuntimeError("a gradient was not finite")
        return float(loss.detach())


def step_shape(work: Work) -> ModelShape:
    """The shape of configs/llada_1b.yaml, or the smoke run's."""
    if work.sizes.step:
        return ModelShape(**work.sizes.step)
    import yaml

    section = yaml.safe_load((ROOT / "configs/llada_1b.yaml").read_text())["model"]
    return model_shape(ModelConfig(**section))


def build_trainer(work: Work, shape: ModelShape, engine: str, compiled: bool, micro_batch: int) -> Trainer:
    """A model with random normal weights, blocks compiled or not, inside the trainer."""
    model = DiffusionTransformer(shape, build_mesh()).to(work.device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, shape.init_std)
    if compiled:
        for block in model.blocks.values():
            block.compute = torch.compile(block._compute, backend=work.sizes.compiler)
    if engine == "plain":
        return PlainTrainer(model, work.device)
    return EngineTrainer(model, engine, micro_batch, work.sizes.step_sequence)


def predicted_peak(peaks: dict[int, int], micro_batch: int) -> float:
    """Bytes, from the line through the two largest micro batches measured; 0 with fewer than two."""
    if len(peaks) < 2:
        return 0.0
    (a, first), (b, second) = sorted(peaks.items())[-2:]
    return second + (second - first) / (b - a) * (micro_batch - b)


def _measure(work: Work, trainer: Trainer, shape: ModelShape, micro: int, cells: dict[str, Any]) -> None:
    sequence = work.sizes.step_sequence
    batch = random_batch(micro, sequence, shape.vocab_size, seed=4)
    tensors, normalizer, losses = batch.tensors(), float(batch.eligible.sum()), []

    def step() -> None:
        losses.append(trainer.step(tensors, normalizer))

    memory = PeakMemory(work.device)
    memory.start()
    began = time.perf_counter()
    step()
    cells["first step s"] = time.perf_counter() - began
    timing = time_phases((step,), work.device, work.sizes.repeats, work.deadline)[-1]
    tokens, masked = micro * sequence, float(batch.masked.sum()) / normalizer
    cells |= {
        "micro": micro, "step ms": timing.cell(), "tokens/s": tokens / timing.median,
        "MFU": work.mfu(tokens * flops_per_token(shape, sequence, masked), timing.median), "masked": masked,
        "peak GiB": memory.peak(), "loss": f"{losses[0]:.3f} -> {losses[-1]:.3f}",
    }  # fmt: skip


def run(work: Work) -> None:
    torch.manual_seed(0)
    _, engine, mode = work.task.name.split(".")
    shape, table, peaks = step_shape(work), work.table(f"step.{engine}.{mode}"), {}
    sizes = work.sizes.micro_batches
    planned = {m: micro_label(m) for m in sizes} if mode == "eager" else {work.chosen or sizes[0]: micro_label(None)}
    trainer = build_trainer(work, shape, engine, mode == "compiled", min(planned))
    capacity = torch.cuda.mem_get_info()[1] if work.device == "cuda" else float("inf")
    for micro, label in planned.items():
        if work.late(table, label):
            continue
        if (need := predicted_peak(peaks, micro)) > MEMORY_SHARE * capacity:
            table.refuse(label, f"not run: would need about {need / 2**30:.0f} of {capacity / 2**30:.0f} GiB")
            continue
        if work.device == "cuda":
            torch.cuda.empty_cache()
        with work.row(table, label) as cells:
            _measure(work, trainer, shape, micro, cells)
            if mode == "compiled":
                cells |= compile_counts()
        if table.rows[label]["status"] != "ok":  # an engine that ran out of memory in mid-step is of no more use
            table.refuse_rest("not run: a smaller micro batch already failed")
            break
        if cells["peak GiB"]:
            peaks[micro] = cells["peak GiB"]
