"""The tensor-parallel transformer block: pre-norm, bidirectional, RoPE, grouped-query attention, SwiGLU, no biases.

Built from megatron-core's column- and row-parallel linears. q, k, v (and gate, up) are separate parameters that share
one input, so the input enters the tensor-parallel region once and its gradient is all-reduced once, not once a linear.
Shapes: B samples, L tokens, H hidden, N heads, K key/value heads (both of this rank), D head size.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from parallel.attention import Isolation, attention, rotate
from parallel.loss import DiffusionLossOutput, check_vocab_shards, diffusion_loss
from parallel.mesh import Mesh
from parallel.recompute import recomputed
from parallel.row_loss import RowLoss
from parallel.row_loss_cross_entropy import CROSS_ENTROPY
from parallel.sequence import gather_sequence, join_sequence, scatter_sequence
from parallel.shape import ModelShape


def _unused_init(weight: Tensor) -> None:
    raise AssertionError("weights are initialised by parallel.initialise")


def _layer_config(mesh: Mesh) -> ModelParallelConfig:
    # perform_initialization is off: megatron-core would draw from a global generator, per rank.
    return ModelParallelConfig(
        tensor_model_parallel_size=mesh.tp,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.get_default_dtype(),
    )


def _column(inputs: int, outputs: int, mesh: Mesh) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        inputs,
        outputs,
        config=_layer_config(mesh),
        init_method=_unused_init,
        bias=False,
        gather_output=False,
        disable_grad_reduce=True,
        tp_group=mesh.tp_group,
    )


def _row(inputs: int, outputs: int, mesh: Mesh) -> RowParallelLinear:
    return RowParallelLinear(
        inputs,
        outputs,
        config=_layer_config(mesh),
        init_method=_unused_init,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=mesh.tp_group,
    )


def _project(x: Tensor, linear: ColumnParallelLinear | RowParallelLinear) -> Tensor:
    """This rank's part of a tensor-parallel linear.

    megatron-core's own forward is not used: its custom backward computes both gradients whenever it is asked for one, so a
    backward that is split in two (zero bubble) would do all the work twice; and torch.compile breaks the graph in it.
    """
    return F.linear(x, linear.weight)


class RMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich, arXiv 1910.07467) over the hidden dimension.

    Under sequence parallelism each tensor-parallel rank normalises its own tokens, so the gain's gradient is summed over the
    ranks on its way back: whoever shards parameters underneath sees the whole gradient.
    """

    def __init__(self, shape: ModelShape, mesh: Mesh, sequence_parallel: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.norm_eps
        self.group = mesh.tp_group if sequence_parallel else None
        self.fused = _apex_rms_norm() if shape.norm_impl == "apex" else None

    def forward(self, x_BLH: Tensor) -> Tensor:
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.group) if self.group else self.weight
        if self.fused:
            return self.fused(x_BLH, weight, weight.shape, self.eps)
        return F.rms_norm(x_BLH, weight.shape, weight, self.eps)


def _apex_rms_norm():
    from parallel.apex_support import require_apex

    require_apex("model.norm_impl")
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)).

    [B, L, H] in and out, replicated over the tensor-parallel ranks; under sequence parallelism [B, L/tp, H], each rank its share.
    """

    def __init__(self, shape: ModelShape, mesh: Mesh, *, sequence_parallel: bool = False, recompute: str = "none"):
        super().__init__()
        h, d = shape.hidden_size, shape.head_dim
        self.head_dim = d
        self.tp_group = mesh.tp_group if mesh.tp > 1 else None
        self.sequence_group = mesh.tp_group if sequence_parallel else None
        self.attention_norm = RMSNorm(shape, mesh, sequence_parallel)
        self.q_proj = _column(h, shape.num_heads * d, mesh)
        self.k_proj = _column(h, shape.num_kv_heads * d, mesh)
        self.v_proj = _column(h, shape.num_kv_heads * d, mesh)
        self.o_proj = _row(shape.num_heads * d, h, mesh)
        self.ffn_norm = RMSNorm(shape, mesh, sequence_parallel)
        self.gate_proj = _column(h, shape.ffn_hidden_size, mesh)
        self.up_proj = _column(h, shape.ffn_hidden_size, mesh)
        self.down_proj = _row(shape.ffn_hidden_size, h, mesh)
        # What runs; parameter gathering hooks stay outside of it. `compile` replaces it by its compiled form.
        self.compute = recomputed(self._compute, recompute)

    def compile_compute(self) -> None:
        """torch.compile of the block's arithmetic, recomputation included."""
        self.compute = torch.compile(self.compute)

    def forward(self, x_BLH: Tensor, cos: Tensor, sin: Tensor, isolation: Isolation = None) -> Tensor:
        return self.compute(x_BLH, cos, sin, isolation)

    def _enter(self, x: Tensor) -> Tensor:
        """Into the tensor-parallel region: [B, L, H] on every rank; backward sums the gradient over the ranks."""
        if self.sequence_group:
            return gather_sequence(x, self.sequence_group)
        return copy_to_tensor_model_parallel_region(x, group=self.tp_group) if self.tp_group else x

    def _leave(self, x: Tensor) -> Tensor:
        """Out of it: the sum over the ranks, whole or this rank's share."""
        if self.sequence_group:
            return scatter_sequence(x, self.sequence_group)
        return reduce_from_tensor_model_parallel_region(x, group=self.tp_group) if self.tp_group else x

    def _heads(self, x_BLC: Tensor) -> Tensor:
        return x_BLC.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _compute(self, x_BLH: Tensor, cos: Tensor, sin: Tensor, isolation: Isolation) -> Tensor:
        y = self._enter(self.attention_norm(x_BLH))
        q_BNLD, k_BKLD, v_BKLD = (self._heads(_project(y, w)) for w in (self.q_proj, self.k_proj, self.v_proj))
        a_BNLD = attention(rotate(q_BNLD, cos, sin), rotate(k_BKLD, cos, sin), v_BKLD, isolation)
        x_BLH = x_BLH + self._leave(_project(a_BNLD.transpose(1, 2).flatten(2), self.o_proj))
        y = self._enter(self.ffn_norm(x_BLH))
        gated = F.silu(_project(y, self.gate_proj)) * _project(y, self.up_proj)
        return x_BLH + self._leave(_project(gated, self.down_proj))


