"""The laws of the other objectives: exact likelihoods, blocks, shift, uniform noise; enumerated through the code that trains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.batch import Form, expand
from data.cfg_dropout import no_dropout
from data.compact import collate
from data.loader import corruption
from parallel.loss import diffusion_loss
from parallel.row_loss_uniform import UniformBound
from parallel.row_losses import row_loss
from tests.laws import enumeration as law

V = law.VOCAB
TEXT = np.array([2, 0, 3, 1], np.int64)


@pytest.fixture(scope="module")
def model():
    return law.small_model()


def everything_counted(texts: np.ndarray, kind: str, form: Form):
    """Rows in which each token is to be predicted: texts [N, L]."""
    masks = np.ones(texts.shape, bool)
    unit = {"unit": "block", "block_size": form.block_size, "masking": "fixed_count"} if kind == "block" else {}
    levels = np.ones(len(texts)) if kind != "block" else np.ones((len(texts), texts.shape[1] // form.block_size))
    return law.rows(texts, levels, masks, law.options(kind, **unit), form)


# --- autoregressive


def test_the_autoregressive_likelihood_is_a_distribution(model):
    """exp(-loss) sums to 1 over all texts: nothing looks at the token that it predicts, nothing is left out."""
    texts = law.all_texts(3)
    batch = everything_counted(texts, "autoregressive", Form("autoregressive", start_id=law.EOS))
    losses = law.row_losses(model, batch)
    assert np.exp(-losses).sum() == pytest.approx(1, rel=1e-12)
    assert np.ptp(losses) > 1


def test_an_autoregressive_token_depends_on_those_before_it_alone(model):
    texts = law.all_texts(3)
    batch = everything_counted(texts, "autoregressive", Form("autoregressive", start_id=law.EOS))
    ce = law.run(model, batch).ce.numpy()
    for i in range(3):
        same = {}
        for text, costs in zip(texts.tolist(), ce):
            same.setdefault(tuple(text[: i + 1]), []).append(costs[i])
        assert max(np.ptp(costs) for costs in same.values()) < 1e-12
        assert np.ptp([costs[0] for costs in same.values()]) > 0.3


# --- blocks


def blocks_expectation(model, text: np.ndarray, size: int, masking: str) -> float:
    """E of the block loss: all combinations of masks of all blocks; over each block's t by quadrature or by its counts."""
    count = len(text) // size
    stage, form = law.options("block", unit="block", block_size=size, masking=masking), Form("block", block_size=size)
    masks = law.subsets(size)
    total = 0.0
    for block in range(count):  # the loss is a sum over blocks, and a block's depends on its own draws alone
        levels, chances, chosen = [], [], []
        if masking == "bernoulli":
            for t, share in zip(*law.quadrature(6)):
                for mask in masks:
                    k = mask.sum()
                    levels.append(t)
                    chances.append(share * t**k * (1 - t) ** (size - k))
                    chosen.append(mask)
        else:
            for mask in masks[1:]:
                k = mask.sum()
                levels.append((k - 0.5) / size)
                chances.append(1 / size / math.comb(size, k))
                chosen.append(mask)
        t = np.full((len(levels), count), 0.5)
        t[:, block] = levels
        drawn = np.ones((len(levels), len(text)), bool)
        drawn[:, block * size : (block + 1) * size] = chosen
        batch = law.rows(text, t, drawn, stage, form)
        values = (batch.weight * law.run(model, batch).value).numpy()[:, block * size : (block + 1) * size].sum(1)
        total += float(np.dot(chances, values))
    return total


