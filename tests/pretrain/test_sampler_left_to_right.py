"""Laws of autoregressive sampling: the exact joint law, temperature and top-p, the end of a text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from pretrain.predictor import Objective
from pretrain.sampling.left_to_right import nucleus
from pretrain.sampling.sampler import SamplingOptions, generate
from tests.pretrain.test_sampler import one_thread  # noqa: F401  for every test of this file

V, MASK, ROWS = 4, 3, 20_000
TEXTS = list(itertools.product(range(3), repeat=3))


def joint() -> np.ndarray:
    generator = np.random.default_rng(5)
    law = generator.random((3, 3, 3)) ** 3
    return law / law.sum()


def next_token(law: np.ndarray, before: tuple[int, ...]) -> np.ndarray:
    """p(x_i | x_0 .. x_{i-1}) [3]."""
    rest = law[before]
    rest = rest.reshape(3, -1).sum(axis=1)
    return rest / rest.sum()


class LeftToRight:
    """The exact conditionals of a joint law of three tokens, unknown where a token on the left is still a mask."""

    def __init__(self, law: np.ndarray):
        self.table = torch.full((V, V, 3, V), torch.nan, dtype=torch.float64)  # by the first two tokens
        for a, b in itertools.product(range(V), repeat=2):
            self.table[a, b, 0] = self._row(next_token(law, ()))
            if a < 3:
                self.table[a, b, 1] = self._row(next_token(law, (a,)))
            if a < 3 and b < 3:
                self.table[a, b, 2] = self._row(next_token(law, (a, b)))
        self.calls = 0

    @staticmethod
    def _row(p: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.append(np.log(p), 50.0))  # wants the mask token more than anything

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.table[ids[:, 0], ids[:, 1]]


def run(network, ids, **more):
    words = {name: more.pop(name) for name in ("eos_id", "on_step", "first_row", "forbidden_ids") if name in more}
    return generate(
        network,
        ids,
        ids != MASK,
        mask_id=MASK,
        objective=Objective("autoregressive"),
        options=SamplingOptions(**more),
        **words,
    )


def plain_top_p(p: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest likeliest tokens that reach top_p, one after the other."""
    kept, reached = np.zeros_like(p), 0.0
    for token in sorted(range(len(p)), key=lambda v: (-p[v], v)):
        if reached >= top_p:
            break
        kept[token], reached = p[token], reached + p[token]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8), (1.0, 0.7)])
def test_texts_follow_the_product_of_tempered_and_cut_conditionals_exactly(temperature, top_p):
    law = joint()
    done = run(LeftToRight(law), torch.full((ROWS, 3), MASK), temperature=temperature, top_p=top_p, seed=1)
    expected = []
    for text in TEXTS:
        probability = 1.0
        for i, token in enumerate(text):
            p = next_token(law, text[:i]) ** (1 / temperature)
            probability *= plain_top_p(p / p.sum(), top_p)[token]
        expected.append(probability)
    expected = np.array(expected)
    observed = np.bincount((done[:, 0] * 9 + done[:, 1] * 3 + done[:, 2]).numpy(), minlength=27)
    possible = expected > 0
    assert possible.all() == (top_p == 1.0) and not observed[~possible].any()
    assert chisquare(observed[possible], expected[possible] * ROWS / expected.sum()).pvalue > 1e-3


def test_temperature_zero_takes_the_likeliest_next_token_and_one_forward_a_token():
    law = joint()
    network, text = LeftToRight(law), ()
    for _ in range(3):
        text += (int(next_token(law, text).argmax()),)
    assert run(network, torch.full((2, 3), MASK), top_p=0.3).tolist() == [list(text)] * 2
    assert network.calls == 3
    given = torch.tensor([[1, MASK, MASK]])
    after = int(next_token(law, (1,)).argmax())
    assert run(network, given).tolist() == [[1, after, int(next_token(law, (1, after)).argmax())]]
    assert network.calls == 5


def test_the_fewest_likeliest_tokens_are_kept_and_never_none():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    kept = lambda top_p: [row.nonzero().flatten().tolist() for row in nucleus(p, top_p)]  # noqa: E731
    assert kept(0.4) == [[1], [0, 1], [0]] and kept(0.41) == [[1, 3], [0, 1], [0]]
    assert kept(1e-9) == [[1], [0], [0]] and kept(0.95) == [[0, 1, 2, 3], [0, 1, 2, 3], [0]]
    assert torch.equal(nucleus(p, 1.0), p) and torch.equal(
        nucleus(p, 0.7)[0], torch.tensor([0, 0.4, 0, 0.3], dtype=torch.float64)
    )


def test_a_row_that_ended_is_filled_with_the_end_and_costs_no_forward():
    """Token 2 is the end. Row 0 ends at its second token, row 1 at its third, whatever the network would say behind."""

    def network(ids):
        calls.append(ids.clone())
        logits = torch.zeros(2, 6, V)
        logits[:, :, 1] = 1.0
        logits[0, 2, 2] = logits[1, 3, 2] = 5.0
        return logits

    calls, frames = [], []
    ids = torch.tensor([[0, MASK, MASK, MASK, 0, MASK]] * 2)
    done = run(network, ids, eos_id=2, on_step=lambda step, now: frames.append((step, now.tolist())))
    assert done.tolist() == [[0, 1, 2, 2, 0, 2], [0, 1, 1, 2, 0, 2]]
    assert len(calls) == 3 and [step for step, _ in frames] == [0, 1, 2] and frames[-1][1] == done.tolist()
    calls.clear()
    assert run(network, ids).tolist() == [[0, 1, 2, 1, 0, 1], [0, 1, 1, 2, 0, 1]] and len(calls) == 4
    alone = [run(lambda i, row=row: network(i.expand(2, -1))[row : row + 1], ids[:1], eos_id=2)[0] for row in (0, 1)]
    assert torch.equal(torch.stack(alone), done)