class TokenEmbedding(VocabParallelEmbedding):
    """Token embedding whose rows are spread over the tensor-parallel ranks; also of mixtures of tokens.

    Both happen inside this module's forward, so parameters are gathered here and nowhere else.
    """

    def forward(self, ids: Tensor, weights_BLK: Optional[Tensor] = None) -> Tensor:
        """ids [B, L] -> their rows [B, L, H] on every rank. With weights: ids [B, L, K] -> sum over k of weight * row.

        One k at a time: [B, L, K, H] never exists, and backward keeps ids and weights alone. The sum over k and ranks is in the
        wider of both dtypes, and rounded once.
        """
        if weights_BLK is None:
            return super().forward(ids)
        local_BLK = ids - self.vocab_start_index
        here_BLK = (local_BLK >= 0) & (local_BLK < self.num_embeddings_per_partition)
        local_BLK, weights_BLK = local_BLK.where(here_BLK, 0), weights_BLK.where(here_BLK, 0.0)
        x_BLH = weights_BLK[..., :1] * F.embedding(local_BLK[..., 0], self.weight)
        for k in range(1, ids.shape[-1]):
            x_BLH = x_BLH + weights_BLK[..., k, None] * F.embedding(local_BLK[..., k], self.weight)
        x_BLH = reduce_from_tensor_model_parallel_region(x_BLH, group=self.tp_group)
        return x_BLH.to(self.weight.dtype)


def vocab_embedding(shape: ModelShape, mesh: Mesh) -> TokenEmbedding:
    """The embedding of this model's padded vocab, its weights not set yet."""
    return TokenEmbedding(
        shape.padded_vocab(mesh.tp),
        shape.hidden_size,
        init_method=_unused_init,
        config=_layer_config(mesh),
        tp_group=mesh.tp_group,
    )


class DiffusionHead(nn.Module):
    """The output matrix [V_local, H] and what is done with it: the fused loss of the objective, or logits for sampling.

    Both happen inside this module's forward, so ZeRO-3 gathers the matrix here and nowhere else.
    """

    def __init__(
        self,
        shape: ModelShape,
        mesh: Mesh,
        *,
        sequence_parallel: bool = False,
        row_loss: RowLoss = CROSS_ENTROPY,
    ):
        super().__init__()
        self.row_loss = row_loss
        self.vocab_size = shape.vocab_size
        self.mesh = mesh
        self.sequence_group = mesh.tp_group if sequence_parallel else None
        self.weight = nn.Parameter(torch.empty(shape.padded_vocab(mesh.tp) // mesh.tp, shape.hidden_size))
        if mesh.tp > 1:
            check_vocab_shards(self.weight.shape[0], shape.vocab_size, mesh.tp_group, str(mesh.device))

    def forward(
        self,
        hidden_BLH: Tensor,
        targets_BL: Optional[Tensor] = None,
        masked_BL: Optional[Tensor] = None,
        weight_BL: Optional[Tensor] = None,
        normalizer: Optional[Tensor] = None,
        current_BL: Optional[Tensor] = None,
        alpha_BL: Optional[Tensor] = None,
    ) -> DiffusionLossOutput | Tensor:
        """The loss (targets given; `value`, `ce` and `correct` come as [T] = [B L]) or the logits [B, L, vocab_size].

        current_BL and alpha_BL: for a row loss that needs them.
        """
        if self.sequence_group:
            hidden_BLH = join_sequence(hidden_BLH, self.sequence_group)
        if targets_BL is not None:
            if masked_BL is None or weight_BL is None or normalizer is None:
                raise ValueError("the loss needs targets, masked, weight and normalizer together")
            return diffusion_loss(
                hidden_BLH.flatten(0, 1),
                self.weight,
                targets_BL.flatten(),
                masked_BL.flatten(),
                weight_BL.flatten(),
                normalizer,
                tp_group=self.mesh.tp_group if self.mesh.tp > 1 else None,
                vocab_size=self.vocab_size,
                row_loss=self.row_loss,
                current=None if current_BL is None else current_BL.flatten(),
                alpha=None if alpha_BL is None else alpha_BL.flatten(),
            )
        local = F.linear(hidden_BLH, self.weight)
        if self.mesh.tp > 1:
            shares = [torch.empty_like(local) for _ in range(self.mesh.tp)]
            torch.distributed.all_gather(shares, local.contiguous(), group=self.mesh.tp_group)
            local = torch.cat(shares, -1)
        return local[..., : self.vocab_size]
