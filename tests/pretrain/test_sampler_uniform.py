"""Laws of the samplers of uniform-state noise: steps and whole chains against enumeration, with networks that are exact tables.

Pairs of tokens over the ids 0, 1, 2 with a joint law; id 3 is the mask token, which noise may give and data never holds. A row is
PAIRS independent pairs.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from pretrain.predictor import Objective
from pretrain.sampling.sampler import SamplingOptions, generate
from pretrain.sampling.uniform import levels
from tests.pretrain.test_sampler import one_thread  # noqa: F401  for every test of this file

N, MASK, ROWS, PAIRS = 4, 3, 40, 500
SAMPLES = ROWS * PAIRS
JOINT = np.zeros((N, N))
JOINT[:3, :3] = [[0.30, 0.02, 0.08], [0.01, 0.25, 0.04], [0.05, 0.05, 0.20]]
STATES = list(itertools.product(range(N), repeat=2))


def forward(alpha: float) -> np.ndarray:
    """q(z | x) of uniform-state noise, [x, z]."""
    return alpha * np.eye(N) + (1 - alpha) / N


def posterior(alpha: float, z: tuple[int, int]) -> np.ndarray:
    """p(x | z) of both clean tokens together, [x0, x1], by Bayes' rule."""
    seen = JOINT * np.outer(forward(alpha)[:, z[0]], forward(alpha)[:, z[1]])
    return seen / seen.sum()


def given_others(alpha: float, z: tuple[int, int]) -> np.ndarray:
    """p(x_i | the noisy tokens at the other places), [i, x]: what the bound of kind uniform teaches."""
    q = forward(alpha)
    laws = np.stack([JOINT @ q[:, z[1]], JOINT.T @ q[:, z[0]]])
    return laws / laws.sum(axis=1, keepdims=True)


def given_all(alpha: float, z: tuple[int, int]) -> np.ndarray:
    """p(x_i | all noisy tokens), [i, x]: what cross-entropy teaches."""
    both = posterior(alpha, z)
    return np.stack([both.sum(axis=1), both.sum(axis=0)])


def denoising_kernel(alpha_t: float, alpha_s: float) -> np.ndarray:
    """[z_t, z_s] over STATES: each token from sum_x q(z_s | z_t, x) p(x | all of z_t) (D3PM), tokens independent. Plain Bayes."""
    q_t, q_s = forward(alpha_t), forward(alpha_s)
    between = forward(alpha_t / alpha_s if alpha_s else 0.0)
    kernel = np.zeros((len(STATES), len(STATES)))
    for row, z in enumerate(STATES):
        laws, clean = np.zeros((2, N)), given_all(alpha_t, z)
        for i, y, x in itertools.product(range(2), range(N), range(N)):
            laws[i, y] += between[y, z[i]] * q_s[x, y] / q_t[x, z[i]] * clean[i, x]
        kernel[row] = np.outer(*laws).flatten()
    return kernel


def renoising_kernel(posterior_alpha: float, keep: float) -> np.ndarray:
    """[z_t, z_s]: the prediction is shown on with probability keep, else one of the three other ids."""
    shown = np.full((N, N), (1 - keep) / (N - 1))
    np.fill_diagonal(shown, keep)
    return np.stack([np.outer(*(given_all(posterior_alpha, z) @ shown)).flatten() for z in STATES])


class Table:
    """A network that knows the law exactly; it is told the noise level by the number of the forward."""

    def __init__(self, law, alphas):
        self.law, self.alphas, self.calls = law, alphas, 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        with np.errstate(divide="ignore"):
            table = np.log(np.stack([self.law(self.alphas[self.calls], z) for z in STATES]))
        self.calls += 1
        return torch.from_numpy(table)[states(ids)].flatten(1, 2)


def states(ids: torch.Tensor) -> torch.Tensor:
    """The number of each pair's state, [B, PAIRS]."""
    return ids[:, ::2] * N + ids[:, 1::2]


def run(network, kind: str, steps: int, signal=None, temperature: float = 1.0, ids=None):
    """The number of the state of each pair after each step, [steps, SAMPLES]."""
    ids = torch.full((ROWS, 2 * PAIRS), MASK) if ids is None else ids
    frames = []
    done = generate(
        network,
        ids,
        ids != MASK,
        mask_id=MASK,
        vocab_size=N,
        objective=Objective(kind),
        signal=signal,
        options=SamplingOptions(steps=steps, temperature=temperature, seed=3),
        on_step=lambda step, now: frames.append(now),
    )
    assert len(frames) == steps and torch.equal(frames[-1], done)
    return np.stack([states(frame).flatten().numpy() for frame in frames])


