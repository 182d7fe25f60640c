"""FLOPs of training, in one place."""

from __future__ import annotations

import math
from typing import Optional

from parallel.shape import ModelShape, parameter_table

# Dense bf16 peak in FLOP/s, from NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}


def flops_per_token(shape: ModelShape, sequence_length: float, masked_fraction: float = 1.0) -> float:
    """Forward + backward FLOPs of one token: 6 x matmul parameters + 12 x layers x hidden x sequence_length.

    sequence_length: or, where documents are isolated, the mean number of tokens that a token sees. The embedding look-up is
    no matmul; the head counts times the fraction of tokens it is computed for; attention is full, not causal, so it is never
    halved. Recomputation is not counted (Narayanan et al., arXiv 2104.04473, appendix).
    """
    table = parameter_table(shape)
    blocks = sum(math.prod(s.shape) for name, s in table.items() if name.startswith("blocks.") and len(s.shape) == 2)
    head = shape.vocab_size * shape.hidden_size * masked_fraction
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim * sequence_length
    return 6 * (blocks + head) + attention


def peak_flops(device_name: str) -> Optional[float]:
    """Peak of the named GPU, None if it is not in the table (then no MFU is reported)."""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in device_name), None)
