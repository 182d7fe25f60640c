"""Laws of answer likelihoods: estimators against every mask of a small network in float64, the chain rule, what draws depend on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from data.errors import InputError
from parallel.engine import model_inputs
from parallel.initialise import initialise
from parallel.mesh import build_mesh
from parallel.shape import ModelShape
from pretrain.evaluation.likelihood import LikelihoodOptions, Request, score
from pretrain.evaluation.likelihood_draws import content_key, draw_mask, noise_of, standard_error
from pretrain.evaluation.likelihood_model import Scored, greedy_matches
from pretrain.model import DiffusionTransformer
from pretrain.predictor import Objective, Predictor
from pretrain.sampling.logits import BrokenLogits
from pretrain.sampling.sampler import SamplingOptions, generate

VOCAB, MASK, EOS, CONTEXT = 11, 0, 1, 12
PROMPT, ANSWER = np.array([4, 7, 3]), np.array([5, 9, 2, 5, 8])
OBJECTIVES = {
    "masked": Objective(),
    "bert": Objective("bert"),
    "shift": Objective("masked", shift=True),
    "block": Objective("block", block_size=3),
    "autoregressive": Objective("autoregressive"),
}
MASKED = [name for name in OBJECTIVES if name != "autoregressive"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def network() -> DiffusionTransformer:
    shape = ModelShape(
        num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, ffn_hidden_size=32, vocab_size=VOCAB,
        rope_theta=10000.0, norm_eps=1e-5, tie_embeddings=False, norm_impl="torch", init_std=0.02,
    )  # fmt: skip
    mesh = build_mesh()
    model = DiffusionTransformer(shape, mesh)
    initialise(model, shape, mesh, 3)
    with torch.no_grad():  # larger weights, so that what is seen matters much
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return model.double().eval()


class Recorder:
    """A predictor in float64 (pretrain.predictor gives float32) that keeps what it was asked."""

    def __init__(self, network: DiffusionTransformer, objective: Objective):
        self.predictor = Predictor.of_model(network, objective, eos_id=EOS)
        self.network, self.objective = network, objective
        self.asked: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.asked.append(ids.clone())
        inputs = model_inputs(self.predictor.microbatch(ids), torch.device("cpu"), torch.ones(()))
        logits = self.network(**inputs)
        if self.objective.shift:
            logits = torch.cat((torch.full_like(logits[:, :1], torch.nan), logits[:, :-1]), dim=1)
        return logits


@pytest.fixture(scope="module")
def scored(network) -> Callable[[str], Scored]:
    return lambda name: Scored(Recorder(network, OBJECTIVES[name]), OBJECTIVES[name], MASK, CONTEXT)


def costs(
    found: Scored, ids: np.ndarray, given: np.ndarray, answer: np.ndarray, cfg: float = 0.0
) -> dict[tuple, float]:
    """c(M) of every set M of positions of `answer`: the sum of -log p over M, when `given` and the rest of `answer` are seen."""
    table = {(): 0.0}
    for size in range(1, len(answer) + 1):
        for mask in itertools.combinations(answer.tolist(), size):
            row = ids.copy()
            row[list(mask)] = MASK
            logits = found.predict(torch.from_numpy(row)[None])[0].double()
            if cfg:
                row[given] = MASK
                u = found.predict(torch.from_numpy(row)[None])[0].double()
                logits = u + (1 + cfg) * (logits - u)
            logp = torch.log_softmax(logits, -1)
            table[mask] = -sum(float(logp[i, ids[i]]) for i in mask)
    return table


def bound(table: dict[tuple, float], count: int) -> float:
    """The any-order bound by its definition: the mean over all orders of the chain rule's -log p of each next token.

    A token revealed when k others are still masked costs, averaged over who is masked with it, c(M) / |M| for |M| = k + 1.
    """
    total = 0.0
    for size in range(1, count + 1):
        sets = [cost for mask, cost in table.items() if len(mask) == size]
        total += sum(sets) / len(sets) / size
    return total


def whole_bound(found: Scored, prompt: np.ndarray, answer: np.ndarray, cfg: float = 0.0) -> float:
    ids = np.concatenate([prompt, answer]).astype(np.int64)
    positions = np.arange(len(prompt), len(ids))
    if found.objective.kind != "block":
        return bound(costs(found, ids, np.arange(len(prompt)), positions, cfg), len(positions))
    total = 0.0
    for block in np.unique(positions // found.objective.block_size):
        inside = positions[positions // found.objective.block_size == block]
        row = np.where(np.arange(len(ids)) > inside[-1], MASK, ids)  # what follows must not matter
        total += bound(costs(found, row, np.arange(len(prompt)), inside, cfg), len(inside))
    return total


def every_mask(estimator: str, counts: list[int]):
    """(a `draw` that runs through every mask and noise level with its probability, the number of draws that takes).

    fixed_count: the mask sets of each size, each level with the probability that it has. bernoulli: Gauss-Legendre points for
    u, exact for these polynomials, times every mask. A block of fewer tokens is run through several times over.
    """
    runs = {}
    for count in counts:
        found = []
        masks = [np.array(m, bool) for m in itertools.product((False, True), repeat=count)]
        if estimator == "fixed_count":
            for size in range(1, count + 1):
                noise, weight = noise_of("fixed_count", (size - 0.5) / count, count)
                assert noise == size
                some = [m for m in masks if m.sum() == size]
                found += [(m, weight, 1 / count / len(some)) for m in some]
        else:
            points, shares = np.polynomial.legendre.leggauss(2 * count + 2)
            for u, share in zip((points + 1) / 2, shares / 2):
                p, weight = noise_of("bernoulli", float(u), count)
                found += [(m, weight, share * p ** m.sum() * (1 - p) ** (count - m.sum())) for m in masks]
        assert sum(probability for *_, probability in found) == pytest.approx(1, abs=1e-12)
        runs[count] = found
    most = max(map(len, runs.values()))

    def draw(estimator: str, seed: int, key: str, number: int, draws: int, count: int) -> tuple[np.ndarray, float]:
        found = runs[count]
        if number >= len(found):
            return np.zeros(count, bool), 0.0
        mask, weight, probability = found[number]
        return mask, weight * probability * draws

    return draw, most


@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("estimator", ["fixed_count", "bernoulli"])
def test_the_expectation_of_an_estimate_over_every_mask_is_the_any_order_bound(scored, estimator, name, cfg):
    found = scored(name)
    draw, draws = every_mask(estimator, [1, 2, 3, 5])
    options = LikelihoodOptions(estimator, draws, cfg, batch_size=7, greedy=False)
    (got,) = score(found, [Request(PROMPT, ANSWER)], options, draw)
    assert -got.log_likelihood == pytest.approx(whole_bound(found, PROMPT, ANSWER, cfg), rel=1e-12)
    assert got.tokens == len(ANSWER)


def test_the_enumeration_itself_equals_the_mean_over_all_orders_of_the_chain_rule(scored):
    """The reference of the test above, once more by its definition: every order of revealing, each with its exact -log p."""
    found = scored("masked")
    ids = np.concatenate([PROMPT, ANSWER[:4]]).astype(np.int64)
    positions = list(range(len(PROMPT), len(ids)))
    total = 0.0
    for order in itertools.permutations(positions):
        for k, now in enumerate(order):
            row = ids.copy()
            row[list(order[k:])] = MASK
            logp = torch.log_softmax(found.predict(torch.from_numpy(row)[None])[0, now], -1)
            total -= float(logp[ids[now]]) / math.factorial(len(positions))
    assert whole_bound(found, PROMPT, ANSWER[:4]) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("name", ["masked", "block"])
@pytest.mark.parametrize("estimator", ["fixed_count", "bernoulli"])
def test_estimates_scatter_around_the_bound_as_their_standard_errors_say(scored, estimator, name):
    found = scored(name)
    exact = whole_bound(found, PROMPT, ANSWER)
    values, errors = [], []
    for seed in range(60):
        (got,) = score(found, [Request(PROMPT, ANSWER)], LikelihoodOptions(estimator, 32, seed=seed, greedy=False))
        values.append(-got.log_likelihood)
        errors.append(got.standard_error)
    spread = np.std(values, ddof=1)
    assert abs(np.mean(values) - exact) < 3 * spread / math.sqrt(len(values))
    assert 0.75 < math.sqrt(np.mean(np.square(errors))) / spread < 1.6, "collapsed strata may overstate, never by much"
    assert np.mean(np.abs(np.array(values) - exact) < 3 * np.array(errors)) > 0.9


def test_fixed_counts_vary_less_than_bernoulli_masks(scored):
    found = scored("masked")
    spread = {
        estimator: np.std(
            [
                score(found, [Request(PROMPT, ANSWER)], LikelihoodOptions(estimator, 16, seed=s, greedy=False))[0][0]
                for s in range(60)
            ]
        )
        for estimator in ("fixed_count", "bernoulli")
    }
    assert spread["fixed_count"] < 0.8 * spread["bernoulli"]


def test_masks_have_the_distribution_that_the_expectation_was_taken_over():
    """Levels are stratified, every mask of a size is equally likely, and Bernoulli masks hold each token with their probability."""
    count, draws = 4, 6000
    seen: dict[bytes, int] = {}
    for d in range(draws):
        mask, weight = draw_mask("fixed_count", 0, "law", d, draws, count)
        assert weight == count / mask.sum() and mask.sum() == math.ceil((d + 0.5) / draws * count)
        seen[mask.tobytes()] = seen.get(mask.tobytes(), 0) + 1
    assert len(seen) == 2**count - 1
    for content, times in seen.items():
        p = 1 / count / math.comb(count, int(np.frombuffer(content, bool).sum()))
        assert abs(times / draws - p) < 4.5 * math.sqrt(p * (1 - p) / draws)
    held = np.zeros(count)
    for d in range(draws):
        mask, weight = draw_mask("bernoulli", 0, "law", d, draws, count)
        assert (2 / weight * draws).__ceil__() == d + 1, "u is in the d-th of the strata"
        held += mask
    assert held / draws == pytest.approx(np.full(count, 1 / 3), abs=4.5 * math.sqrt(2 / 9 / draws))  # E of u^2


def test_the_standard_error_of_strata_is_that_of_a_simulation():
    rng = np.random.default_rng(0)
    for n in (2, 3, 8, 9):
        level = np.linspace(0, 3, n)
        draws = rng.normal(level, 1 + level, (4000, n))
        true = draws.mean(1).std(ddof=1)
        said = math.sqrt(np.mean([standard_error(row) ** 2 for row in draws]))
        assert 0.97 * true < said < math.hypot(true, 3 / (n - 1) / math.sqrt(2 * n) * 1.6) * 1.05
    assert math.isnan(standard_error(np.array([1.0])))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_score_depends_on_seed_and_content_alone(scored, name):
    found = scored(name)
    rng = np.random.default_rng(5)
    requests = [
        Request(rng.integers(2, VOCAB, int(p)), rng.integers(2, VOCAB, int(a))) for p, a in rng.integers(1, 6, (9, 2))
    ]
    requests.append(requests[2])
    one = score(found, requests, LikelihoodOptions(draws=8, batch_size=64))
    order = rng.permutation(len(requests))
    other = score(found, [requests[i] for i in order], LikelihoodOptions(draws=8, batch_size=3))
    for at, got in zip(order, other):
        assert got[:2] == pytest.approx(one[at][:2], rel=1e-12) and got[2:] == one[at][2:]
    assert one[-1] == one[2]
    (alone,) = score(found, [requests[4]], LikelihoodOptions(draws=8, batch_size=1))
    assert alone[:2] == pytest.approx(one[4][:2], rel=1e-12)
    again = score(found, requests, LikelihoodOptions(draws=8, seed=1))
    differ = [a[0] != pytest.approx(b[0], rel=1e-9) for a, b in zip(one, again) if a.tokens > 1]
    assert not any(differ) if name == "autoregressive" else sum(differ) > len(differ) // 2


def test_the_border_between_prompt_and_answer_is_part_of_the_content():
    ids = np.arange(2, 8)
    assert content_key(ids[:2], ids[2:]) != content_key(ids[:3], ids[3:])


@pytest.mark.parametrize("cfg", [0.0, 0.7])
def test_autoregressive_likelihoods_are_the_chain_rule_exactly(scored, network, cfg):
    found = scored("autoregressive")
    request = Request(PROMPT, ANSWER)
    (got,) = score(found, [request], LikelihoodOptions(cfg_scale=cfg, draws=9))
    total, greedy = 0.0, True
    for k in range(len(ANSWER)):  # token by token, from prefixes alone: nothing later is even there
        prefix = np.concatenate([[EOS], PROMPT, ANSWER[:k]])
        hidden = np.concatenate([[EOS], np.full(len(PROMPT), MASK), ANSWER[:k]])
        column = torch.arange(len(prefix), dtype=torch.int32)[None]
        causal = torch.stack((column, column, torch.full_like(column, -1)), -1)
        with torch.no_grad():
            logits, u = (
                network(torch.from_numpy(ids)[None], column, visibility=causal)[0, -1] for ids in (prefix, hidden)
            )
        logits = u + (1 + cfg) * (logits - u)
        total += float(torch.log_softmax(logits, -1)[ANSWER[k]])
        logits[MASK] = -torch.inf
        greedy &= int(logits.argmax()) == ANSWER[k]
    assert got.log_likelihood == pytest.approx(total, rel=1e-12)
    assert (got.standard_error, got.greedy) == (0.0, greedy)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_greedy_is_what_the_sampler_gives_one_token_a_step_at_temperature_0(scored, name):
    """LLaDA's check, by another way: generate(steps = tokens) and compare."""
    found, objective = scored(name), OBJECTIVES[name]
    rng = np.random.default_rng(2)
    prompts = [rng.integers(2, VOCAB, 3) for _ in range(4)]
    ids = torch.full((4, 8), MASK)
    ids[:, :3] = torch.from_numpy(np.stack(prompts))
    given = torch.arange(8).expand(4, 8) < 3
    filled = generate(
        found.predict, ids, given, mask_id=MASK, options=SamplingOptions(steps=5, cfg_scale=0.5), objective=objective
    ).numpy()
    right = [Request(row[:3], row[3:]) for row in filled]
    wrong = [
        Request(row[:3], np.where(np.arange(5) == at, 2 + (row[3:] - 1) % 9, row[3:])) for at, row in enumerate(filled)
    ]
    options = LikelihoodOptions(draws=2, cfg_scale=0.5, batch_size=3)
    assert [got.greedy for got in score(found, [*right, *wrong], options)] == [True] * 4 + [False] * 4
    if objective.kind != "autoregressive":  # there it costs nothing
        options = LikelihoodOptions(draws=2, cfg_scale=0.5, greedy=False)
        assert not any(got.greedy for got in score(found, right, options))


