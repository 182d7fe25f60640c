"""Laws of schedules, of parts with noise levels of their own, and of corruption without a mask token."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import MASKED, Form, answers, expand
from data.cfg_dropout import no_dropout
from data.compact import collate
from data.corruption import first_tokens_given, no_corruption, uniform_corruption
from data.flow import FlowOptions, flow_corruption, gaussian_noise, keep_probability, largest_gaussians
from data.loader import StageOptions, stages
from data.masking import MaskingOptions, draw_mask, masking
from data.noise import Schedule, noise_levels

SCHEDULES = [Schedule(), Schedule("cosine"), Schedule("polynomial", 2.0), Schedule("polynomial", 0.5)]
L, MASK, PAD, EOS = 24, 3, 1, 2
BORDERS = np.isin(np.arange(L), [0, 7, 8, 17])


def samples(count: int, **more):
    for i in range(count):
        yield {
            "sample_id": i,
            "tokens": np.random.default_rng(i).integers(4, 50, L).astype(np.uint16),
            "length": L,
            **more,
        }


def batch(stage, count: int = 8, form: Form = MASKED, lookahead=None, **more):
    return expand(next(collate(no_dropout(stage(samples(count, **more))), count, PAD)), MASK, form, lookahead)


# --- schedules


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.kind}{s.power}")
def test_a_schedule_is_consistent_with_itself(schedule):
    t = np.linspace(0.001, 1, 200)
    p = np.array([schedule.probability(x) for x in t])
    assert (np.diff(p) > 0).all() and p.min() >= 0 and p[-1] == pytest.approx(1)
    assert [schedule.time(schedule.share(x)) for x in t] == pytest.approx(t, abs=1e-12)
    slopes = [(schedule.share(x + 1e-6) - schedule.share(x - 1e-6)) / 2e-6 for x in t[5:-5]]
    assert [schedule.slope(x) for x in t[5:-5]] == pytest.approx(slopes, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("low,high", [(0.001, 1.0), (0.15, 0.99), (0.3, 0.8)])
@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial"])
def test_every_schedule_gives_the_same_mean_over_mask_ratios(kind, low, high):
    """E_t[weight(t) f(p(t))] = 1 / (high - low) * integral of f(p) / p from low to high, by quadrature on both sides."""
    schedule = Schedule(kind, 1.7, low, high)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    t = 0.5 * (nodes + 1)
    found = sum(0.5 * w * schedule.weight(x) * math.sin(3 * schedule.probability(x)) for x, w in zip(t, weights))
    p = low + (high - low) * t
    assert found == pytest.approx(float((0.5 * weights * np.sin(3 * p) / p).sum()), rel=2e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.kind}{s.power}")
@pytest.mark.parametrize("eligible", [1, 2, 7])
def test_fixed_counts_of_every_schedule_sum_to_the_bound(schedule, eligible):
    """sum over counts of P(l) weight(l) g(l) = sum_l g(l) / l: over a fine grid of t, exactly by the intervals of t."""
    edges = [schedule.time(count / eligible) for count in range(eligible + 1)]
    total = 0.0
    for before, after in zip(edges, edges[1:]):
        count, weight = schedule.count(0.5 * (before + after), eligible)
        total += (after - before) * weight * math.exp(count)
    assert total == pytest.approx(sum(math.exp(k) / k for k in range(1, eligible + 1)), rel=1e-12)


def test_the_linear_schedule_is_llada_s():
    assert Schedule().above(1e-3).probability(0.25) == (1 - 1e-3) * 0.25 + 1e-3
    assert Schedule().count(0.31, 10) == (4, pytest.approx(10 / 4))


@pytest.mark.parametrize("low,high,power", [(-0.1, 1, 1), (0, 1.1, 1), (0.5, 0.5, 1), (0, 1, 0), (0, 1, math.nan)])
def test_a_schedule_that_leaves_the_unit_interval_is_refused(low, high, power):
    with pytest.raises(ValueError, match="must"):
        Schedule("polynomial", power, low, high)


# --- parts with noise levels of their own


@pytest.mark.parametrize("units", [2, 5, 8])
def test_parts_are_stratified_over_the_sample_and_the_batch_and_not_by_their_place(units):
    size = 8
    t = np.array([[noise_levels(0, "train", step * size + i, size, units) for i in range(size)] for step in range(60)])
    assert (t > 0).all() and (t <= 1).all()
    strata = np.ceil(t * units * size).astype(int).reshape(60, -1)
    assert all(sorted(step) == list(range(1, units * size + 1)) for step in strata.tolist())
    by_place = t.mean((0, 1))  # 480 uniforms each: standard error 0.0132
    assert np.abs(by_place - 0.5).max() < 4.5 * 0.0132


@pytest.mark.parametrize("kind", ["bernoulli", "fixed_count"])
def test_each_part_is_masked_at_its_own_rate(kind):
    options = MaskingOptions(0, 4, masking=kind, unit="block", block_size=6)
    b = batch(lambda s: masking(s, options), 400)
    t, p, masked = (x.reshape(400, 4, 6) for x in (b.t, b.p_mask, b.masked))
    assert (t == t[..., :1]).all() and len(t[0, :, 0].unique()) == 4
    if kind == "fixed_count":
        counts = masked.sum(-1)
        assert (counts == (t[..., 0] * 6).ceil()).all()
        assert torch.allclose(b.weight.reshape(400, 4, 6)[masked], (6 / counts)[..., None].expand_as(masked)[masked])
    else:
        for slope in (torch.ones(()), p - 0.5):  # as often as p says, and where it says
            score = (slope * (masked.float() - p)).sum() / (slope**2 * p * (1 - p)).sum().sqrt()
            assert abs(float(score)) < 4
        assert torch.allclose(b.weight[b.masked], 1 / b.p_mask[b.masked])


def test_parts_without_eligible_tokens_and_cut_samples_are_left_alone():
    prompt = np.arange(L) < 8  # the first block whole, the second in part
    for kind in ("bernoulli", "fixed_count"):
        options = MaskingOptions(0, 4, masking=kind, unit="block", block_size=6)
        b = batch(lambda s, o=options: masking(({**x, "prompt": prompt, "length": 20} for x in s), o))
        assert not b.masked[:, :8].any() and not b.masked[:, 20:].any() and b.weight.isfinite().all()
        if kind == "fixed_count":
            assert (b.masked[:, 8:12].sum(1) == (b.t[:, 8] * 4).ceil()).all()
            assert (b.masked[:, 18:20].sum(1) == (b.t[:, 18] * 2).ceil()).all()


def test_documents_have_noise_levels_of_their_own_where_borders_say_so():
    options = MaskingOptions(0, 4, unit="document")
    b = batch(lambda s: masking(s, options), borders=BORDERS)
    for document in range(4):
        here = b.document_ids == document
        assert all(len(b.t[i][here[i]].unique()) == 1 for i in range(8))
    assert len(b.t[0].unique()) == 4
    one_each = batch(lambda s: masking(s, options))  # no borders: one text a sample
    assert all(len(row.unique()) == 1 for row in one_each.t)


def test_one_part_draws_what_a_sample_without_parts_draws():
    tokens = np.arange(L) < 30
    whole = draw_mask(3, L, None, L, MaskingOptions(0, 4, masking="fixed_count"))
    part = draw_mask(3, L, None, L, MaskingOptions(0, 4, masking="fixed_count"), np.arange(L) == 0)
    assert np.array_equal(whole.mask, part.mask) and tokens.all()
    assert (whole.t, whole.p_mask, whole.weight) == (part.t[0], part.p_mask[0], part.weight[0])


# --- without a mask token


def test_uniform_noise_has_the_marginal_and_the_rate_it_says():
    vocab, options = 50, MaskingOptions(0, 16, t_sampling="iid")
    prompt = np.arange(L) < 4
    b = batch(lambda s: uniform_corruption(s, options, vocab), 4000, Form("uniform"), prompt=prompt)
    assert (b.masked == b.eligible).all() and not b.masked[:, :4].any()
    assert (b.current_ids == b.noisy_ids).all() and torch.allclose(b.alpha, 1 - b.p_mask)
    assert float(b.p_mask.min()) >= 1e-3 and float(b.p_mask.max()) <= 1 - 1e-3 + 1e-7
    clean = b.noisy_ids == b.target_ids
    expected = b.alpha + (1 - b.alpha) / vocab
    score = (clean.float() - expected)[b.eligible].sum() / (expected * (1 - expected))[b.eligible].sum().sqrt()
    assert abs(float(score)) < 4 and clean[~b.eligible].all()
    seen = torch.bincount(b.noisy_ids[b.eligible & ~clean], minlength=vocab).float()
    assert len(seen) == vocab and ((seen - seen.mean()) ** 2 / seen.mean()).sum() < 49 + 6 * math.sqrt(98)
    rate = (1 - 2e-3) / b.alpha  # -alpha' / alpha of the linear schedule over [eps, 1 - eps]
    assert torch.allclose(b.weight[b.eligible], rate[b.eligible], rtol=1e-4)  # alpha is a float32


def test_order_statistics_are_those_of_a_dense_gaussian():
    """The three largest of 500: means and spreads against 4000 dense draws, within 5 standard errors."""
    rng = np.random.default_rng(0)
    found = largest_gaussians(rng.random((4000, 3)), 500)
    dense = np.sort(rng.standard_normal((4000, 500)), axis=1)[:, :-4:-1]
    error = np.sqrt(found.var(0) / 4000 + dense.var(0) / 4000)
    assert (np.abs(found.mean(0) - dense.mean(0)) < 5 * error).all()
    assert (np.abs(found.std(0) / dense.std(0) - 1) < 5 / math.sqrt(4000)).all()
    assert (np.diff(found, axis=1) < 0).all()


def test_the_largest_gaussian_of_a_large_vocabulary_is_finite_at_both_ends():
    extreme = largest_gaussians(np.array([[1 - 2.0**-53] * 8, [2.0**-54] * 8]), 126463)
    assert np.isfinite(extreme).all() and extreme[0, 0] > 8


@pytest.mark.parametrize("vocab", [3, 50])
def test_flow_s_tokens_are_the_argmax_of_the_noised_one_hot(vocab):
    options = MaskingOptions(0, 16, t_sampling="iid")
    flow = FlowOptions(vocab, temperature=(1e-3, 1e-3))
    tokens = ({"sample_id": i, "tokens": np.full(L, i % vocab, np.uint16)} for i in range(3000))
    b = expand(next(collate(no_dropout(flow_corruption(tokens, options, flow)), 3000, PAD)), MASK, Form("flow"))
    kept = b.noisy_ids == b.target_ids
    alpha = 1 - b.p_mask[:, 0].double()
    expected = alpha + (1 - alpha) / vocab
    variance = (expected * (1 - expected)).sum() * L
    assert abs(float((kept.double().mean(1) - expected).sum() * L / variance.sqrt())) < 4
    shift = (b.noisy_ids - b.target_ids)[~kept] % vocab
    seen = torch.bincount(shift, minlength=vocab).float()[1:]
    assert len(seen) == vocab - 1 and ((seen - seen.mean()) ** 2 / seen.mean()).sum() < vocab + 6 * math.sqrt(2 * vocab)
    assert torch.allclose(b.soft_weights.sum(-1), torch.ones(()))
    best = b.soft_ids.gather(-1, b.soft_weights.argmax(-1, keepdim=True))[..., 0]
    assert (best == b.noisy_ids).all()
    assert all(len(set(row)) == len(row) for row in b.soft_ids.flatten(0, 1)[:500].tolist())
    assert int(b.soft_ids.max()) == vocab - 1  # with three ids the others are all candidates, and no fourth is one
    share = b.p_mask.double()
    assert torch.allclose(b.weight.double(), share / (vocab * (1 - share) + share), rtol=1e-5)


def test_flow_s_mixture_is_the_softmax_over_the_whole_vocabulary():
    """With as many candidates as ids nothing is left out, so the law of the largest share is that of a dense softmax."""
    vocab, tau = 6, 0.2
    options = MaskingOptions(0, 16, t_sampling="iid", eps=0.49)
    flow = FlowOptions(vocab, temperature=(tau, tau), candidates=5)
    tokens = ({"sample_id": i, "tokens": np.full(L, 1, np.uint16)} for i in range(2000))
    b = expand(next(collate(no_dropout(flow_corruption(tokens, options, flow)), 2000, PAD)), MASK, Form("flow"))
    share = np.array([gaussian_noise(float(1 - p), vocab) for p in b.p_mask[:, 0].double()])[:, None, None]
    w = share * np.random.default_rng(0).standard_normal((2000, L, vocab))
    w[..., 1:2] += 1 - share
    dense = np.exp((w - w.max(-1, keepdims=True)) / tau)
    dense /= dense.sum(-1, keepdims=True)
    found = b.soft_weights.double().numpy()
    for statistic in (lambda x: x.max(-1), lambda x: (x**2).sum(-1), lambda x: np.sort(x, -1)[..., -2]):
        a, c = statistic(found), statistic(dense)
        assert abs(a.mean() - c.mean()) < 5 * math.sqrt((a.var() + c.var()) / a.size)


@pytest.mark.parametrize("vocab", [3, 512, 126464])
def test_the_gaussian_that_leaves_a_share_leaves_it(vocab):
    for alpha in (0.999, 0.7, 0.3, 0.05, 0.001):
        g = gaussian_noise(alpha, vocab)
        assert 0 < g < 1
        assert float(keep_probability(g, vocab)) == pytest.approx(alpha + (1 - alpha) / vocab, abs=2e-5)


def test_flow_s_temperature_falls_by_step():
    flow = FlowOptions(50, temperature=(1e-3, 1e-8), temperature_steps=100)
    assert [flow.at_step(s) for s in (0, 50, 100, 900)] == pytest.approx([1e-3, 10**-5.5, 1e-8, 1e-8])
    again = replace(flow, start=(40, 640))  # a stream begun anew at step 40, sample 640, with batches of 32
    assert [again.of_sample(640 + 32 * k, 32) for k in range(3)] == [flow.at_step(40 + k) for k in range(3)]


# --- forms of a batch


def test_autoregressive_rows_see_the_token_before_and_are_paid_for_every_token():
    b = batch(no_corruption, form=Form("autoregressive", start_id=EOS), borders=BORDERS, length=20)
    clean = np.stack([s["tokens"] for s in samples(8)]).astype(np.int64)
    assert np.array_equal(b.target_ids[:, :20].numpy(), clean[:, :20])
    starts = [0, 7, 8, 17]
    assert (b.noisy_ids[:, starts] == EOS).all()
    rest = [i for i in range(1, 20) if i not in starts]
    assert np.array_equal(b.noisy_ids[:, rest].numpy(), clean[:, [i - 1 for i in rest]])
    assert b.masked[:, :20].all() and not b.masked[:, 20:].any()
    assert (b.weight == b.masked.float()).all()
    assert b.visibility[0].tolist() == [[i, i, -1] for i in range(L)]


def test_shift_pays_the_position_before_and_gives_the_first_token_of_each_text():
    options = MaskingOptions(0, 8)
    plain = batch(lambda s: masking(first_tokens_given(s), options), borders=BORDERS)
    b = batch(lambda s: masking(first_tokens_given(s), options), form=Form(shift=True), borders=BORDERS)
    assert not plain.masked[:, [0, 7, 8, 17]].any() and plain.masked.any()
    assert not batch(lambda s: masking(first_tokens_given(s), options), 200).eligible[:, 0].any()  # one text a sample
    for name in ("target_ids", "masked", "weight", "eligible"):
        assert getattr(b, name)[:, :-1].equal(getattr(plain, name)[:, 1:]), name
    assert not b.masked[:, -1].any() and not b.eligible[:, -1].any() and not b.weight[:, -1].any()
    assert b.noisy_ids.equal(plain.noisy_ids) and b.position_ids.equal(plain.position_ids)


@pytest.mark.parametrize("isolated", [False, True])
def test_given_first_tokens_are_no_condition(isolated):
    """With shift and CFG dropout: a sample without a prompt has nothing to drop, and its first token stays shown."""
    options = StageOptions(MaskingOptions(0, 8), cfg_dropout=0.9, cfg_condition="spans", shift=True, isolate=isolated)
    borders = {"borders": BORDERS} if isolated else {}

    def drawn(**more):
        stream = samples(64, **borders, **more)
        for stage in stages(options):
            stream = stage(stream)
        return expand(next(collate(stream, 64, PAD)), MASK, Form(shift=True))

    plain, prompted = drawn(), drawn(prompt=np.arange(L) < 3)
    assert not plain.dropped.any() and 40 < int(prompted.dropped.sum()) < 64
    starts = [0, 7, 8, 17] if isolated else [0]
    clean = torch.from_numpy(np.stack([s["tokens"] for s in samples(64)]).astype(np.int64))
    assert plain.noisy_ids[:, starts].equal(clean[:, starts])
    assert not plain.eligible[:, [i - 1 for i in starts if i] + [L - 1]].any() and not plain.masked[:, L - 1].any()
    assert int(plain.eligible.sum(1)[0]) == L - len(starts)


def test_a_lookahead_opens_attention_step_by_step():
    b = batch(lambda s: masking(s, MaskingOptions(0, 8)), lookahead=3)
    assert b.visibility[1].tolist() == [[i, i + 3, -1] for i in range(L)]


def test_block_rows_carry_a_clean_copy_that_is_not_paid_for():
    options = MaskingOptions(0, 8, unit="block", block_size=6)
    prompt = np.arange(L) < 4
    stage = lambda s: masking(({**x, "prompt": prompt} for x in s), options)  # noqa: E731
    plain, b = batch(stage), batch(stage, form=Form("block", block_size=6))
    assert b.noisy_ids[:, :L].equal(plain.noisy_ids) and b.noisy_ids[:, L:].equal(plain.target_ids)
    for name in ("masked", "weight", "eligible", "target_ids"):
        assert getattr(b, name)[:, :L].equal(getattr(plain, name))
    assert not b.masked[:, L:].any() and not b.eligible[:, L:].any() and not b.weight[:, L:].any()
    assert b.position_ids.equal(plain.position_ids.repeat(1, 2)) and b.document_ids.equal(
        plain.document_ids.repeat(1, 2)
    )
    rank, reach, group = b.visibility[0].T
    block = torch.arange(L) // 6
    assert reach.tolist() == [*(block - 1).tolist(), *block.tolist()] and group[:L].equal(block.int())
    assert (rank[:L] > 1000).all() and rank[L:].equal(block.int()) and (group[L:] == -1).all()


def test_a_dropped_condition_is_hidden_in_the_clean_copy_too():
    options = MaskingOptions(0, 8, unit="block", block_size=6)
    prompt = np.arange(L) < 4
    dropped = ({**s, "dropped": True} for s in masking(samples(2, prompt=prompt), options))
    b = expand(next(collate(dropped, 2, PAD)), MASK, Form("block", block_size=6))
    assert (b.noisy_ids[:, :4] == MASK).all() and (b.noisy_ids[:, L : L + 4] == MASK).all()
    assert (b.noisy_ids[:, L + 4 :] != MASK).all()


def test_answers_count_alike_whatever_their_lengths():
    """LLaDA's SFT: the weighted loss of each document divided by its eligible tokens, then by the number of documents."""
    prompt = np.isin(np.arange(L), [0, 1, 7, 9, 10])
    stage = lambda s: masking(s, MaskingOptions(0, 8, masking="fixed_count"))  # noqa: E731
    plain = batch(stage, borders=BORDERS, prompt=prompt)
    b = batch(stage, form=Form(per_answer=True), borders=BORDERS, prompt=prompt)
    lengths = {0: 5, 1: 0, 2: 7, 3: 7}  # the second document is all prompt
    for document, count in lengths.items():
        here = plain.document_ids == document
        assert torch.allclose(b.weight[here] * max(count, 1), plain.weight[here])
    assert answers(b) == 8 * 3
    assert answers(batch(stage, prompt=np.ones(L, bool))) == 0


@pytest.mark.parametrize("kind", ["masked", "block", "bert", "uniform", "flow", "autoregressive"])
def test_the_stages_of_every_objective_can_be_sent_to_loader_processes(kind):
    for shift in (False, True):
        options = StageOptions(
            MaskingOptions(0, 8, unit="block", block_size=6),
            kind=kind,
            shift=shift,
            vocab_size=50,
            flow=FlowOptions(50),
        )
        again = pickle.loads(pickle.dumps(stages(options)))
        found = [[s["mask"].tolist() for s in chain[-1](chain[0](samples(3)))] for chain in (stages(options), again)]
        assert found[0] == found[1]
