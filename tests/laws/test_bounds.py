"""The laws of the masked-diffusion bound, by enumeration in float64 through the code that trains (docs/objectives.md)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.batch import expand
from data.cfg_dropout import no_dropout
from data.compact import collate
from data.loader import corruption
from data.masking import MaskingOptions
from data.noise import Schedule, noise_level
from tests.laws import enumeration as law

TEXT = np.array([2, 0, 3, 1, 1, 2], np.int64)
SCHEDULES = {
    "linear": Schedule(),
    "cosine": Schedule("cosine"),
    "square": Schedule("polynomial", 2.0),
    "root": Schedule("polynomial", 0.5),
}


@pytest.fixture(scope="module")
def model():
    return law.small_model()


@pytest.fixture(scope="module")
def ce(model) -> np.ndarray:
    return law.cross_entropies(model, TEXT)


@pytest.fixture(scope="module")
def bound(ce) -> float:
    """sum_k E_k / k."""
    return float((law.by_count(ce) / np.arange(1, len(TEXT) + 1)).sum())


def test_predictions_depend_on_what_is_seen(ce):
    """Else the laws below would hold for trivial reasons."""
    masks = law.subsets(len(TEXT))
    for i in range(len(TEXT)):
        assert np.ptp(ce[masks[:, i], i]) > 0.3


def test_the_integral_over_noise_levels_is_the_sum_over_counts(model, bound):
    """E over t of sum(CE / t) = sum_k E_k / k. E(p) / p is a polynomial of degree L - 1, so four nodes are exact."""
    assert law.bernoulli_expectation(model, TEXT, law.options(), nodes=4) == pytest.approx(bound, rel=1e-12)


def test_it_is_the_mean_over_all_orders_of_the_autoregressive_chain(ce, bound):
    """Brute force over the L! orders, each token predicted from those before it in the order."""
    import itertools

    number = {tuple(mask): i for i, mask in enumerate(law.subsets(len(TEXT)).tolist())}
    total = 0.0
    for order in itertools.permutations(range(len(TEXT))):
        masked = [True] * len(TEXT)
        for i in order:
            total += ce[number[tuple(masked)], i]
            masked[i] = False
    assert total / math.factorial(len(TEXT)) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_has_the_same_expectation(model, bound, name):
    """With weight -alpha' / (1 - alpha)."""
    stage = law.options(schedule=SCHEDULES[name])
    found = law.bernoulli_expectation(model, TEXT, stage, nodes=24)
    assert found == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_fixed_counts_are_exact_with_every_schedule(model, bound, name):
    stage = law.options(schedule=SCHEDULES[name], masking="fixed_count")
    assert law.fixed_count_expectation(model, TEXT, stage) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_floor_gives_the_mean_over_the_rest_and_not_the_bound(model, ce, bound, name):
    """1 / (1 - eps) * integral of E(p) / p from eps to 1, for LLaDA's eps within 0.2% of the bound but not equal."""
    eps, length = 1e-3, len(TEXT)
    p, share = law.quadrature(8, eps, 1.0)
    k = law.subsets(length).sum(1)
    expected = sum(w * (x**k * (1 - x) ** (length - k) * ce.sum(1)).sum() / x for x, w in zip(p, share)) / (1 - eps)
    found = law.bernoulli_expectation(model, TEXT, law.options(eps=eps, schedule=SCHEDULES[name]), nodes=60)
    assert found == pytest.approx(expected, rel=1e-9)
    assert 1e-6 < abs(found / bound - 1) < 2e-3


def test_a_clipped_range_of_mask_ratios_is_its_own_mean_and_no_bound(model, ce, bound):
    length, (low, high) = len(TEXT), (0.3, 0.8)
    p, share = law.quadrature(8, low, high)
    k = law.subsets(length).sum(1)
    inside = sum(w * (x**k * (1 - x) ** (length - k) * ce.sum(1)).sum() / x for x, w in zip(p, share)) / (high - low)
    stage = law.options(schedule=Schedule(low=low, high=high))
    assert law.bernoulli_expectation(model, TEXT, stage, nodes=8) == pytest.approx(inside, rel=1e-12)
    assert abs(inside / bound - 1) > 1e-3


def test_the_bound_is_above_the_negative_log_likelihood_of_the_model_itself(ce, bound):
    """The model is the uniform mixture over orders: its exact p(x), by dynamic programming over revealed sets."""
    exact = -math.log(law.any_order_probability(ce))
    assert bound > exact + 1e-3


def test_that_likelihood_is_a_distribution(model):
    """p(x) sums to 1 over all texts."""
    total = sum(law.any_order_probability(law.cross_entropies(model, text)) for text in law.all_texts(3))
    assert total == pytest.approx(1, rel=1e-12)


def test_consistent_conditionals_make_the_bound_equal_to_it():
    """A model that does not look at other tokens: p(x) is a product, and every order gives the same."""
    blind = law.small_model()
    with torch.no_grad():
        for block in blind.blocks.values():
            block.o_proj.weight.zero_()
    found = law.cross_entropies(blind, TEXT)
    bound = float((law.by_count(found) / np.arange(1, len(TEXT) + 1)).sum())
    assert bound == pytest.approx(-math.log(law.any_order_probability(found)), rel=1e-12)
    assert bound == pytest.approx(law.bernoulli_expectation(blind, TEXT, law.options(), nodes=4), rel=1e-12)