def test_an_empty_answer_has_likelihood_one_and_asks_the_model_nothing(scored):
    found = scored("masked")
    (got,) = score(found, [Request(PROMPT, ANSWER[:0])], LikelihoodOptions())
    assert got == (0.0, 0.0, 0, True, 0) and not found.predict.asked


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_is_refused(scored):
    found = scored("masked")
    prompt = np.arange(20) % 9 + 2
    cut, short = score(found, [Request(prompt, ANSWER), Request(prompt[-7:], ANSWER)], LikelihoodOptions(draws=4))
    assert cut.cut == 13 and short.cut == 0 and cut[:4] == short[:4]
    with pytest.raises(
        InputError, match="request 0: the answer has 13 tokens, the model was trained on texts of 12: score at most 12"
    ):
        score(found, [Request(prompt[:1], prompt[:13])], LikelihoodOptions())
    (whole,) = score(found, [Request(prompt[:1], prompt[:12])], LikelihoodOptions(draws=4))
    assert whole.tokens == 12 and whole.cut == 1


def test_where_nothing_predicts_the_first_token_it_must_be_given(scored):
    found = scored("shift")
    with pytest.raises(
        InputError, match=r"the first token of a text is not predicted \(objective.shift\): give a prompt"
    ):
        score(found, [Request(PROMPT[:0], ANSWER)], LikelihoodOptions())
    with pytest.raises(InputError, match="score at most 11 at once"):
        score(found, [Request(PROMPT, np.arange(12) % 9 + 2)], LikelihoodOptions())
    (got,) = score(found, [Request(PROMPT, np.arange(11) % 9 + 2)], LikelihoodOptions(draws=2))
    assert got.cut == 2 and math.isfinite(got.log_likelihood)