def agree(observed_states: np.ndarray, law: np.ndarray) -> None:
    """A chi-square test at 1e-3 over the states that can occur, and none of the others occurs."""
    observed = np.bincount(observed_states, minlength=len(law))
    possible = law > 1e-15
    assert not observed[~possible].any()
    assert chisquare(observed[possible], law[possible] / law[possible].sum() * observed.sum()).pvalue > 1e-3


START = np.full(len(STATES), 1 / len(STATES))
CURVES = {"linear": None, "concave": lambda t: math.cos(0.5 * math.pi * t)}


@pytest.mark.parametrize("curve", CURVES)
def test_each_step_and_the_whole_chain_of_ancestral_sampling_have_the_enumerated_law(curve):
    signal = CURVES[curve]
    alphas = levels(signal or (lambda t: 1 - t), 4)
    frames = run(Table(given_others, alphas), "uniform", 4, signal)
    law = START
    for step, (alpha_t, alpha_s) in enumerate(zip(alphas, alphas[1:])):
        kernel = denoising_kernel(alpha_t, alpha_s)
        if step:  # one step: the law of (before, after) together
            pairs = frames[step - 1] * len(STATES) + frames[step]
            together = (law[:, None] * kernel).flatten()
            likely = together > 5 / SAMPLES  # rarer pairs are summed up
            counts = np.bincount(pairs, minlength=len(together))
            observed = np.append(counts[likely], counts[~likely].sum())
            expected = np.append(together[likely], together[~likely].sum())
            assert chisquare(observed, expected * SAMPLES / expected.sum()).pvalue > 1e-3
            assert not counts[together < 1e-15].any()
        law = law @ kernel
        agree(frames[step], law)
    assert law.reshape(N, N)[3].sum() + law.reshape(N, N)[:, 3].sum() < 1e-12, "the mask token does not come out"
    assert (frames[:-1] % N == MASK).any(), "on the way it does"


def distance(law: np.ndarray) -> float:
    """Total variation from the data's law."""
    return 0.5 * np.abs(law - JOINT.flatten()).sum()


def test_with_more_steps_the_samples_follow_the_law_of_the_data():
    """One step gives the product of the marginals; errors fall like 1 / steps; 128 steps are within noise of the joint law."""
    found = {}
    for steps in (1, 2, 8, 32, 128):
        alphas = levels(lambda t: 1 - t, steps)
        law = START
        for alpha_t, alpha_s in zip(alphas, alphas[1:]):
            law = law @ denoising_kernel(alpha_t, alpha_s)
        found[steps] = distance(law)
    assert found[1] == pytest.approx(distance(np.outer(JOINT.sum(1), JOINT.sum(0)).flatten())) and found[1] > 0.3
    assert all(found[4 * k] < 0.4 * found[k] for k in (2, 8, 32)) and found[128] < 0.01
    frames = run(Table(given_others, levels(lambda t: 1 - t, 128)), "uniform", 128)
    observed = np.bincount(frames[-1], minlength=len(STATES)) / SAMPLES
    noise = (
        0.5 * np.sqrt(2 * JOINT * (1 - JOINT) / (np.pi * SAMPLES)).sum()
    )  # what a true sample of this size is off by
    assert distance(observed) < found[128] + 2 * noise


def test_the_law_given_all_other_tokens_is_what_the_bound_of_kind_uniform_teaches():
    """Its gradient in the logits vanishes there, summed over the data and the noise; at p(x | all tokens) it does not."""
    alpha = 0.6
    q, gradients = forward(alpha), {}
    for name, law in (("others", given_others), ("all", given_all)):
        worst = 0.0
        for z in STATES:
            weight = JOINT * np.outer(q[:, z[0]], q[:, z[1]])  # p(x, z)
            logits = torch.log(torch.from_numpy(law(alpha, z)[0]).clamp(min=1e-300))[:3].requires_grad_()
            p = torch.cat((torch.softmax(logits, 0), torch.zeros(1, dtype=torch.float64)))
            predicted = N * alpha * p + (1 - alpha)
            loss = torch.zeros((), dtype=torch.float64)
            for x in range(3):
                clean = N * alpha * torch.eye(N, dtype=torch.float64)[x] + (1 - alpha)
                a, b = clean / clean[z[0]], predicted / predicted[z[0]]
                bracket = a * torch.log(a / b) - a + b
                loss = loss + weight[x].sum() * (bracket.sum() - bracket[z[0]])
            (gradient,) = torch.autograd.grad(loss, logits)
            worst = max(worst, float(gradient.abs().max()))
        gradients[name] = worst
    assert gradients["others"] < 1e-15 and gradients["all"] > 1e-3


