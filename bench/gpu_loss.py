"""The diffusion loss beside its rivals and its floor; the contenders are those of bench/loss.py."""

from __future__ import annotations

from argparse import Namespace

import torch

from bench.gpu_cases import NOMINAL_MATMUL
from bench.gpu_task import Work
from bench.loss import contenders, make_inputs
from bench.timing import PeakMemory, time_phases


def loss_flops(masked_rows: int, hidden: int, vocab: int) -> int:
    """The three matmuls that no implementation can do without: logits, hidden gradient, weight gradient."""
    return 6 * masked_rows * hidden * vocab


def run(work: Work) -> None:
    table, sizes = work.table("loss"), work.sizes.loss
    x = make_inputs(Namespace(device=work.device, dtype="bfloat16", **sizes))
    rows = int(x.masked.sum())
    flops, floor_seconds = loss_flops(rows, sizes["hidden"], sizes["vocab"]), None
    table.notes.insert(0, f"{rows} masked rows: the floor is {flops / 1e12:.4g} TFLOP.")
    calls = contenders(list(work.sizes.chunk_rows))
    # The floor first, ours next: they must be there if the time runs out.
    for label in sorted(table.rows, key=lambda name: (not name.startswith("floor"), not name.startswith("ours"))):
        if work.late(table, label):
            continue
        if label not in calls:
            table.refuse(label, f"not run: torch {torch.__version__} has no such function")
            continue
        with work.row(table, label) as cells:
            memory, last = PeakMemory(work.device), []

            def forget(last: list = last) -> None:
                last.clear()
                x.hidden.grad = x.weight.grad = None

            def call(label: str = label, last: list = last) -> None:
                loss = calls[label](x)
                if loss is not None:
                    loss.backward()
                    last.append(loss.detach())

            forget(), call(), forget()  # compiles
            memory.start()
            timing = time_phases((call,), work.device, work.sizes.repeats, work.deadline, before=forget)[-1]
            seconds = timing.median
            floor_seconds = seconds if label.startswith("floor") else floor_seconds
            cells |= {
                "ms": timing.cell(), "x floor": seconds / floor_seconds if floor_seconds else None,
                "x nominal floor": seconds * NOMINAL_MATMUL / flops if work.device == "cuda" else None,
                "TFLOP/s": flops / seconds, "extra MiB": memory.extra(),
                "loss": f"{float(last[-1]):.6f}" if last else None,
            }  # fmt: skip
            forget()
        if work.device == "cuda":
            torch.cuda.empty_cache()