def test_a_text_of_one_token_costs_its_cross_entropy(model):
    one = TEXT[:1]
    expected = law.cross_entropies(model, one)[1, 0]
    assert law.bernoulli_expectation(model, one, law.options(), nodes=2) == pytest.approx(expected, rel=1e-12)
    assert law.fixed_count_expectation(model, one, law.options(masking="fixed_count")) == pytest.approx(
        expected, rel=1e-12
    )


def test_a_row_without_a_mask_costs_nothing_and_is_not_forced_to_have_one(model):
    masks = np.zeros((3, len(TEXT)), bool)
    batch = law.rows(TEXT, np.array([0.01, 0.5, 1.0]), masks, law.options())
    assert not batch.masked.any()
    assert law.row_losses(model, batch).tolist() == [0, 0, 0]


def test_the_schedule_s_weight_is_needed(model, bound):
    """A neighbour's bug, planted: without the weight the mean is something else."""
    from data.batch import Form

    masks, (levels, shares) = law.subsets(len(TEXT)), law.quadrature(6)
    batch = law.rows(TEXT, np.repeat(levels, len(masks)), np.tile(masks, (6, 1)), law.options(), Form(weighting=False))
    losses = law.row_losses(model, batch).reshape(6, -1)
    k, p = masks.sum(1), levels[:, None]
    found = float((shares[:, None] * p**k * (1 - p) ** (len(TEXT) - k) * losses).sum())
    assert abs(found / bound - 1) > 0.1


# --- variance


def test_fixed_counts_never_vary_more_than_bernoulli_masks(model, bound):
    """Given the count both draw the same masks; Bernoulli's weight 1/p varies on top of that (Rao-Blackwell)."""
    eps = 1e-3
    for text in (TEXT, TEXT[:3], TEXT[::-1]):
        fixed = law.fixed_count_expectation(model, text, law.options(masking="fixed_count"), power=2)
        mean = law.fixed_count_expectation(model, text, law.options(masking="fixed_count"))
        # the second moment of Bernoulli masks from eps on: already more than all of fixed counts' second moment
        loose = law.bernoulli_expectation(model, text, law.options(eps=eps), nodes=400, power=2)
        loose_mean = law.bernoulli_expectation(model, text, law.options(eps=eps), nodes=400)
        assert fixed - mean**2 < loose - loose_mean**2


@pytest.mark.parametrize("cost", [lambda t: t, lambda t: 1 / (t + 0.01), lambda t: math.sin(9 * t), lambda t: t > 0.37])
def test_stratified_noise_levels_never_vary_more_than_independent_ones(cost):
    """Var of the mean over a step of B samples, from the strata that the code deals out: exact by quadrature in each."""
    size = 4
    grid = (np.arange(4000) + 0.5) / 4000
    strata = []
    for sample in range(size):
        t = noise_level(0, "train", sample, size)
        low = math.ceil(t * size) - 1
        values = np.array([cost((low + u) / size) for u in grid], float)
        strata.append((values.mean(), values.var()))
    everything = np.array([cost(u) for u in (np.arange(4000 * size) + 0.5) / (4000 * size)], float)
    stratified = sum(variance for _, variance in strata) / size**2
    assert stratified <= everything.var() / size * (1 + 1e-9)
    assert sum(mean for mean, _ in strata) / size == pytest.approx(everything.mean(), rel=1e-9)


# --- Monte Carlo: the draws of training themselves


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["bernoulli", "fixed_count"])
def test_the_draws_of_training_estimate_the_enumerated_value(model, bound, name, kind):
    """Within 3 standard errors, over 20,000 samples drawn by the masking stage; Bernoulli against its own mean from eps on."""
    count, eps = 20_000, 1e-2
    stage = law.options(
        masking=kind, eps=eps if kind == "bernoulli" else 0.0, schedule=SCHEDULES[name], t_sampling="iid"
    )
    text = TEXT[:4]
    samples = ({"sample_id": i, "tokens": text.astype(np.uint16), "length": len(text)} for i in range(count))
    batch = expand(next(collate(no_dropout(corruption(stage)(samples)), count, law.PAD)), law.MASK)
    batch.weight = batch.weight.double()
    losses = law.row_losses(model, batch)
    exact = (
        law.fixed_count_expectation(model, text, stage)
        if kind == "fixed_count"
        else law.bernoulli_expectation(model, text, stage, nodes=60)
    )
    assert abs(losses.mean() - exact) < 3 * losses.std() / math.sqrt(count)


def test_the_options_of_the_laws_are_those_of_training():
    """The stage that the laws run is the one that `data.loader.stages` builds."""
    from data.loader import stages

    stage = law.options()
    assert stages(stage)[0].func is corruption(stage).func
    assert stages(stage)[0].keywords == corruption(stage).keywords == {"options": MaskingOptions(0, 1, eps=0.0)}
