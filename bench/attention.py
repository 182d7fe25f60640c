"""Side by side: ways to keep the documents of a packed sample apart in attention, forward and backward.

    python bench/attention.py                      # CPU: 1 x 4096 tokens, 4 heads of 64, float32, one thread
    python bench/attention.py --device cuda        # 4 x 4096 tokens, 32 heads of 128, bfloat16

One table for each mean length of a document (--documents). Every row attends with the same queries, keys and values; `off` is how
far its output is from the mask's. Full attention lets all documents see each other: it is the yardstick, and what a sample of
one document costs. `plan` is done once a microbatch, the rest in every layer.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.tables import Table  # noqa: E402
from bench.timing import PeakMemory, time_phases  # noqa: E402
from parallel.attention import Documents, attention, find_documents, varlen_works  # noqa: E402

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"samples": 1, "heads": 4, "kv_heads": 4, "head_dim": 64, "dtype": "float32", "repeats": 3},
    "cuda": {"samples": 4, "heads": 32, "kv_heads": 32, "head_dim": 128, "dtype": "bfloat16", "repeats": 10},
}
COLUMNS = ("plan ms", "forward ms", "backward ms", "x full, forward", "x full, both", "peak GiB", "off")
FULL, MASK, BOUNDS = "full attention", "one mask for all layers", "the product's choice: by bounds"
FLEX, FLEX_COMPILED = "flex_attention, not compiled", "flex_attention, compiled"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def packed_ids(samples: int, tokens: int, mean: int, seed: int = 0) -> Tensor:
    """[samples, tokens] int32 document ids; lengths are uniform from half the mean to one and a half of it."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(samples):
        lengths = torch.randint(max(1, mean // 2), mean + mean // 2 + 1, (2 * tokens // mean + 2,), generator=generator)
        rows.append(torch.arange(len(lengths)).repeat_interleave(lengths)[:tokens])
    return torch.stack(rows).int()


def plans(ids: Tensor, device: torch.device) -> dict[str, Callable[[], Attend]]:
    """Label -> what is done once a microbatch; it gives what is done in every layer."""

    def found() -> Documents:
        documents = find_documents(ids, device)
        assert documents is not None and documents.bounds is not None, "one document a sample: nothing to keep apart"
        return documents

    def by(isolation: Any) -> Attend:
        return lambda q, k, v: attention(q, k, v, isolation)

    def flex(kernel: Callable) -> Attend:
        on_device = ids.to(device)
        samples, tokens = ids.shape
        block_mask = create_block_mask(
            lambda b, h, i, j: on_device[b, i] == on_device[b, j], samples, None, tokens, tokens, device=str(device)
        )
        return lambda q, k, v: kernel(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])

    compiled = torch.compile(flex_attention, dynamic=False)
    return {
        FULL: lambda: by(None),
        MASK: lambda: by(found().mask()),
        BOUNDS: lambda: by(found()),
        FLEX: lambda: flex(flex_attention),
        FLEX_COMPILED: lambda: flex(compiled),
    }


def measure(options: argparse.Namespace, plan: Callable[[], Attend], given: list[Tensor]) -> tuple[dict, list, Tensor]:
    """(cells, median seconds of forward and, if the inputs need gradients, backward, the output) of one way."""
    held: dict[str, Any] = {}
    upstream = torch.ones_like(given[0])

    def planned() -> None:
        held["attend"] = plan()

    def forward() -> None:
        held["out"] = held["attend"](*given)

    def backward() -> None:
        torch.autograd.grad(held["out"], given, upstream)

    memory = PeakMemory(options.device)
    planned(), forward()
    memory.start()
    phases = (planned, forward, backward) if given[0].requires_grad else (planned, forward)
    *times, _ = time_phases(phases, options.device, options.repeats, warmup=1)
    cells = {name: timing.cell() for name, timing in zip(COLUMNS, times)}
    return cells | {"peak GiB": memory.extra()}, [timing.median for timing in times[1:]], held["out"].detach()


def table_for(options: argparse.Namespace, mean: int) -> Table:
    """All ways at one mean document length."""
    device = torch.device(options.device)
    ids = packed_ids(options.samples, options.tokens, mean)
    lengths = torch.cat([row.unique_consecutive(return_counts=True)[1] for row in ids])
    ways = plans(ids, device)
    table = Table.planned(
        f"documents.{mean}",
        f"{options.samples} x {options.tokens} tokens, {options.heads} heads ({options.kv_heads} key/value) of "
        f"{options.head_dim}, {options.dtype}: {len(lengths)} documents, mean {lengths.float().mean():.0f} tokens, longest "
        f"{int(lengths.max())}",
        COLUMNS,
        list(ways),
        f"attention scores that count: {float((lengths.double() ** 2).sum()) / options.samples / options.tokens**2:.1%} of "
        "full attention's.",
    )
    generator = torch.Generator().manual_seed(1)
    shapes = [(options.samples, options.tokens, n, options.head_dim) for n in (options.heads, *[options.kv_heads] * 2)]
    dtype = getattr(torch, options.dtype)
    given = [torch.randn(s, generator=generator).to(device, dtype).transpose(1, 2).requires_grad_() for s in shapes]
    if device.type == "cuda" and not varlen_works(device, dtype, options.head_dim):
        table.refuse(BOUNDS, "not run: varlen_attn does not work here; the product uses the mask")
        ways.pop(BOUNDS)
    with torch.no_grad():
        truth = ways[MASK]()(*given).double()
    full: list[float] = []
    for label, plan in ways.items():
        if label == FLEX and options.samples * options.heads * options.tokens**2 * 4 > options.score_bytes:
            table.refuse(label, "not run: it would hold all scores, more than --score-bytes")
            continue
        forward_only = label in (FLEX, FLEX_COMPILED) and device.type == "cpu"  # it has no backward there
        try:
            cells, seconds, out = measure(options, plan, [x.detach() for x in given] if forward_only else given)
        except Exception as error:  # a rival that this machine cannot run
            table.refuse(label, f"not run: {type(error).__name__}: {' '.join(str(error).split())[:80]}")
            continue
        full = full or seconds
        cells["x full, forward"] = seconds[0] / full[0]
        cells["x full, both"] = None if forward_only else sum(seconds) / sum(full)
        cells["off"] = None if label == FULL else float((out.double() - truth).norm() / truth.norm())
        table.fill(label, cells)
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, nargs="+", default=[500, 50], help="mean tokens of a document")
    for name in ("samples", "heads", "kv-heads", "head-dim", "repeats"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--score-bytes", type=float, default=4e9, help="most that rows which hold all scores may hold")
    options = parser.parse_args()
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> int:
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: this machine has no GPU that PyTorch can use; leave it out for the CPU", file=sys.stderr)
        return 2
    if not all(1 <= mean <= options.tokens // 2 for mean in options.documents):
        print(f"--documents: mean lengths from 1 to {options.tokens // 2}, half of --tokens", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"{where}, torch {torch.__version__}\n")
    for mean in options.documents:
        print(table_for(options, mean).markdown(), "\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