def test_what_has_no_answer_likelihood_says_so(network):
    for kind in ("uniform", "flow"):
        with pytest.raises(InputError, match=f"objective.kind {kind}: the likelihood of an answer .* is not available"):
            Scored(Recorder(network, Objective()), Objective(kind), MASK, CONTEXT)


def test_equal_masks_cost_one_row_and_a_single_token_is_exact(scored):
    found = scored("masked")
    (one,) = score(found, [Request(PROMPT, ANSWER[:1])], LikelihoodOptions(draws=128, greedy=False))
    assert sum(len(ids) for ids in found.predict.asked) == 1 and one.standard_error == 0.0
    assert -one.log_likelihood == pytest.approx(whole_bound(found, PROMPT, ANSWER[:1]), rel=1e-12)
    found = scored("masked")
    score(found, [Request(PROMPT, ANSWER[:3])], LikelihoodOptions(draws=128, greedy=False))
    assert sum(len(ids) for ids in found.predict.asked) == 7


def test_each_block_is_scored_behind_clean_ones_and_without_those_that_follow(scored):
    found = scored("block")
    score(found, [Request(PROMPT, ANSWER)], LikelihoodOptions(draws=6, greedy=False))
    truth = torch.from_numpy(np.concatenate([PROMPT, ANSWER]))
    rows = [row for ids in found.predict.asked for row in ids]
    assert {len(row) for row in rows} == {6, 8}, "the answer lies in blocks 1 and 2 of three tokens each"
    for row in rows:
        masked = (row == MASK).nonzero()[:, 0]
        assert len(masked) and int(masked.min()) >= len(row) - (3 if len(row) == 6 else 2)
        assert torch.equal(row[row != MASK], truth[: len(row)][row != MASK])