def test_each_step_and_the_whole_chain_of_renoising_have_the_enumerated_law():
    alphas = levels(lambda t: 1 - t, 3)
    frames = run(Table(given_all, alphas), "flow", 3)
    law = START
    for step, alpha in enumerate(alphas[1:]):
        law = law @ renoising_kernel(alphas[step], alpha + (1 - alpha) / N)
        agree(frames[step], law)


def test_renoising_lands_on_the_law_that_corruption_gives_to_each_token_alone():
    """With the exact posterior of one token every step gives exactly the law that it has at the next level."""
    signal = lambda t: math.cos(0.5 * math.pi * t)  # noqa: E731
    alphas = levels(signal, 5)
    marginal = JOINT.sum(axis=1)

    def alone(alpha, z):
        seen = marginal[:, None] * forward(alpha)[:, list(z)]
        return (seen / seen.sum(axis=0)).T

    frames = run(Table(alone, alphas), "flow", 5, signal)
    for frame, alpha in zip(frames, alphas[1:]):
        agree(frame // N, marginal @ forward(alpha))


@pytest.mark.parametrize("kind", ["uniform", "flow"])
def test_one_step_takes_the_prediction_from_pure_noise_and_temperature_sharpens_it(kind):
    logits = torch.tensor([[0.0, 1.0, -1.0, 9.0], [2.0, 0.0, 0.5, 9.0]], dtype=torch.float64)
    for temperature in (0.5, 1.0):
        frames = run(lambda ids: logits.repeat(PAIRS, 1).expand(len(ids), -1, N), kind, 1, temperature=temperature)
        tokens = [torch.softmax(row[:3] / temperature, 0).numpy() for row in logits]
        law = np.zeros((N, N))
        law[:3, :3] = np.outer(*tokens)
        agree(frames[0], law.flatten())
    assert set(
        run(lambda ids: logits.repeat(PAIRS, 1).expand(len(ids), -1, N), kind, 1, temperature=0.0)[0].tolist()
    ) == {1 * N + 0}


@pytest.mark.parametrize("kind", ["uniform", "flow"])
def test_a_given_token_stays_and_is_seen(kind):
    """The first token is given: the second follows its law given the first."""
    ids = torch.full((ROWS, 2 * PAIRS), MASK)
    ids[:, ::2] = 1
    conditional = JOINT[1] / JOINT[1].sum()
    with np.errstate(divide="ignore"):
        logits = torch.from_numpy(np.log(np.stack([JOINT / JOINT.sum(1).clip(1e-9)[:, None]] * 2, 1)))
    frames = run(lambda ids: logits[ids[:, ::2]].flatten(1, 2), kind, 1, ids=ids)
    assert (frames[0] // N == 1).all()
    agree(frames[0] % N, conditional)


def test_levels_end_exactly_and_refuse_what_rises_with_noise():
    assert levels(lambda t: 0.9 - 0.5 * t, 4) == pytest.approx([0.0, 0.525, 0.65, 0.775, 1.0])
    assert levels(lambda t: 1.0 + 1e-16 * t, 3) == [0.0, 1.0, 1.0, 1.0] and levels(lambda t: 5.0, 1) == [0.0, 1.0]
    for wrong in (lambda t: t, lambda t: 1 + t, lambda t: float("nan")):
        with pytest.raises(ValueError, match="fall from 1 to 0"):
            levels(wrong, 4)
    with pytest.raises(ValueError, match="vocab_size"):
        ids = torch.full((1, 2), MASK)
        generate(lambda i: i, ids, ids != MASK, mask_id=MASK, options=SamplingOptions(), objective=Objective("uniform"))
