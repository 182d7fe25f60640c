"""One small training problem that every layout and the float64 reference solve: model, data, optimizer."""

from __future__ import annotations

import numpy as np
import torch

from data.batch import DiffusionBatch, expand
from data.loader import Slice, StageOptions, training_batches
from data.masking import MaskingOptions
from data.stream import BlockStream
from parallel.initialise import rows
from parallel.shape import ModelShape, parameter_table
from pretrain.config import ModelConfig

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, vocab_size=150)
LENGTH, GLOBAL_BATCH, MICRO_BATCH, SEED = 12, 8, 2, 3
STEPS, LR, CLIP, BETAS, EPS, DECAY = 20, 2e-3, 1.0, (0.9, 0.95), 1e-6, 0.1
MASK, PAD = 0, 1
EMPTY_STEP_OF_RANK_0 = 4  # a step in which the first half of the global batch has no masked token at all


class Store:
    """Random token ids that never contain the special ones."""

    tokens, row_tokens, has_spans = 1000, 0, False

    def __init__(self):
        self._ids = np.random.default_rng(0).integers(2, MODEL.vocab_size, self.tokens).astype(np.uint16)

    def read_tokens(self, start: int, count: int) -> np.ndarray:
        return self._ids[start : start + count]


def batches(
    dp_rank: int = 0, dp_size: int = 1, steps: int = STEPS, micro_batch: int = MICRO_BATCH
) -> list[list[DiffusionBatch]]:
    """Microbatches of each step, from the product's own stream: random lengths (padding), varying masked counts."""
    options = StageOptions(MaskingOptions(SEED, GLOBAL_BATCH), random_length_prob=0.3)
    part = Slice(GLOBAL_BATCH, micro_batch, dp_rank, dp_size)
    stream = BlockStream(Store(), LENGTH, SEED, segment_tokens=64)
    groups = [[expand(c, MASK) for c in group] for group in training_batches(stream, options, part, PAD, steps=steps)]
    for batch in groups[EMPTY_STEP_OF_RANK_0]:
        first_half = batch.sample_ids % GLOBAL_BATCH < GLOBAL_BATCH // 2
        batch.masked[first_half] = False
        batch.weight[first_half] = 0
    return groups


def normalizer(step_batches: list[list[DiffusionBatch]]) -> list[float]:
    """Loss-eligible tokens of each global batch."""
    return [float(sum(b.eligible.sum() for b in group)) for group in step_batches]


def full_weights(shape: ModelShape) -> dict[str, torch.Tensor]:
    """The initial weights, unsharded, float64, requiring gradients."""
    return {
        name: rows(name, spec, SEED, 0, spec.shape[0]).double().requires_grad_()
        for name, spec in parameter_table(shape).items()
    }
