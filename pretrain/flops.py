"""FLOPs of training, in one place: what train's MFU, `plan` and the studies count, and what papers count."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Optional

from parallel.layout import Layout
from parallel.shape import ModelShape, parameter_counts, parameter_table

# Dense bf16 peak in FLOP/s, from NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}


def flops_per_token(shape: ModelShape, sequence_length: float, masked_fraction: float = 1.0) -> float:
    """Forward + backward FLOPs of one token: 6 x matmul parameters + 12 x layers x hidden x sequence_length.

    sequence_length: or, where documents are isolated, the mean number of tokens that a token sees. The embedding look-up is
    no matmul; the head counts times the fraction of tokens it is computed for; attention is full, not causal, so it is never
    halved. Recomputation is not counted (Narayanan et al., arXiv 2104.04473, appendix). Of a padded vocabulary the real rows count.
    """
    blocks = shape.num_layers * block_matrices(shape)
    return 6 * (blocks + _head(shape) * masked_fraction) + _attention(shape, sequence_length)


@lru_cache(maxsize=64)
def block_matrices(shape: ModelShape) -> int:
    """Elements of one block's matrices."""
    table = parameter_table(shape)
    return sum(math.prod(s.shape) for name, s in table.items() if name.startswith("blocks.0.") and len(s.shape) == 2)


def _head(shape: ModelShape) -> int:
    return shape.vocab_size * shape.hidden_size


def _attention(shape: ModelShape, sequence_length: float) -> float:
    """q k^T and its product with v, forward (2 x 2) and twice that backward, of all layers."""
    return 12 * shape.num_layers * shape.num_heads * shape.head_dim * sequence_length


def _by_6n(shape: ModelShape, sequence_length: float, masked_fraction: float) -> float:
    return 6.0 * parameter_counts(shape)["non_embedding"]


def _by_6n_total(shape: ModelShape, sequence_length: float, masked_fraction: float) -> float:
    return 6.0 * parameter_counts(shape)["total"]


def _by_palm(shape: ModelShape, sequence_length: float, masked_fraction: float) -> float:
    parameters = parameter_counts(shape)["non_embedding"] + _head(shape)
    return 6 * parameters + _attention(shape, sequence_length)


def _by_chinchilla(shape: ModelShape, sequence_length: float, masked_fraction: float) -> float:
    """Its table, a token: the embedding and the logits as matmuls with the vocabulary, this block's own matrices (a gated
    feed-forward has three), q k^T, 3 a softmax, the product with v; backward twice the forward."""
    attended = (2 * 2 * shape.num_heads * shape.head_dim + 3 * shape.num_heads) * sequence_length
    forward = 2 * 2 * _head(shape) + shape.num_layers * (2 * block_matrices(shape) + attended)
    return 3 * forward


# Every way to count that is in use: (shape, sequence length, masked fraction) -> forward and backward FLOPs of one token.
# Those of papers know nothing of masks: they count the head, where they do, for every token.
CONVENTIONS: dict[str, Callable[[ModelShape, float, float], float]] = {
    "exact": flops_per_token,  # what torch.utils.flop_counter counts
    "6n": _by_6n,  # Kaplan et al., arXiv 2001.08361, section 2.1: C = 6 N D, N without embeddings
    "6n_total": _by_6n_total,  # the same with every parameter, as model cards and Hoffmann et al., section 3.3, do
    "palm": _by_palm,  # Chowdhery et al., arXiv 2204.02311, appendix B: 6 N + 12 L H Q T, N with the output matrix
    "chinchilla": _by_chinchilla,  # Hoffmann et al., arXiv 2203.15556, appendix F
}


def flops_per_token_in(
    convention: str, shape: ModelShape, sequence_length: float, masked_fraction: float = 1.0
) -> float:
    """Forward + backward FLOPs of one token by one of CONVENTIONS; ValueError for another name."""
    if convention not in CONVENTIONS:
        raise ValueError(f"FLOP convention {convention!r}: there are {', '.join(CONVENTIONS)}")
    return CONVENTIONS[convention](shape, sequence_length, masked_fraction)


def recomputed_flops_per_token(shape: ModelShape, sequence_length: float, layout: Layout) -> float:
    """FLOPs of one token that activation checkpointing does a second time: with `full` a block's forward, with `selective` that
    without attention. The last matmul is left out, since nobody needs its output again and torch.utils.checkpoint stops once
    all that was saved is there; under DeepSpeed's ZeRO-3 it is not, since its linear saves what it keeps after its matmul."""
    if layout.activation_checkpointing == "none":
        return 0.0
    late = layout.engine == "deepspeed" and layout.zero_stage == 3
    last = 0 if late else shape.hidden_size * shape.ffn_hidden_size
    again = 2.0 * shape.num_layers * (block_matrices(shape) - last)
    return again + (_attention(shape, sequence_length) / 3 if layout.activation_checkpointing == "full" else 0.0)


def peak_flops(device_name: str) -> Optional[float]:
    """Peak of the named GPU, None if it is not in the table (then no MFU is reported)."""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in device_name), None)
