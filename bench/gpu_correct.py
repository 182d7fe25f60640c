"""The model on this device against the float64 reference: loss, gradients, and who sees whom.

The reference (tests/reference_model.py) shares no code with the product. Both get the same weights, rounded to bfloat16
once, so that what is compared is arithmetic alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu_cases import BACKENDS, CorrectCase, correct_cases, sight_label
from bench.gpu_task import Work, attention_backend, forget_compiled
from data.batch import DiffusionBatch, expand
from data.compact import CompactBatch
from parallel.engine import model_inputs
from parallel.mesh import Mesh, build_mesh
from parallel.shape import ModelShape, parameter_table
from pretrain.model import DiffusionTransformer
from tests import reference_model

MASK = 0
# Largest relative error that is taken for rounding: of (loss, all gradients, the worst gradient). bfloat16 rounds by at
# most 2**-8 = 0.4% each time and a gradient passes a few dozen roundings, mostly independent; float32 by 6e-8. A wrong
# mask, scale or head would be off by 10% or more.
EXPECTED = {"float32": (1e-5, 1e-4, 1e-3), "bfloat16": (5e-3, 3e-2, 6e-2)}
SEEN = 1e-3  # a logit that moves by more than this has seen the change


def random_batch(samples: int, tokens: int, vocab: int, seed: int, p_mask: float = 0.5) -> DiffusionBatch:
    """Random tokens, each masked with probability `p_mask`, no padding; a token with weight 1 / p_mask."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(MASK + 1, vocab, (samples, tokens)).astype(np.uint32)
    masks = rng.random((samples, tokens)) < p_mask
    level = np.full(samples, p_mask, np.float32)
    return expand(CompactBatch(
        tokens=ids, mask_bits=np.packbits(masks, axis=1), length=np.full(samples, tokens, np.int32),
        prompt_bits=None, border_bits=None, source=np.zeros(samples, np.int16),
        bad_shard=np.full(samples, -1, np.int32), digest=np.zeros(samples, np.int64), t=level, p_mask=level,
        dropped=np.zeros(samples, bool), sample_ids=np.arange(samples),
    ), MASK)  # fmt: skip


def cut_in_two(batch: DiffusionBatch) -> DiffusionBatch:
    """The same tokens as two documents per sample, positions counted anew in the second."""
    half = batch.document_ids.shape[1] // 2
    batch.document_ids[:, half:] = 1
    batch.position_ids[:, half:] -= half
    return batch


def small_weights(shape: ModelShape, seed: int) -> dict[str, Tensor]:
    """Random full weights by name, float64 with bfloat16 values; norm gains away from 1, so that they count."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, spec in parameter_table(shape).items():
        values = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        weights[name] = (1 + values / 10 if spec.std is None else values * spec.std).bfloat16().double()
    return weights


def build(
    shape: ModelShape, mesh: Mesh, weights: dict[str, Tensor], dtype: torch.dtype, device: str
) -> DiffusionTransformer:
    """The product's model with these weights."""
    model = DiffusionTransformer(shape, mesh)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()  # the padding of the vocabulary
            parameter[: weights[name].shape[0]].copy_(weights[name])
    return model.to(device, dtype)


def relative_errors(
    loss: Tensor, gradients: dict[str, Tensor], loss_ref: Tensor, gradients_ref: dict[str, Tensor]
) -> tuple[float, float, float, str]:
    """(of the loss, of all gradients together, of the worst parameter's gradient, its name); L2 norms."""
    squares = {n: (float((gradients[n] - g).square().sum()), float(g.square().sum())) for n, g in gradients_ref.items()}
    each = {name: (wrong / right) ** 0.5 for name, (wrong, right) in squares.items()}
    worst = max(each, key=each.__getitem__)
    together = (sum(w for w, _ in squares.values()) / sum(r for _, r in squares.values())) ** 0.5
    return float((loss.double().cpu() - loss_ref).abs() / loss_ref.abs()), together, each[worst], worst


def _compare(work: Work, shape: ModelShape, mesh: Mesh, case: CorrectCase, cells: dict[str, Any]) -> None:
    weights = small_weights(shape, seed=1)
    batch = random_batch(2, work.sizes.small_tokens, shape.vocab_size, seed=2)
    batch = cut_in_two(batch) if case.documents else batch
    normalizer = float(batch.eligible.sum())
    for weight in weights.values():
        weight.requires_grad_()
    loss_ref = reference_model.loss(weights, shape, batch.tensors(), normalizer)
    gradients_ref = reference_model.gradients(weights, loss_ref)

    model = build(shape, mesh, weights, getattr(torch, case.precision), work.device)
    if case.compiled:
        forget_compiled()
        for block in model.blocks.values():
            block.compute = torch.compile(block._compute, backend=work.sizes.compiler)
    with attention_backend(case.backend):
        denominator = torch.tensor(normalizer, dtype=torch.float64, device=work.device)
        loss = model(**model_inputs(batch.tensors(), torch.device(work.device), denominator)).loss
        loss.backward()
    gradients = {n: p.grad.double().cpu()[: weights[n].shape[0]] for n, p in model.named_parameters()}
    errors = relative_errors(loss.detach(), gradients, loss_ref.detach(), gradients_ref)
    expected = EXPECTED[case.precision]
    cells |= dict(zip(("loss", "all gradients", "worst gradient", "worst parameter"), errors, strict=True))
    cells["expected"] = "< " + ", ".join(f"{x:g}" for x in expected)
    cells["met"] = all(got < limit for got, limit in zip(errors, expected, strict=False))


@torch.no_grad()
def _change_seen(work: Work, model: DiffusionTransformer, backend: str, documents: bool) -> float:
    """Largest change of any logit of the first half when the last token becomes another one."""
    batch = random_batch(2, work.sizes.small_tokens, model.shape.vocab_size, seed=3)
    batch = cut_in_two(batch) if documents else batch
    inputs = model_inputs(batch.tensors(), torch.device(work.device), torch.ones((), device=work.device))
    inputs = {name: inputs[name] for name in ("inputs", "position_ids", "document_ids")}
    with attention_backend(backend):
        before = model(**inputs)
        ids = inputs["inputs"].clone()
        ids[:, -1] = ids[:, -1] % (model.shape.vocab_size - 1) + 1
        after = model(**inputs | {"inputs": ids})
    half = work.sizes.small_tokens // 2
    return float((after - before)[:, :half].float().abs().max())


def run(work: Work) -> None:
    shape, mesh = ModelShape(**work.sizes.small), build_mesh()
    table = work.table("correct")
    for case in correct_cases():
        if not work.late(table, case.label):
            with work.row(table, case.label) as cells:
                _compare(work, shape, mesh, case, cells)
    model = build(shape, mesh, small_weights(shape, seed=1), torch.bfloat16, work.device)
    table = work.table("sight")
    for backend, documents in [(b, False) for b in BACKENDS] + [("default", True)]:
        label = sight_label(backend, documents)
        with work.row(table, label) as cells:
            change = _change_seen(work, model, backend, documents)
            cells["change"] = change
            cells["expected"] = "exactly 0" if documents else f"> {SEEN:g}"
            cells["met"] = change == 0 if documents else change > SEEN
