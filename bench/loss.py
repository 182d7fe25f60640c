"""Side by side: ways to train through the unembedding and the weighted masked cross entropy, forward and backward.

    python bench/loss.py                       # CPU: hidden 512, vocab 32768, 4096 tokens, half masked
    python bench/loss.py --device cuda         # hidden 4096, vocab 126464, 16384 tokens, half masked, bfloat16

The floor is what any implementation must do: the three matmuls of the masked rows (logits, hidden gradient, weight
gradient), timed in the same run. On a CPU every contender runs in its own process, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from parallel.loss import diffusion_loss  # noqa: E402

NOMINAL_FLOPS = 790e12  # dense bfloat16 matmul rate an H200 reaches on data of this size, FLOP/s
MIB = 1024**2
DEFAULTS = {
    "cpu": {"tokens": 4096, "hidden": 512, "vocab": 32768, "dtype": "float32", "repeats": 3, "chunk_rows": [256, 1024]},
    "cuda": {
        "tokens": 16384, "hidden": 4096, "vocab": 126464, "dtype": "bfloat16", "repeats": 10,
        "chunk_rows": [1024, 2048, 4096],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [T]
    masked: Tensor  # [T]
    loss_weight: Tensor  # [T]

    @property
    def normalizer(self) -> float:
        return float(len(self.targets))


class Figures(NamedTuple):
    """One contender: seconds (median), extra bytes at the peak, and what it computed."""

    seconds: float
    cpu_seconds: float
    extra_bytes: float
    loss: float
    hidden_norm: float
    weight_norm: float


def naive(x: Inputs) -> Tensor:
    ce = F.cross_entropy(F.linear(x.hidden, x.weight).float(), x.targets, reduction="none")
    return (ce * x.loss_weight * x.masked).sum() / x.normalizer


def masked_rows(x: Inputs) -> Tensor:
    rows = x.masked.nonzero().squeeze(1)
    ce = F.cross_entropy(F.linear(x.hidden[rows], x.weight).float(), x.targets[rows], reduction="none")
    return (ce * x.loss_weight[rows]).sum() / x.normalizer


def torch_chunked(x: Inputs) -> Tensor:
    """PyTorch's own chunked op on the masked rows; per-row weights need reduction="none", which recomputes logits."""
    rows = x.masked.nonzero().squeeze(1)
    options = torch.nn.LinearCrossEntropyOptions()
    ce = F.linear_cross_entropy(x.hidden[rows], x.weight, x.targets[rows], reduction="none", options=options)
    return (ce * x.loss_weight[rows]).sum() / x.normalizer


def ours(chunk_rows: int) -> Callable[[Inputs], Tensor]:
    def call(x: Inputs) -> Tensor:
        arguments = (x.hidden, x.weight, x.targets, x.masked, x.loss_weight, x.normalizer)
        return diffusion_loss(*arguments, vocab_size=len(x.weight), chunk_rows=chunk_rows).loss

    return call


def floor(x: Inputs) -> None:
    """The three matmuls alone, in the inputs' dtype."""
    with torch.no_grad():
        states = x.hidden[x.masked]
        logits = torch.mm(states, x.weight.t())
        torch.mm(logits, x.weight)
        torch.mm(logits.t(), states)


def contenders(chunk_rows: list[int]) -> dict[str, Callable[[Inputs], Tensor | None]]:
    table = {"floor: 3 matmuls of the masked rows": floor, "naive full logits": naive, "masked rows only": masked_rows}
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        table["torch linear_cross_entropy, masked rows"] = torch_chunked
    return table | {f"ours, chunks of {rows}": ours(rows) for rows in chunk_rows}


def make_inputs(options: argparse.Namespace) -> Inputs:
    device = options.device
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden = torch.empty(options.tokens, options.hidden, dtype=dtype, device=device).normal_(generator=generator)
    weight = torch.empty(options.vocab, options.hidden, dtype=dtype, device=device)
    weight.normal_(0, options.hidden**-0.5, generator=generator)
    targets = torch.randint(options.vocab, (options.tokens,), device=device, generator=generator)
    masked = torch.rand(options.tokens, device=device, generator=generator) < options.masked_fraction
    level = torch.full((options.tokens,), 1 / options.masked_fraction, device=device)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), targets, masked, level)


