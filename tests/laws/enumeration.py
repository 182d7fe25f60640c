"""Every mask of a short text, through the code that trains: the stages, collation, expansion, the model, the fused loss.

Only the random draws are taken over (`Dictated`): each sample is told its noise level and the set of its masked tokens, so
that a sum over samples is an exact expectation. Everything is float64. N rows of L tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional

import numpy as np
import torch

from data import randomness
from data.batch import MASKED, DiffusionBatch, Form, expand
from data.cfg_dropout import no_dropout
from data.compact import collate
from data.loader import StageOptions, corruption
from data.masking import MaskingOptions
from parallel.engine import LossOutput, model_inputs
from parallel.initialise import initialise
from parallel.mesh import build_mesh
from parallel.row_loss import RowLoss
from parallel.row_loss_cross_entropy import CROSS_ENTROPY
from pretrain.config import ModelConfig
from pretrain.model import DiffusionTransformer, model_shape

VOCAB, MASK, EOS, PAD = 5, 4, 0, 1
MODEL = ModelConfig(
    num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, ffn_hidden_size=24, vocab_size=VOCAB, init_std=0.5
)


def small_model(row_loss: RowLoss = CROSS_ENTROPY) -> DiffusionTransformer:
    """A float64 model whose predictions depend strongly on what it sees."""
    mesh = build_mesh()
    model = DiffusionTransformer(model_shape(MODEL), mesh, row_loss=row_loss)
    initialise(model, model.shape, mesh, 3)
    return model.double().eval()


def subsets(length: int) -> np.ndarray:
    """All masks, bool [2^L, L]."""
    return np.array(list(itertools.product((False, True), repeat=length)), bool)


@contextmanager
def dictated(levels: np.ndarray, masks: np.ndarray, noise: Optional[np.ndarray] = None) -> Iterator[None]:
    """Sample i gets noise level levels[i] (or [i, units]) and, of the tokens that may be masked, exactly masks[i]; where tokens are
    replaced by others, by noise[i]."""
    original = {name: getattr(randomness, name) for name in ("chance", "bernoulli", "words", "uniform")}

    def chance(seed, purpose, index, which=0, epoch=0):
        assert purpose.endswith("/noise_level")
        return float(np.ravel(levels[index])[0])

    def bernoulli(seed, purpose, index, count, probability, epoch=0):
        return masks[index, :count].copy()

    def words(seed, purpose, index, count, epoch=0):
        if purpose.endswith("/noise_order"):  # units in their own order
            return np.arange(count, dtype=np.uint64)
        if purpose.endswith("/corruption"):  # the id v of V is a number in [v, v + 1) * 2^32 / V
            ids = np.zeros(2 * count, np.uint32)
            ids[: masks.shape[1]] = np.ceil((noise[index] + 0.5) * 2**32 / VOCAB).astype(np.uint32)
            return ids.view(np.uint64)
        return np.where(masks[index, :count], 1, 2).astype(np.uint64)  # the lowest scores are masked

    def uniform(seed, purpose, index, count, epoch=0):
        if purpose.endswith("/noise_levels"):
            return np.asarray(levels[index])
        return np.where(masks[index, :count], 0.0, 2.0)  # below every probability, or above

    replaced = {"chance": chance, "bernoulli": bernoulli, "words": words, "uniform": uniform}
    try:
        for name, function in replaced.items():
            setattr(randomness, name, function)
        yield
    finally:
        for name, function in original.items():
            setattr(randomness, name, function)


def rows(
    tokens: np.ndarray,
    levels: np.ndarray,
    masks: np.ndarray,
    options: StageOptions,
    form: Form = MASKED,
    noise: Optional[np.ndarray] = None,
    **fields: Any,
) -> DiffusionBatch:
    """The training batch of N samples: tokens [L] or [N, L], levels [N] or [N, units], masks [N, L]; weights in float64."""
    count, length = masks.shape
    texts = np.broadcast_to(tokens, (count, length)).astype(np.uint16)
    samples = [{"sample_id": i, "tokens": texts[i], "length": length, **fields} for i in range(count)]
    chosen = replace(options, masking=replace(options.masking, t_sampling="iid"))
    with dictated(levels, masks, noise):
        drawn = list(no_dropout(corruption(chosen)(samples)))
    batch = expand(next(collate(drawn, count, PAD)), MASK, form)
    weights = np.stack([np.broadcast_to(_by_token(s, length), (length,)) for s in drawn])
    if batch.weight.shape[1] > length:
        weights = np.concatenate([weights, weights], 1)
    exact = torch.from_numpy(weights) * batch.masked
    assert torch.allclose(batch.weight.double(), exact, rtol=1e-6) or not form.weighting or form.shift
    if form.weighting and not form.shift:  # what the batch carries in float32, without its rounding
        batch.weight = exact
    else:
        batch.weight = batch.weight.double()
    return batch


def _by_token(sample: dict, length: int) -> np.ndarray:
    if "units" not in sample:
        return np.asarray(sample["weight"], np.float64)
    return np.asarray(sample["weight"], np.float64)[np.cumsum(sample["units"]) - 1]


def run(model: DiffusionTransformer, batch: DiffusionBatch, chunk: int = 4096) -> LossOutput:
    """The model and the fused loss on a whole batch, some rows at once."""
    outputs = []
    tensors = batch.tensors()
    with torch.no_grad():
        for start in range(0, len(batch.sample_ids), chunk):
            part = {name: x[start : start + chunk] for name, x in tensors.items()}
            outputs.append(model(**model_inputs(part, torch.device("cpu"), torch.ones((), dtype=torch.float64))))
    return LossOutput(sum(o.loss for o in outputs), *(torch.cat(columns) for columns in list(zip(*outputs))[1:]))


def row_losses(model: DiffusionTransformer, batch: DiffusionBatch) -> np.ndarray:
    """The weighted loss of each row, float64 [N]."""
    return (batch.weight * run(model, batch).value).sum(1).numpy()


def options(kind: str = "masked", **fields: Any) -> StageOptions:
    shift = fields.pop("shift", False)
    return StageOptions(MaskingOptions(0, 1, **({"eps": 0.0} | fields)), kind=kind, shift=shift, vocab_size=VOCAB)


def quadrature(nodes: int, low: float = 0.0, high: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [low, high]."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return low + (high - low) * 0.5 * (x + 1), (high - low) * 0.5 * w


def bernoulli_expectation(
    model: DiffusionTransformer, tokens: np.ndarray, stage: StageOptions, nodes: int, power: int = 1
) -> float:
    """E over t and masks of (the row's weighted loss)^power: quadrature over t in (0, 1], all masks at every node.

    Where the schedule is rough at 0 the integral is taken over u = 1 - alpha(t), dt = du / -alpha'(t).
    """
    masks, (levels, shares) = subsets(len(tokens)), quadrature(nodes)
    if stage.masking.schedule.kind == "polynomial" and stage.masking.schedule.power < 1:
        levels = np.array([stage.masking.schedule.time(u) for u in levels])
        shares = shares / [stage.masking.schedule.slope(t) for t in levels]
    batch = rows(tokens, np.repeat(levels, len(masks)), np.tile(masks, (nodes, 1)), stage)
    losses = row_losses(model, batch).reshape(nodes, len(masks))
    p = batch.p_mask[:, 0].double().numpy().reshape(nodes, len(masks))[:, :1]
    schedule = stage.masking.schedule.above(stage.masking.eps)
    exact = np.array([schedule.probability(t) for t in levels])[:, None]
    assert np.allclose(p, exact, rtol=1e-6)
    count = masks.sum(1)
    chance = exact**count * (1 - exact) ** (len(tokens) - count)
    return float((shares[:, None] * chance * losses**power).sum())


def fixed_count_expectation(
    model: DiffusionTransformer, tokens: np.ndarray, stage: StageOptions, power: int = 1
) -> float:
    """The same for exact counts: every count with the t-interval that leads to it, in it every mask of so many tokens."""
    length = len(tokens)
    schedule = stage.masking.schedule
    total = 0.0
    edges = [schedule.time(count / length) for count in range(length + 1)]
    for count, (before, after) in enumerate(zip(edges, edges[1:]), 1):
        masks = np.array([m for m in subsets(length) if m.sum() == count])
        batch = rows(tokens, np.full(len(masks), 0.5 * (before + after)), masks, stage)
        assert (batch.masked.sum(1) == count).all()
        total += (after - before) * float((row_losses(model, batch) ** power).mean())
    return total


def cross_entropies(model: DiffusionTransformer, tokens: np.ndarray) -> np.ndarray:
    """CE of every masked token under every mask, [2^L, L], 0 where it is not masked; masks in the order of `subsets`."""
    masks = subsets(len(tokens))
    batch = rows(tokens, np.full(len(masks), 0.5), masks, options())
    assert np.array_equal(batch.masked.numpy(), masks)
    return run(model, batch).ce.numpy()


def by_count(ce: np.ndarray) -> np.ndarray:
    """E_k for k = 1..L: the expected sum of CE with exactly k of L tokens masked, [L]."""
    masked = subsets(ce.shape[1]).sum(1)
    return np.array([ce[masked == k].sum(1).mean() for k in range(1, ce.shape[1] + 1)])


def any_order_probability(ce: np.ndarray) -> float:
    """p(x) of the model that reveals tokens one by one in a uniformly random order, by dynamic programming over revealed sets."""
    length = ce.shape[1]
    number = {tuple(mask): i for i, mask in enumerate(subsets(length).tolist())}
    probability = {(True,) * length: 1.0}  # masked set -> probability of all that is revealed
    for revealed in range(1, length + 1):
        for keep in itertools.combinations(range(length), revealed):
            mask = tuple(i not in keep for i in range(length))
            steps = []
            for i in keep:  # the token revealed last
                before = tuple(m or j == i for j, m in enumerate(mask))
                steps.append(probability[before] * np.exp(-ce[number[before], i]))
            probability[mask] = float(np.mean(steps))
    return probability[(False,) * length]


def all_texts(length: int, vocab: int = VOCAB) -> np.ndarray:
    """Every text, [V^L, L]."""
    return np.array(list(itertools.product(range(vocab), repeat=length)), np.int64)
