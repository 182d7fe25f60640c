"""Sizes of the transformer and the one table of its parameters: full shape, tensor-parallel dimension, initial scale.

The table is by name and holds the logical tensors: q, k, v, gate and up apart, the vocabulary without padding. Building,
initialisation, weight decay, parameter counts and checkpoints all read it; nothing is read from parameter attributes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

VOCAB_MULTIPLE = (
    128  # rows of the output matrix per tensor-parallel rank come in multiples of this (tile size of GEMMs)
)


@dataclass(frozen=True)
class ModelShape:
    """Every size of the model. H = num_heads * head_dim."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    norm_impl: str = "torch"
    init_std: float = 0.02

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding and the head over all tensor-parallel ranks: equal shares of whole tiles."""
        unit = VOCAB_MULTIPLE * tensor_parallel
        return -(-self.vocab_size // unit) * unit


@dataclass(frozen=True)
class ParameterSpec:
    """One logical parameter.

    shape: full, unpadded. tp_dim: the dimension that tensor parallelism cuts into equal contiguous shares, None = replicated.
    std: standard deviation of the initial normal values; None = ones (norm gains). padded: rows are padded for tp.
    """

    shape: tuple[int, ...]
    tp_dim: Optional[int]
    std: Optional[float]
    padded: bool = False

    @property
    def decayed(self) -> bool:
        """Weight decay acts on matrices, not on norm gains."""
        return len(self.shape) > 1

    def local_shape(self, tp: int, padded_vocab: int) -> tuple[int, ...]:
        """Shape of one tensor-parallel rank's share, vocabulary padding included."""
        shape = list(self.shape)
        if self.padded:
            shape[0] = padded_vocab
        if self.tp_dim is not None:
            shape[self.tp_dim] //= tp
        return tuple(shape)


def parameter_table(shape: ModelShape) -> dict[str, ParameterSpec]:
    """Name -> ParameterSpec of the whole model, in model order.

    Matrices start normal with `init_std`; the two projections that write to the residual stream divide it by
    sqrt(2 num_layers) (Radford et al., GPT-2, section 2.3). LLaDA's own initialisation is not published.
    """
    h, f, d, std = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim, shape.init_std
    out_std = std / math.sqrt(2 * shape.num_layers)
    q, kv = shape.num_heads * d, shape.num_kv_heads * d
    table = {"embedding.weight": ParameterSpec((shape.vocab_size, h), 0, std, padded=True)}
    for i in range(shape.num_layers):
        block = f"blocks.{i}."
        table |= {
            block + "attention_norm.weight": ParameterSpec((h,), None, None),
            block + "q_proj.weight": ParameterSpec((q, h), 0, std),
            block + "k_proj.weight": ParameterSpec((kv, h), 0, std),
            block + "v_proj.weight": ParameterSpec((kv, h), 0, std),
            block + "o_proj.weight": ParameterSpec((h, q), 1, out_std),
            block + "ffn_norm.weight": ParameterSpec((h,), None, None),
            block + "gate_proj.weight": ParameterSpec((f, h), 0, std),
            block + "up_proj.weight": ParameterSpec((f, h), 0, std),
            block + "down_proj.weight": ParameterSpec((h, f), 1, out_std),
        }
    table["final_norm.weight"] = ParameterSpec((h,), None, None)
    if not shape.tie_embeddings:
        table["head.weight"] = ParameterSpec((shape.vocab_size, h), 0, std, padded=True)
    return table


def parameter_counts(shape: ModelShape) -> dict[str, int]:
    """`total` and `non_embedding` (neither the embedding nor the output head) parameters, vocabulary padding excluded."""
    sizes = {name: math.prod(spec.shape) for name, spec in parameter_table(shape).items()}
    vocab = sum(size for name, size in sizes.items() if name in ("embedding.weight", "head.weight"))
    return {"total": sum(sizes.values()), "non_embedding": sum(sizes.values()) - vocab}