def measure(options: argparse.Namespace, contender: Callable[[Inputs], Tensor | None]) -> Figures:
    """Median over `repeats` of forward plus backward after one warm-up, which also gives the peak memory."""
    x = make_inputs(options)
    memory = _CudaMemory() if options.device == "cuda" else _ResidentMemory()
    wall, cpu, loss = [], [], None
    for repeat in range(options.repeats + 1):
        x.hidden.grad = x.weight.grad = None
        if repeat == 0:
            memory.start()
        began, cpu_began = time.perf_counter(), time.process_time()
        loss = contender(x)
        if loss is not None:
            loss.backward()
        if options.device == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
        if repeat == 0:
            extra = memory.extra()
    norms = [float("nan") if t.grad is None else float(t.grad.double().norm()) for t in (x.hidden, x.weight)]
    value = float("nan") if loss is None else float(loss)
    return Figures(statistics.median(wall[1:]), statistics.median(cpu[1:]), extra, value, *norms)


class _CudaMemory:
    def start(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def extra(self) -> float:
        return torch.cuda.max_memory_allocated() - self.before


class _ResidentMemory:
    """Peak resident memory of this process, from /proc (Linux); nan where there is none."""

    def start(self) -> None:
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # load the matmul library before counting
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        except OSError:
            pass
        self.before = self._read("VmRSS")

    def extra(self) -> float:
        return self._read("VmHWM") - self.before

    @staticmethod
    def _read(field: str) -> float:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return float("nan")
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run_alone(name: str) -> Figures:
    """This same program, measuring one contender in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return Figures(*json.loads(done.stdout.splitlines()[-1]))


def print_table(options: argparse.Namespace, figures: dict[str, Figures]) -> None:
    cuda = options.device == "cuda"
    rows = int(make_inputs(options).masked.sum())
    flops = 6 * rows * options.hidden * options.vocab
    where = torch.cuda.get_device_name() if cuda else f"CPU, {options.threads} thread(s)"
    print(f"{where}, torch {torch.__version__}, {options.dtype}; floor {flops / 1e12:.3f} TFLOP:")
    print(f"{options.tokens} tokens, {rows} masked, hidden {options.hidden}, vocab {options.vocab}")
    first = "ms" if cuda else "cpu-s"
    head = f"{'forward + backward':42s}{first:>9s}{'x floor':>9s}"
    head += f"{'x 790 TF/s':>12s}" if cuda else f"{'wall s':>9s}"
    print(f"{head}{'extra MiB':>11s}{'loss':>12s}{'|dH|':>13s}{'|dW|':>13s}")
    base = next(iter(figures.values()))
    for name, got in figures.items():
        if cuda:
            cells = f"{got.seconds * 1e3:9.2f}{got.seconds / base.seconds:9.2f}"
            cells += f"{got.seconds / (flops / NOMINAL_FLOPS):12.2f}"
        else:
            cells = f"{got.cpu_seconds:9.2f}{got.cpu_seconds / base.cpu_seconds:9.2f}{got.seconds:9.2f}"
        results = f"{got.loss:12.6f}{got.hidden_norm:13.7f}{got.weight_norm:13.7f}" if got.loss == got.loss else ""
        print(f"{name:42s}{cells}{got.extra_bytes / MIB:11.0f}{results}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--masked-fraction", type=float, default=0.5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--chunk-rows", type=int, nargs="+", help="chunk sizes of ours, one table row each")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--only", help="measure one contender and print its figures as JSON")
    options = parser.parse_args()
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    table = contenders(options.chunk_rows)
    if options.only:
        print(json.dumps(measure(options, table[options.only])))
    elif options.device == "cuda":
        figures = {}
        for name, contender in table.items():
            figures[name] = measure(options, contender)
            torch.cuda.empty_cache()
        print_table(options, figures)
    else:
        print_table(options, {name: run_alone(name) for name in table})


if __name__ == "__main__":
    main()
