"""The model, assembled: embedding -> blocks -> final norm -> head with the diffusion loss inside it.

Shapes: B samples, L tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.attention import rotary_angles
from parallel.block import DiffusionHead, TransformerBlock, rms_norm, vocab_embedding
from parallel.initialise import initialise
from parallel.mesh import Mesh
from parallel.shape import ModelShape
from pretrain.config import ModelConfig


class ModelOutput(NamedTuple):
    """loss: scalar, with gradient; ce [B, L]: cross-entropy of counted tokens, else 0; correct [B, L] bool."""

    loss: Tensor
    ce: Tensor
    correct: Tensor


def model_shape(config: ModelConfig) -> ModelShape:
    """The sizes that `parallel` needs, from the model section of the config."""
    return ModelShape(**{name: getattr(config, name) for name in ModelShape.__dataclass_fields__})


class DiffusionTransformer(nn.Module):
    """Bidirectional transformer that predicts every masked token at once."""

    def __init__(self, shape: ModelShape, mesh: Mesh, activation_checkpointing: str = "none"):
        super().__init__()
        self.shape = shape
        self.recompute = activation_checkpointing == "full"
        self.embedding = vocab_embedding(shape, mesh)
        self.blocks = nn.ModuleList(TransformerBlock(shape, mesh) for _ in range(shape.num_layers))
        self.final_norm = rms_norm(shape)
        self.head = DiffusionHead(shape, mesh)
        if shape.tie_embeddings:
            self.head.weight = self.embedding.weight

    def compile_blocks(self) -> None:
        """torch.compile of each block's arithmetic; parameter gathering hooks stay outside the graphs."""
        for block in self.blocks:
            if isinstance(block, TransformerBlock):
                block.compute = torch.compile(block._compute)

    def forward(
        self,
        noisy_ids: Tensor,
        position_ids: Tensor,
        document_ids: Optional[Tensor] = None,
        target_ids: Optional[Tensor] = None,
        masked: Optional[Tensor] = None,
        weight: Optional[Tensor] = None,
        normalizer: Optional[Tensor] = None,
    ) -> ModelOutput | Tensor:
        """ModelOutput when `target_ids` is given, else logits [B, L, V]. All inputs [B, L].

        document_ids: None when every sample is one unpadded document (then attention needs no mask).
        """
        cos, sin = rotary_angles(position_ids, self.shape.head_dim, self.shape.rope_theta)
        x_BLH = self.embedding(noisy_ids)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BLH = checkpoint(block, x_BLH, cos, sin, document_ids, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BLH = block(x_BLH, cos, sin, document_ids)
        x_BLH = self.final_norm(x_BLH)
        if target_ids is None:
            return self.head(x_BLH)
        loss, ce, correct = self.head(x_BLH, target_ids, masked, weight, normalizer)
        return ModelOutput(loss, ce.view_as(weight), correct.view_as(weight))


def build_model(
    config: ModelConfig, mesh: Mesh, seed: int, activation_checkpointing: str = "none"
) -> DiffusionTransformer:
    """The model with its initial weights (a function of seed and parameter names alone), on the CPU in float32."""
    model = DiffusionTransformer(model_shape(config), mesh, activation_checkpointing)
    initialise(model, model.shape, mesh, seed)
    return model