def block_costs(model, text: np.ndarray, size: int) -> list[np.ndarray]:
    """For each block the CE of its masked tokens under every mask of it, [2^S, S]: the blocks before it are clean."""
    found, masks = [], law.subsets(size)
    for block in range(len(text) // size):
        drawn = np.ones((len(masks), len(text)), bool)
        inside = slice(block * size, (block + 1) * size)
        drawn[:, inside] = masks
        stage = law.options("block", unit="block", block_size=size)
        levels = np.full((len(masks), len(text) // size), 0.5)
        batch = law.rows(text, levels, drawn, stage, Form("block", block_size=size))
        found.append(law.run(model, batch).ce.numpy()[:, inside])
    return found


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_block_loss_is_the_sum_of_the_blocks_bounds(model, size, masking):
    """sum over blocks of sum_k E_k / k."""
    expected = sum(float((law.by_count(ce) / np.arange(1, size + 1)).sum()) for ce in block_costs(model, TEXT, size))
    assert blocks_expectation(model, TEXT, size, masking) == pytest.approx(expected, rel=1e-12)


def test_blocks_of_one_token_are_autoregressive(model):
    """Each token is predicted from the clean tokens before it; exp(-loss) sums to 1 over all texts."""
    texts = law.all_texts(3)
    losses = law.row_losses(model, everything_counted(texts, "block", Form("block", block_size=1)))
    assert np.exp(-losses).sum() == pytest.approx(1, rel=1e-12) and np.ptp(losses) > 1
    assert losses[7] == pytest.approx(blocks_expectation(model, texts[7], 1, "bernoulli"), rel=1e-12)


def test_one_block_of_the_whole_text_is_masked_diffusion(model):
    assert np.allclose(block_costs(model, TEXT, 4)[0], law.cross_entropies(model, TEXT), rtol=1e-12, atol=1e-12)


def test_the_block_likelihood_is_a_distribution_below_the_bound(model):
    """p(x) = product over blocks of the any-order probability of a block given the clean ones before it; it sums to 1."""
    total = 0.0
    for text in law.all_texts(4, 3):  # texts of three of the ids, and what is left for the others
        costs = block_costs(model, text, 2)
        p = math.prod(law.any_order_probability(ce) for ce in costs)
        bound = sum(float((law.by_count(ce) / [1, 2]).sum()) for ce in costs)
        assert bound >= -math.log(p) - 1e-12
        total += p
    assert 0 < total < 1
    pairs = [
        law.any_order_probability(block_costs(model, np.array([*TEXT[:2], *text]), 2)[1]) for text in law.all_texts(2)
    ]
    assert sum(pairs) == pytest.approx(1, rel=1e-12)


# --- shift


def shifted_costs(model, text: np.ndarray) -> np.ndarray:
    """CE of every token but the given first one under every mask of them, [2^(L-1), L-1]."""
    masks = np.array([[True, *mask] for mask in law.subsets(len(text) - 1)])
    batch = law.rows(text, np.full(len(masks), 0.5), masks, law.options(shift=True), Form(shift=True))
    assert np.array_equal(batch.masked.numpy()[:, :-1], masks[:, 1:]) and not batch.masked[:, -1].any()
    assert (batch.noisy_ids[:, 0] == int(text[0])).all()
    return law.run(model, batch).ce.numpy()[:, :-1]


def test_shifted_predictions_are_a_distribution_given_the_first_token(model):
    """Off by one anywhere, a token would see itself or be predicted twice, and this would not sum to 1."""
    texts = law.all_texts(2)
    p = [law.any_order_probability(shifted_costs(model, np.array([2, *text]))) for text in texts]
    assert sum(p) == pytest.approx(1, rel=1e-12) and np.ptp(p) > 0.01


def test_the_shifted_hidden_state_is_the_one_before(model):
    """Token i is predicted from the logits at i - 1 of the same noisy row."""
    text, mask = TEXT, np.array([[True, False, True, True]])
    batch = law.rows(text, np.array([0.5]), mask, law.options(shift=True), Form(shift=True))
    with torch.no_grad():
        logits = model(batch.noisy_ids, batch.position_ids)[0]
    expected = -logits.log_softmax(-1)[[1, 2], [3, 1]]
    assert law.run(model, batch).ce[0, [1, 2]].tolist() == pytest.approx(expected.tolist(), rel=1e-12)


# --- uniform noise


def uniform_bound(model, text: np.ndarray, eps: float, nodes: int) -> float:
    """The loss of training, expected over t in quadrature and over all corrupted texts."""
    states, stage = law.all_texts(len(text)), law.options("uniform", eps=eps)
    total = 0.0
    for t, share in zip(*law.quadrature(nodes)):
        alpha = 1 - (eps + (1 - 2 * eps) * t)
        chance = np.where(states == text, alpha + (1 - alpha) / V, (1 - alpha) / V).prod(1)
        masks = np.ones(states.shape, bool)
        batch = law.rows(text, np.full(len(states), t), masks, stage, Form("uniform"), noise=states)
        assert np.array_equal(batch.noisy_ids.numpy(), states)
        assert torch.allclose(batch.alpha.double(), torch.tensor(alpha, dtype=torch.float64), atol=1e-6)
        batch.alpha = torch.full_like(batch.weight, alpha)  # without float32's rounding
        total += share * float((chance * law.row_losses(model, batch)).sum())
    return total


def discrete_bound(predictions: np.ndarray, states: np.ndarray, text: np.ndarray, alphas: np.ndarray) -> float:
    """sum over steps of E KL(q(z_s | z_t, x) || p(z_s | z_t)): D3PM (Austin et al., arXiv 2107.03006), from the posteriors.

    predictions: x_theta of each state, [V^L, L, V]; alphas: from nearly 1 to nearly 0.
    """
    eye, total = np.eye(V), 0.0
    for s, t in zip(alphas[:-1], alphas[1:]):
        ratio = t / s

        def posterior(clean: np.ndarray, s=s, t=t, ratio=ratio) -> np.ndarray:
            back = ratio * eye[states] + (1 - ratio) / V
            forward = s * clean + (1 - s) / V
            there = np.take_along_axis(t * clean + (1 - t) / V, states[..., None], -1)
            return back * forward / there

        q, p = posterior(np.broadcast_to(eye[text], predictions.shape)), posterior(predictions)
        assert np.allclose(p.sum(-1), 1)
        chance = np.where(states == text, t + (1 - t) / V, (1 - t) / V).prod(1)
        total += float((chance * (q * np.log(q / p)).sum((1, 2))).sum())
    return total


@pytest.fixture(scope="module")
def uniform_model():
    return law.small_model(row_loss("uniform"))


def test_the_uniform_loss_is_the_limit_of_the_discrete_bound(uniform_model):
    """The rate form of training against KLs of posteriors over ever finer steps: the gap halves with the step."""
    text, states = TEXT[:2], law.all_texts(2)
    eps = 0.02
    with torch.no_grad():
        ids = torch.from_numpy(states)
        predictions = uniform_model(ids, torch.arange(2).expand(ids.shape)).softmax(-1).numpy()
    found = uniform_bound(uniform_model, text, eps, 60)
    gaps = []
    for steps in (1000, 2000, 4000):
        alphas = np.linspace(1 - eps, eps, steps + 1)
        gaps.append(abs(discrete_bound(predictions, states, text, alphas) - found))
    assert gaps[2] < 1e-3 * found
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.1) and gaps[0] / gaps[1] == pytest.approx(2, rel=0.1)


def test_the_uniform_bound_is_above_the_model_s_own_likelihood(uniform_model):
    """p(x) of the reverse chain from pure noise, with 3000 steps, all V^L states."""
    text, states = TEXT[:2], law.all_texts(2)
    with torch.no_grad():
        ids = torch.from_numpy(states)
        clean = uniform_model(ids, torch.arange(2).expand(ids.shape)).softmax(-1).numpy()
    eye = np.eye(V)
    law_of_state = np.full(len(states), 1 / len(states))
    alphas = np.linspace(0, 1, 3001)
    for t, s in zip(alphas[:-1], alphas[1:]):
        ratio = t / s
        back = ratio * eye[states] + (1 - ratio) / V
        forward = s * clean + (1 - s) / V
        there = np.take_along_axis(t * clean + (1 - t) / V, states[..., None], -1)
        step = back * forward / there  # [V^L, L, V]
        to = np.einsum("zi,zj->zij", step[:, 0], step[:, 1]).reshape(len(states), -1)
        law_of_state = law_of_state @ to
    assert law_of_state.sum() == pytest.approx(1)
    exact = -math.log(law_of_state[(states == text).all(1)][0])
    found = uniform_bound(uniform_model, text, 1e-3, 80)
    assert exact < found < exact + 3


def test_the_true_law_reaches_the_entropy():
    """One token from a known law. Predicting that law makes pbar_y / pbar_z the ratio of the true marginals at every t, so that the
    reverse rates are exact and the bound is the entropy (the posterior given z is not what minimises it: pbar is a plug-in).
    """
    data = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03], dtype=torch.float64)
    x, z = (i.flatten() for i in torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij"))
    counted, same, eps = torch.ones(len(x), dtype=torch.bool), (x == z).double(), 1e-6
    eye = torch.eye(V, dtype=torch.float64)

    def bound(logits, kind: UniformBound = UniformBound()) -> float:  # noqa: B008
        total = 0.0
        said = logits if callable(logits) and not isinstance(logits, torch.Tensor) else lambda alpha: logits
        for t, share in zip(*law.quadrature(300, eps, 1 - eps)):
            alpha = 1 - t
            chance = data[x] * (alpha * same + (1 - alpha) / V)
            table = said(alpha).expand(len(x), V).contiguous()
            alphas = torch.full((len(x),), alpha, dtype=torch.float64)
            found = diffusion_loss(
                table, eye, x, counted, chance / alpha, 1.0, vocab_size=V, row_loss=kind, current=z, alpha=alphas
            )
            total += share * float(found.loss)
        return total

    entropy = float(-(data * data.log()).sum())
    assert bound(data.log()) == pytest.approx(entropy, rel=1e-4)
    assert bound(torch.zeros(V, dtype=torch.float64)) > entropy + 0.1

    def posterior(alpha: float) -> torch.Tensor:  # of each row's z
        likelihood = alpha * torch.eye(V, dtype=torch.float64) + (1 - alpha) / V
        return (data * likelihood[z]).log()

    assert bound(posterior) > entropy + 0.1
    assert bound(posterior, UniformBound(posterior=True)) == pytest.approx(entropy, rel=1e-4)


def test_the_draws_of_training_estimate_the_uniform_bound(uniform_model):
    count, eps, text = 20_000, 0.02, TEXT[:2]
    stage = law.options("uniform", eps=eps, t_sampling="iid")
    samples = ({"sample_id": i, "tokens": text.astype(np.uint16), "length": 2} for i in range(count))
    compact = next(collate(no_dropout(corruption(stage)(samples)), count, law.PAD))
    batch = expand(compact, law.MASK, Form("uniform"))
    batch.weight = batch.weight.double()
    losses = law.row_losses(uniform_model, batch)
    exact = uniform_bound(uniform_model, text, eps, 60)
    assert abs(losses.mean() - exact) < 3 * losses.std() / math.sqrt(count)
