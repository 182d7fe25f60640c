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
from parallel.sequence import split_sequence
from parallel.shape import ModelShape
from pretrain.config import ModelConfig, ParallelConfig


def model_shape(config: ModelConfig) -> ModelShape:
    """The sizes that `parallel` needs, from the model section of the config."""
    return ModelShape(**{name: getattr(config, name) for name in ModelShape.__dataclass_fields__})


def parallel_layout(config: ParallelConfig) -> Layout:
    """The layout that the parallel section of the config asks for."""
    values = {name: getattr(config, name) for name in Layout.__dataclass_fields__}
    return Layout(**values | {"layers_per_stage": tuple(config.layers_per_stage)})


class DiffusionTransformer(nn.Module):
    """Bidirectional transformer that predicts every masked token at once, or one chunk of it.

    Parameters carry the names of parallel.shape.parameter_table in every chunk.
    """

    def __init__(self, shape: ModelShape, mesh: Mesh, layout: Layout = ONE_RANK, chunk: int = 0):
        super().__init__()
        self.shape = shape
        self.chunk = chunk
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
            self.head = DiffusionHead(shape, mesh, sequence_parallel=parallel)
        if shape.tie_embeddings and self.first and self.last:
            self.head.weight = self.embedding.weight

    def compile_blocks(self) -> None:
        """torch.compile of each block's arithmetic; parameter gathering hooks stay outside the graphs."""
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
    ) -> LossOutput | Tensor:
        """LossOutput when `target_ids` is given, else logits [B, L, V]; a chunk that is not the last gives hidden states.

        inputs: noisy ids [B, L], or the hidden states [B, L, H] of the chunk before ([B, L/tp, H] under sequence
        parallelism). document_ids: what parallel.attention.find_documents made of the ids, or the ids [B, L] themselves (on
        a GPU that waits for them); None when every sample is one document. The others are [B, L]; `normalizer` is a scalar.
        """
        cos, sin = rotary_angles(position_ids, self.shape.head_dim, self.shape.rope_theta)
        x_BLH = self._embed(inputs) if self.first else inputs
        documents = find_documents(document_ids, x_BLH.device) if isinstance(document_ids, Tensor) else document_ids
        isolation = keep_apart(documents, x_BLH.dtype, self.shape.head_dim)
        for block in self.blocks.values():
            x_BLH = block(x_BLH, cos, sin, isolation)
        if not self.last:
            return x_BLH
        x_BLH = self.final_norm(x_BLH)
        if target_ids is None:
            return self.head(x_BLH)
        loss, ce, correct = self.head(x_BLH, target_ids, masked, weight, normalizer)
        return LossOutput(loss, ce.view_as(weight), correct.view_as(weight))

    def _embed(self, ids_BL: Tensor) -> Tensor:
        x_BLH = self.embedding(ids_BL)
        return split_sequence(x_BLH, self.sequence_group) if self.sequence_group else x_BLH


def build_chunks(
    config: ModelConfig, mesh: Mesh, layout: Layout, seed: Optional[int] = None
) -> list[DiffusionTransformer]:
    """The chunks that this rank holds, on the CPU in float32.

    seed: their initial weights, a function of seed and names alone; None leaves them unset (memory that nobody touched costs
    nothing), for an engine whose `state()` is then filled shard by shard.
    """
    shape = model_shape(config)
    chunks = [DiffusionTransformer(shape, mesh, layout, number) for number in layout.chunks_of(mesh.pp_rank)]
    for chunk in chunks:
        if seed is None:
            clear_padding(chunk, shape, mesh)
        else:
            initialise(chunk, shape, mesh, seed)
    return chunks
