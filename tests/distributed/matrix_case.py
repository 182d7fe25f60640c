"""The problem that every cell of the parity matrix solves, and its float64 solution by one dense process.

Five layers, three AdamW steps (two of them clipped) on eight samples: padded samples, samples of two isolated documents,
masked counts that vary, and one step in which the first half of the batch (the whole share of some ranks) has no masked token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.batch import PADDING_DOCUMENT, DiffusionBatch, Form, expand
from data.flow import FlowOptions
from data.loader import Slice, StageOptions, training_batches
from data.masking import MaskingOptions
from data.stream import BlockStream
from parallel.initialise import rows
from parallel.row_loss import RowLoss
from parallel.row_losses import row_loss
from parallel.shape import ModelShape, parameter_table
from pretrain.config import ModelConfig
from pretrain.model import model_shape
from tests import reference_model
from tests.distributed.training_case import MASK, PAD, Store

# The initial weights are large, so that attention is far from uniform and a wrong mask or position shows.
MODEL = ModelConfig(
    num_layers=5, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, vocab_size=150, init_std=0.15
)
LENGTH, GLOBAL_BATCH, SEED, STEPS = 12, 8, 3, 3
LR, CLIP, BETAS, EPS, DECAY = 2e-3, 2.5, (0.9, 0.95), 1e-6, 0.1
EMPTY_STEP = 1
SECOND_DOCUMENT = 5  # where it begins, in every third sample
# Documents of a packed sample, taken in turn: uneven ones, one token alone, one document.
PACKED = ((5, 1, 4, 2), (3, 9), (12,), (1, 1, 6, 4), (7, 5))


BLOCK = 4
# Objectives: how a batch looks, what a token costs, and how far attention looks ahead.
FORMS = {
    "masked": Form(),
    "block": Form("block", block_size=BLOCK),
    "uniform": Form("uniform"),
    "flow": Form("flow"),
    "autoregressive": Form("autoregressive", start_id=PAD),
    "shift": Form(shift=True, per_answer=True),
}
LOOKAHEAD = {"shift": 3}
SMOOTHING = 0.1


def row_loss_of(kind: str) -> RowLoss:
    """What a token costs."""
    return row_loss({"uniform": "uniform", "flow": "symmetric_kl"}.get(kind, "cross_entropy"), SMOOTHING)


def columns(kind: str) -> int:
    """Columns of a row that the model computes."""
    return LENGTH * FORMS[kind].copies


def stage_options(kind: str, seed: int) -> StageOptions:
    unit, size = ("block", BLOCK) if kind == "block" else ("sequence", 0)
    return StageOptions(
        MaskingOptions(seed, GLOBAL_BATCH, eps=0.05, unit=unit, block_size=size)
        if kind != "masked"
        else MaskingOptions(seed, GLOBAL_BATCH),
        random_length_prob=0.3,
        kind=FORMS[kind].kind,
        shift=FORMS[kind].shift,
        vocab_size=MODEL.vocab_size,
        # A temperature at which several candidates share the input.
        flow=FlowOptions(MODEL.vocab_size, temperature=(0.3, 0.3), candidates=3),
    )


def batches(
    dp_rank: int = 0,
    dp_size: int = 1,
    micro_batch: int = GLOBAL_BATCH,
    seed: int = SEED,
    packed: bool = False,
    kind: str = "masked",
):
    """This rank's microbatches of each step (lists of DiffusionBatch), from the product's own stream.

    packed: several documents in every sample, positions counted anew in each. kind: the objective, of FORMS.
    """
    options = stage_options(kind, seed)
    part = Slice(GLOBAL_BATCH, micro_batch, dp_rank, dp_size)
    stream = BlockStream(Store(), LENGTH, SEED, segment_tokens=64)
    groups = [
        [expand(c, MASK, FORMS[kind], LOOKAHEAD.get(kind)) for c in group]
        for group in training_batches(stream, options, part, PAD, steps=STEPS)
    ]
    for step, group in enumerate(groups):
        for batch in group:
            (_pack_documents if packed else _cut_documents)(batch)
            if step == EMPTY_STEP:
                first_half = batch.sample_ids % GLOBAL_BATCH < GLOBAL_BATCH // 2
                batch.masked[first_half] = False
                batch.weight[first_half] = 0
    return groups


def _cut_documents(batch: DiffusionBatch) -> None:
    """Every third sample becomes two documents. Positions of the second go 0, 2, 4, ...: a mere shift would not show in RoPE."""
    cut = (batch.sample_ids % 3 == 0)[:, None] & (batch.position_ids >= SECOND_DOCUMENT)
    batch.document_ids = torch.where(cut & (batch.document_ids != PADDING_DOCUMENT), 1, batch.document_ids)
    batch.position_ids = torch.where(cut, 2 * (batch.position_ids - SECOND_DOCUMENT), batch.position_ids)


def _pack_documents(batch: DiffusionBatch) -> None:
    """Tokens that are not padding (random lengths) fall into the documents of PACKED."""
    for row, sample in enumerate(batch.sample_ids.tolist()):
        sizes = torch.tensor(PACKED[sample % len(PACKED)])
        number = torch.arange(len(sizes)).repeat_interleave(sizes)
        padding = batch.document_ids[row] == PADDING_DOCUMENT
        batch.document_ids[row] = torch.where(padding, PADDING_DOCUMENT, number)
        batch.position_ids[row] = torch.arange(LENGTH) - (sizes.cumsum(0) - sizes)[number]


@functools.cache
def normalizers(kind: str = "masked") -> list[float]:
    """Loss-eligible tokens of the global batch of each step."""
    return [float(sum(b.eligible.sum() for b in group)) for group in batches(kind=kind)]


def shape_of(tied: bool) -> ModelShape:
    return model_shape(replace(MODEL, tie_embeddings=tied))


@dataclass
class Truth:
    """What one float64 process finds: of each step the loss, the norm before clipping, gradients and masks; the end state."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]  # gradient/NAME, unclipped
    state: dict[str, Tensor]  # weight/NAME, exp_avg/NAME, exp_avg_sq/NAME
    masked: Tensor  # [steps, samples, L]


@functools.cache
def truth(tied: bool = False, packed: bool = False, kind: str = "masked") -> Truth:
    """The reference run."""
    from tests.parallel.row_loss_reference import VALUES

    chosen, values = row_loss_of(kind), None
    if kind in ("uniform", "flow"):
        values = functools.partial(VALUES[type(chosen)], kind=chosen)
    shape = shape_of(tied)
    weights = {
        name: rows(name, spec, SEED, 0, spec.shape[0]).double().requires_grad_()
        for name, spec in parameter_table(shape).items()
    }
    optimizer = reference_model.AdamW(weights, BETAS, EPS, DECAY, CLIP)
    losses, norms, gradients, masked = [], [], [], []
    for group, count in zip(batches(packed=packed, kind=kind), normalizers(kind)):
        value = sum(reference_model.loss(weights, shape, b.tensors(), count, values) for b in group)
        found = reference_model.gradients(weights, value)
        losses.append(value.item())
        norms.append(optimizer.step(found, LR))
        gradients.append({f"gradient/{name}": g for name, g in found.items()})
        masked.append(torch.cat([b.masked for b in group]))
    state = {f"weight/{name}": w.detach() for name, w in weights.items()}
    state |= {f"exp_avg/{name}": m for name, m in optimizer.m.items()}
    state |= {f"exp_avg_sq/{name}": v for name, v in optimizer.v.items()}
    return Truth(losses, norms, gradients, state, torch.stack(masked))