@pytest.mark.parametrize(
    "options", [{"draws": 0}, {"batch_size": 0}, {"cfg_scale": -1}, {"cfg_scale": math.inf}, {"estimator": "mean"}]
)
def test_options_out_of_range_are_refused_in_one_line(options):
    with pytest.raises(InputError, match=next(iter(options))):
        LikelihoodOptions(**options)


def test_a_broken_model_is_not_a_score(scored):
    found = scored("masked")
    broken = Scored(lambda ids: torch.full((*ids.shape, VOCAB), math.nan), Objective(), MASK, CONTEXT)
    with pytest.raises(InputError, match="request 0: .* not finite"):
        score(broken, [Request(PROMPT, ANSWER)], LikelihoodOptions())
    assert math.isfinite(score(found, [Request(PROMPT, ANSWER)], LikelihoodOptions(draws=2))[0].log_likelihood)


@pytest.mark.parametrize("cfg", [0.0, 1.0])
@pytest.mark.parametrize("name", ["masked", "block", "autoregressive"])
def test_the_request_that_a_model_breaks_on_is_named(scored, name, cfg):
    """Six requests in batches of 4, of which the one with token 10 in its prompt gets no numbers: in its rows, or only greedily."""
    own = scored(name)

    def breaking(ids, fully_masked_alone=False):
        logits = own.predict(ids).clone()
        hit = (ids == 10).any(1)
        if fully_masked_alone:
            hit &= (ids[:, 3:] == MASK).all(1)
        logits[hit] = math.nan
        return logits

    requests = [Request(np.array([i + 2, 7, 3]), ANSWER[: 3 + i % 2]) for i in range(8)]
    requests[6], requests[7] = Request(PROMPT, ANSWER), Request(np.array([10, 7, 3]), ANSWER)
    names = [f"text {i}" for i in range(len(requests))]
    options = LikelihoodOptions(draws=2, batch_size=4, cfg_scale=cfg)
    fully = (lambda ids: breaking(ids, True)) if name == "masked" else breaking
    for predict in (breaking, fully):
        model = Scored(predict, OBJECTIVES[name], MASK, CONTEXT)
        with pytest.raises(InputError, match="^text 7: .* not finite") as raised:
            score(model, requests, options, names=names)
        assert "\n" not in str(raised.value)


def test_the_row_that_greedy_unmasking_breaks_on_is_counted_among_all_rows():
    """The first row ends at its wrong token; the second, then the only one left, gets no number after its first right one."""

    def predict(ids):
        logits = torch.zeros(*ids.shape, VOCAB)
        logits[..., 5] = 1
        logits[(ids == 5).any(1)] = math.nan
        return logits

    with pytest.raises(BrokenLogits) as raised:
        greedy_matches(Scored(predict, Objective(), MASK, CONTEXT), np.array([[7, 2, 2], [7, 5, 5]]), [1, 1], 0.0)
    assert raised.value.row == 1


def test_working_in_chunks_changes_no_score(scored, monkeypatch):
    requests = [Request(PROMPT, ANSWER), Request(ANSWER, PROMPT)]
    for cfg in (0.0, 0.5):
        options = LikelihoodOptions(draws=3, cfg_scale=cfg)
        whole = score(scored("masked"), requests, options)
        with monkeypatch.context() as patch:
            patch.setattr("pretrain.sampling.logits._CHUNK_VALUES", 2 * VOCAB)
            assert score(scored("masked"), requests, options) == whole
