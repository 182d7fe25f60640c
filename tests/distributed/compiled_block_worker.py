"""One rank of: python -m tests.distributed.compiled_block_worker FOLDER - compiled tensor-parallel blocks beside eager ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from parallel.attention import rotary_angles
from parallel.block import TransformerBlock
from parallel.mesh import build_mesh, leave
from parallel.recompute import MODES
from parallel.shape import ModelShape


def gradients(block: TransformerBlock, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    block.zero_grad()
    x.grad = None
    block(x, cos, sin).square().sum().backward()
    return [tensor.grad.clone() for tensor in (x, *block.parameters())]


def main() -> None:
    torch.set_num_threads(1)
    mesh = build_mesh(tensor=2, timeout_seconds=60)
    cos, sin = rotary_angles(torch.arange(8).expand(2, 8), 8, 500000.0)
    found = {}
    for sequence_parallel in (False, True):
        for mode in MODES:
            block = TransformerBlock(
                ModelShape(2, 32, 4, 2, 48, 150), mesh, sequence_parallel=sequence_parallel, recompute=mode
            )
            generator = torch.Generator().manual_seed(mesh.tp_rank)
            for parameter in block.parameters():
                torch.nn.init.normal_(parameter, 0, 0.1, generator=generator)
            share = 4 if sequence_parallel else 8
            generator = torch.Generator().manual_seed(9 + mesh.tp_rank * sequence_parallel)
            x = torch.randn(2, share, 32, generator=generator, requires_grad=True)
            eager = gradients(block, x, cos, sin)
            torch._dynamo.reset()
            explained = torch._dynamo.explain(block.compute)(x, cos, sin, None)
            torch._dynamo.reset()
            block.compute = torch.compile(block.compute, backend="aot_eager", fullgraph=True)
            compiled = gradients(block, x, cos, sin)
            worst = max(float((c - e).norm() / e.norm()) for c, e in zip(compiled, eager))
            name = f"{'sequence' if sequence_parallel else 'tensor'} parallel, {mode}"
            found[name] = {"graphs": explained.graph_count, "breaks": explained.graph_break_count, "worst": worst}
    (Path(sys.argv[1]) / f"{mesh.rank}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
