"""Forward and backward of a stack of LLaDA-8B-shaped transformer blocks: time, MFU, which attention kernel ran."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_cases import GOAL_BLOCK_MFU, BlockCase, block_cases
from bench.gpu_task import Work, attention_backend, compile_counts, forget_compiled
from bench.timing import PeakMemory, Timing, time_phases
from parallel.attention import rotary_angles
from parallel.block import TransformerBlock
from parallel.mesh import Mesh, build_mesh
from parallel.shape import ModelShape


def block_flops(shape: ModelShape, batch: int, sequence: int) -> int:
    """Forward + backward FLOPs of all blocks: 6 x matmul parameters + 12 x hidden x sequence, per token and block."""
    h = shape.hidden_size
    key_value = shape.num_kv_heads * shape.head_dim
    matrices = 2 * h * h + 2 * h * key_value + 3 * h * shape.ffn_hidden_size
    return (6 * matrices + 12 * h * sequence) * shape.num_layers * batch * sequence


def build_blocks(shape: ModelShape, mesh: Mesh, device: str, dtype: torch.dtype) -> nn.ModuleList:
    """Blocks with random normal weights (standard deviation `init_std`) and norm gains of 1."""
    blocks = nn.ModuleList(TransformerBlock(shape, mesh) for _ in range(shape.num_layers)).to(device, dtype)
    for parameter in blocks.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, shape.init_std)
    return blocks


def through(blocks: nn.ModuleList, x_BLH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    for block in blocks:
        x_BLH = block(x_BLH, cos, sin, None)
    return x_BLH


def attention_op(blocks: nn.ModuleList, x_BLH: Tensor, cos: Tensor, sin: Tensor) -> str:
    """Which of PyTorch's attention ops ran, from the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        through(blocks, x_BLH, cos, sin)
    prefix, names = "aten::_scaled_dot_product_", {event.key for event in profile.key_averages()}
    found = sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return found[0].replace("_attention", "").replace("_for_cpu", "") if found else "not seen"


def _measure(work: Work, blocks: nn.ModuleList, case: BlockCase, cells: dict[str, Any]) -> None:
    shape, device = blocks_shape(work), work.device
    forget_compiled()
    for block in blocks:
        block.compute = torch.compile(block._compute, backend=work.sizes.compiler) if case.compiled else block._compute
    size = (case.batch, work.sizes.sequence, shape.hidden_size)
    x = torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    positions = torch.arange(work.sizes.sequence, device=device).expand(case.batch, -1)
    cos, sin = rotary_angles(positions, shape.head_dim, shape.rope_theta)
    held: dict[str, Tensor] = {}

    def forward() -> None:
        held["y"] = through(blocks, x, cos, sin)

    def backward() -> None:
        held.pop("y").backward(upstream)

    def forget_gradients() -> None:
        x.grad = None
        blocks.zero_grad(set_to_none=True)

    memory = PeakMemory(device)
    with attention_backend(case.backend):
        began = time.perf_counter()
        forward(), backward(), forget_gradients()
        if device == "cuda":
            torch.cuda.synchronize()
        cells["first call s"] = time.perf_counter() - began
        memory.start()
        times: list[Timing] = time_phases(
            (forward, backward), device, work.sizes.repeats, work.deadline, before=forget_gradients
        )
        cells["peak GiB"] = memory.peak()
        cells["kernel"] = attention_op(blocks, x, cos, sin)
    flops = block_flops(shape, case.batch, work.sizes.sequence)
    for name, timing in zip(("forward ms", "backward ms", "both ms"), times, strict=True):
        cells[name] = timing.cell()
    cells["TFLOP/s"] = flops / times[-1].median
    cells["MFU"] = work.mfu(flops, times[-1].median)
    if cells["MFU"] is not None:
        cells["goal"] = "met" if cells["MFU"] >= GOAL_BLOCK_MFU else "not met"
    if case.compiled:
        cells |= compile_counts()


def blocks_shape(work: Work) -> ModelShape:
    return ModelShape(**work.sizes.block)


def measure_ceiling(work: Work) -> None:
    """What one large matmul of random data reaches here: no model can be faster."""
    table, n = work.table("ceiling"), work.sizes.matmul
    with work.row(table, next(iter(table.rows))) as cells:
        a, b = (torch.randn(n, n, device=work.device, dtype=torch.bfloat16) for _ in range(2))
        timing = time_phases((lambda: torch.mm(a, b),), work.device, work.sizes.repeats, work.deadline, warmup=3)[-1]
        cells |= {"ms": timing.cell(), "TFLOP/s": 2 * n**3 / timing.median}


def run(work: Work) -> None:
    torch.manual_seed(0)
    measure_ceiling(work)
    blocks = build_blocks(blocks_shape(work), build_mesh(), work.device, torch.bfloat16)
    table = work.table("block")
    for case in block_cases(work.sizes):
        if work.late(table, case.label):
            continue
        with work.row(table, case.label) as cells:
            _measure(work, blocks, case, cells)
        blocks.zero_grad(set_to_none=True)
        if work.device == "cuda":
            torch.cuda.empty_cache()
