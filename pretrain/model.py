"""The model, assembled: embedding -> blocks -> final norm -> head with the diffusion loss inside it.

A pipeline cuts it into chunks of consecutive layers; one chunk is the whole model.

Shapes: B samples, L tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor, nn

from parallel.attention import Documents, find_documents, keep_apart, rotary_angles
from parallel.block import DiffusionHead, RMSNorm, TransformerBlock, vocab_embedding
from parallel.engine import LossOutput
from parallel.initialise import clear_padding, initialise
from parallel.layout import ONE_RANK, Layout
from parallel.mesh import Mesh
from parallel.row_loss import RowLoss
from parallel.row_loss_cross_entropy import CROSS_ENTROPY
from parallel.sequence import split_sequence
from parallel.shape import ModelShape
from parallel.visibility import Visibility, find_visibility
from pretrain.config import ModelConfig, ParallelConfig


def model_shape(config: ModelConfig) -> ModelShape:
    """The sizes that `parallel` needs, from the model section of the config."""
    return ModelShape(**{name: getattr(config, name) for name in ModelShape.__dataclass_fields__})


def parallel_layout(config: ParallelConfig) -> Layout:
    """The layout that the parallel section of the config asks for."""
    values = {name: getattr(config, name) for name in Layout.__dataclass_fields__}
    return Layout(**values | {"layers_per_stage": tuple(config.layers_per_stage)})


class DiffusionTransformer(nn.Module):
    """Transformer that predicts every corrupted token at once, or one chunk of it.

    row_loss: what a counted token adds to the loss. Parameters carry the names of parallel.shape.parameter_table in every chunk.
    """

    def __init__(
        self,
        shape: ModelShape,
        mesh: Mesh,
        layout: Layout = ONE_RANK,
        chunk: int = 0,
        row_loss: RowLoss = CROSS_ENTROPY,
    ):
        super().__init__()
        self.shape = shape
        self.chunk = chunk
        self.compiled = False
        self.first, self.last = chunk == 0, chunk == layout.chunks - 1
        self.sequence_group = mesh.tp_group if layout.sequence_parallel else None
        parallel = layout.sequence_parallel
        if self.first:
            self.embedding = vocab_embedding(shape, mesh)
        self.blocks = nn.ModuleDict(
            {
                str(i): TransformerBlock(
                    shape, mesh, sequence_parallel=parallel, recompute=layout.activation_checkpointing
                )
                for i in layout.layers(shape.num_layers)[chunk]
            }
        )
        if self.last:
            self.final_norm = RMSNorm(shape, mesh, parallel)
            self.head = DiffusionHead(shape, mesh, sequence_parallel=parallel, row_loss=row_loss)
        if shape.tie_embeddings and self.first and self.last:
            self.head.weight = self.embedding.weight

    def compile_blocks(self) -> None:
        """torch.compile of each block's arithmetic; parameter gathering hooks stay outside the graphs."""
        self.compiled = True
        for block in self.blocks.values():
            if isinstance(block, TransformerBlock):
                block.compile_compute()

    def forward(
        self,
        inputs: Tensor,
        position_ids: Tensor,
        document_ids: Optional[Documents | Tensor] = None,
        target_ids: Optional[Tensor] = None,
        masked: Optional[Tensor] = None,
        weight: Optional[Tensor] = None,
        normalizer: Optional[Tensor] = None,
        *,
        visibility: Visibility | Tensor = None,
        current_ids: Optional[Tensor] = None,
        alpha: Optional[Tensor] = None,
        soft_ids: Optional[Tensor] = None,
        soft_weights: Optional[Tensor] = None,
    ) -> LossOutput | Tensor:
        """LossOutput when `target_ids` is given, else logits [B, L, V]; a chunk that is not the last gives hidden states.

        inputs: noisy ids [B, L], or the hidden states [B, L, H] of the chunk before ([B, L/tp, H] under sequence
        parallelism). document_ids: what parallel.attention.find_documents made of the ids, or the ids [B, L] themselves (on
        a GPU that waits for them); None when every sample is one document. visibility: what parallel.visibility.find_visibility
        made of it, or the numbers [B, L, 3] themselves; None when every token sees its whole document. current_ids, alpha: the
        corrupted tokens and how much of the clean ones is left, for a row loss that needs them. soft_ids, soft_weights
        [B, L, K]: the input is the mixture of these tokens' embeddings and not `inputs`' ids. The others are [B, L];
        `normalizer` is a scalar.
        """
        cos, sin = rotary_angles(position_ids, self.shape.head_dim, self.shape.rope_theta)
        x_BLH = self._embed(inputs, soft_ids, soft_weights) if self.first else inputs
        documents = find_documents(document_ids, x_BLH.device) if isinstance(document_ids, Tensor) else document_ids
        seen = find_visibility(visibility, x_BLH.device) if isinstance(visibility, Tensor) else visibility
        isolation = keep_apart(documents, seen, x_BLH.dtype, self.shape.head_dim, compiled=self.compiled)
        for block in self.blocks.values():
            x_BLH = block(x_BLH, cos, sin, isolation)
        if not self.last:
            return x_BLH
        x_BLH = self.final_norm(x_BLH)
        if target_ids is None:
            return self.head(x_BLH)
        loss, *tokens = self.head(x_BLH, target_ids, masked, weight, normalizer, current_ids, alpha)
        return LossOutput(loss, *(numbers.view_as(weight) for numbers in tokens))

    def _embed(self, ids_BL: Tensor, soft_ids_BLK: Optional[Tensor], soft_weights_BLK: Optional[Tensor]) -> Tensor:
        if (soft_ids_BLK is None) != (soft_weights_BLK is None):
            raise ValueError("soft_ids and soft_weights come together")
        x_BLH = self.embedding(ids_BL) if soft_ids_BLK is None else self.embedding(soft_ids_BLK, soft_weights_BLK)
        return split_sequence(x_BLH, self.sequence_group) if self.sequence_group else x_BLH


def build_chunks(
    config: ModelConfig,
    mesh: Mesh,
    layout: Layout,
    seed: Optional[int] = None,
    row_loss: RowLoss = CROSS_ENTROPY,
) -> list[DiffusionTransformer]:
    """The chunks that this rank holds, on the CPU in float32.

    seed: their initial weights, a function of seed and names alone; None leaves them unset (memory that nobody touched costs
    nothing), for an engine whose `state()` is then filled shard by shard. row_loss: what a counted token adds to the loss.
    """
    shape = model_shape(config)
    chunks = [DiffusionTransformer(shape, mesh, layout, number, row_loss) for number in layout.chunks_of(mesh.pp_rank)]
    for chunk in chunks:
        if seed is None:
            clear_padding(chunk, shape, mesh)
        else:
            initialise(chunk, shape, mesh, seed)
    return chunks
