"""Laws of noise levels, masks, random lengths and CFG dropout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.batch import Form, expand
from data.cfg_dropout import cfg_dropout, no_dropout, prefix_condition
from data.compact import collate
from data.masking import MaskingOptions, draw_mask, masking, random_length
from data.noise import noise_level

L = 64
MASK, PAD = 3, 1


def samples(count: int, length: int = L, **more):
    for i in range(count):
        tokens = np.random.default_rng(i).integers(4, 60000, length).astype(np.uint16)
        yield {"sample_id": i, "tokens": tokens, "length": length, **more}


def batch(stages, count=64):
    stream = samples(count)
    for stage in stages:
        stream = stage(stream)
    return expand(next(collate(stream, count, PAD)), MASK)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 12, 64, 1280])
def test_each_step_has_exactly_one_noise_level_in_each_stratum(size):
    for step in (0, 1, 5):
        t = np.array([noise_level(0, "train", i, size) for i in range(step * size, (step + 1) * size)])
        assert (t > 0).all() and (t <= 1).all()
        assert sorted(np.ceil(t * size).astype(int)) == list(range(1, size + 1))


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_every_contiguous_slice_is_nearly_stratified_too(ranks):
    """A rank's share of 256 samples: its empirical distribution of t stays within 2.5 samples of uniform, for any step."""
    size = 256
    share = size // ranks
    for step in range(8):
        t = np.array([noise_level(1, "train", i, size) for i in range(step * size, (step + 1) * size)])
        for part in t.reshape(ranks, share):
            below = np.searchsorted(np.sort(part), np.linspace(0, 1, 41))
            assert np.abs(below - np.linspace(0, 1, 41) * share).max() < 2.5


def test_noise_does_not_grow_with_the_position_in_the_batch():
    size = 64
    t = np.array([noise_level(2, "train", i, size) for i in range(50 * size)]).reshape(50, size)
    assert abs(np.corrcoef(np.arange(size), t.mean(0))[0, 1]) < 0.35


def test_iid_noise_levels_are_uniform():
    """Kolmogorov-Smirnov against the uniform distribution: 1.95 / sqrt(n) is the 99.9% quantile."""
    t = np.sort([noise_level(3, "train", i, 8, "iid") for i in range(4000)])
    assert np.abs(t - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / math.sqrt(4000)


def test_bernoulli_masks_hit_each_token_with_the_probability_of_its_sample():
    """Sum over samples of (masked - L p) / sqrt(L p (1 - p)) is standard normal by the number of samples."""
    options = MaskingOptions(0, 500)
    scores, positions = [], np.zeros(L)
    for i in range(2000):
        mask, t, p, weight = draw_mask(i, L, None, L, options)
        assert p == (1 - 1e-3) * t + 1e-3 and weight == 1 / p
        if 0.02 < p < 0.98:
            scores.append((mask.sum() - L * p) / math.sqrt(L * p * (1 - p)))
        positions += mask
    assert abs(np.mean(scores)) < 4 / math.sqrt(len(scores))
    assert abs(np.var(scores) - 1) < 4 * math.sqrt(2 / len(scores))
    assert np.abs(positions / 2000 - 0.5).max() < 5 * 0.5 / math.sqrt(2000)


def test_fixed_count_masks_have_every_count_equally_often_and_the_weight_of_their_count():
    options = MaskingOptions(0, 8, t_sampling="iid", masking="fixed_count")
    counts = []
    for i in range(3000):
        mask, _, p, weight = draw_mask(i, 12, np.arange(16) < 2, 16, options)
        assert not mask[:2].any() and not mask[12:].any()
        assert p == mask.sum() / 10
        counts.append(int(mask.sum()))
    observed = np.bincount(counts, minlength=11)[1:]
    assert min(counts) == 1 and max(counts) == 10
    assert ((observed - 300) ** 2 / 300).sum() < 34  # chi-square, 9 degrees of freedom, 99.99% quantile


def test_masks_differ_between_samples_seeds_and_streams_and_repeat_for_the_same():
    base = MaskingOptions(0, 8)
    first = draw_mask(5, L, None, L, base)[0]
    assert np.array_equal(first, draw_mask(5, L, None, L, base)[0])
    for sample, options in ((6, base), (5, MaskingOptions(1, 8)), (5, MaskingOptions(0, 8, stream="validation"))):
        assert not np.array_equal(first, draw_mask(sample, L, None, L, options)[0])


def test_a_sample_that_is_cut_is_padding_behind_its_length_for_itself_alone():
    stages = [lambda s: random_length(s, 0, 0.5), lambda s: masking(s, MaskingOptions(0, 64)), no_dropout]
    b = batch(stages)
    length = b.eligible.sum(1)
    cut = length < L
    assert 15 < int(cut.sum()) < 49 and int(length.min()) >= 1
    inside = b.position_ids < length[:, None]
    assert (b.eligible == inside).all()
    assert (b.document_ids[~inside] == -1).all() and (b.document_ids[inside] == 0).all()
    assert not b.masked[~inside].any() and (b.weight[~inside] == 0).all()
    assert (b.target_ids[~inside] == PAD).all() and (b.noisy_ids[~inside] == PAD).all()


def test_random_lengths_are_uniform_and_as_frequent_as_asked():
    cut = [s["length"] for s in random_length(samples(6000, 10), 0, 0.25)]
    lengths = np.bincount(cut, minlength=11)
    # 1500 are cut; each of 1..10 gets a tenth of them (a cut to 10 cannot be told from none)
    assert abs(lengths[1:10].sum() - 1350) < 5 * math.sqrt(6000 * 0.225 * 0.775)
    assert ((lengths[1:10] - lengths[1:10].mean()) ** 2 / lengths[1:10].mean()).sum() < 32


def test_what_the_model_sees_what_it_must_predict_and_what_it_is_paid():
    b = batch([lambda s: masking(s, MaskingOptions(0, 64)), no_dropout])
    clean = np.stack([s["tokens"] for s in samples(64)]).astype(np.int64)
    assert np.array_equal(b.target_ids.numpy(), clean)
    assert (b.noisy_ids[b.masked] == MASK).all()
    assert np.array_equal(b.noisy_ids[~b.masked].numpy(), clean[~b.masked.numpy()])
    assert torch.allclose(b.weight, b.masked / b.p_mask)
    assert 0.4 < float(b.masked.float().mean()) < 0.6


def test_masks_are_carried_and_survive_a_mask_id_that_is_an_ordinary_token():
    stream = [{"sample_id": 1, "tokens": np.full(L, MASK, np.uint16), "length": L}]
    b = expand(next(collate(no_dropout(masking(stream, MaskingOptions(0, 8))), 1, PAD)), MASK)
    assert 0 < int(b.masked.sum()) < L
    assert (b.noisy_ids == MASK).all()


def test_cfg_dropout_hides_the_condition_and_leaves_loss_positions_masks_and_weights_alone():
    options = MaskingOptions(0, 64)
    chain = [lambda s: prefix_condition(s, 0), lambda s: masking(s, options)]
    kept, mixed = batch([*chain, no_dropout]), batch([*chain, lambda s: cfg_dropout(s, 0, 0.5)])
    assert 15 < int(mixed.dropped.sum()) < 49
    for name in ("masked", "weight", "eligible", "target_ids", "t", "p_mask", "sample_ids"):
        assert getattr(kept, name).equal(getattr(mixed, name)), name
    condition = ~mixed.eligible
    assert condition.any(1).sum() > 50
    hidden = condition & mixed.dropped[:, None]
    assert (mixed.noisy_ids[hidden] == MASK).all()  # token for token the sampler's unconditional input
    assert mixed.noisy_ids[~hidden].equal(kept.noisy_ids[~hidden])
    assert mixed.noisy_ids[condition & ~mixed.dropped[:, None]].equal(
        kept.target_ids[condition & ~mixed.dropped[:, None]]
    )
    assert not mixed.masked[condition].any()


def test_the_drop_rate_is_within_a_binomial_bound_and_nothing_is_dropped_without_a_condition():
    rate, n = 0.1, 5000
    dropped = [s["dropped"] for s in cfg_dropout(samples(n, 4, prompt=np.arange(4) < 2), 0, rate)]
    assert abs(sum(dropped) - n * rate) < 5 * math.sqrt(n * rate * (1 - rate))
    assert not any(s["dropped"] for s in cfg_dropout(samples(500, 4), 0, 0.9))


def test_a_weight_below_the_floor_cannot_occur():
    b = batch([lambda s: masking(s, MaskingOptions(0, 64)), no_dropout])
    assert float(b.weight.max()) <= 1 / 1e-3
    compact = next(collate(no_dropout(masking(samples(8), MaskingOptions(0, 8))), 8, PAD))
    unweighted = expand(compact, MASK, Form(weighting=False))
    assert set(unweighted.weight.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("kind", ["bernoulli", "fixed_count"])
def test_prompts_anywhere_in_a_sample_are_clean_without_loss_and_hidden_only_when_dropped(kind):
    prompt = np.zeros(L, bool)
    prompt[[*range(5, 20), *range(40, 43)]] = True
    options = MaskingOptions(0, 64, masking=kind)
    chain = [lambda s: masking(({**x, "prompt": prompt} for x in s), options)]
    kept, mixed = batch([*chain, no_dropout]), batch([*chain, lambda s: cfg_dropout(s, 0, 0.5)])
    assert not kept.eligible[:, prompt].any() and kept.eligible[:, ~prompt].all()
    assert not kept.masked[:, prompt].any() and kept.masked[:, ~prompt].any(0).all()
    assert kept.noisy_ids[:, prompt].equal(kept.target_ids[:, prompt])
    assert kept.masked.equal(mixed.masked) and 10 < int(mixed.dropped.sum()) < 54
    assert (mixed.noisy_ids[mixed.dropped][:, prompt] == MASK).all()
    if kind == "fixed_count":  # the weight is eligible / l, with eligible the tokens outside the prompt
        counts = kept.masked.sum(1)
        assert torch.allclose(kept.p_mask[:, 0], counts / 46.0)


def test_a_sample_without_loss_anywhere_is_left_alone():
    nothing = [{"sample_id": i, "tokens": np.full(4, 9, np.uint16), "prompt": np.ones(4, bool)} for i in range(3)]
    for kind in ("bernoulli", "fixed_count"):
        b = expand(next(collate(no_dropout(masking(nothing, MaskingOptions(0, 8, masking=kind))), 3, PAD)), MASK)
        assert not b.masked.any() and not b.eligible.any() and not b.weight.any() and b.weight.isfinite().all()


def test_a_sample_that_is_taken_out_counts_for_nothing_and_the_others_stay():
    compact = next(collate(no_dropout(masking(samples(6), MaskingOptions(0, 8))), 6, PAD))
    lost = np.array([False, True, False, False, True, False])
    whole, less = expand(compact, MASK), expand(compact.without(lost), MASK)
    assert not less.masked[lost].any() and not less.eligible[lost].any() and (less.document_ids[lost] == -1).all()
    for name in ("masked", "eligible", "weight", "noisy_ids", "target_ids"):
        assert getattr(less, name)[~lost].equal(getattr(whole, name)[~lost])


def test_isolated_documents_are_numbered_and_their_positions_begin_at_zero():
    borders = np.zeros(L, bool)
    borders[[0, 3, 4, 30]] = True
    stream = ({**s, "borders": borders if s["sample_id"] else None, "length": 40} for s in samples(2))
    b = expand(next(collate(no_dropout(masking(stream, MaskingOptions(0, 8))), 2, PAD)), MASK)
    documents = np.repeat([0, 1, 2, 3, -1], [3, 1, 26, 10, 24])
    positions = np.concatenate([np.arange(3), [0], np.arange(26), np.arange(34)])
    assert b.document_ids[1].tolist() == documents.tolist()
    assert b.position_ids[1].tolist() == positions.tolist()
    assert b.document_ids[0].tolist() == [0] * 40 + [-1] * 24 and b.position_ids[0].tolist() == list(range(L))
    assert b.document_ids.dtype == b.position_ids.dtype == torch.int32


def test_pairs_of_tokens_that_attend_to_each_other_are_counted_as_the_batch_says():
    borders = np.zeros(L, bool)
    borders[[3, 4, 30]] = True
    for more in ({}, {"borders": borders}, {"borders": borders, "length": 20}, {"length": 20}):
        stream = ({**s, **more} for s in samples(3))
        compact = next(collate(no_dropout(masking(stream, MaskingOptions(0, 8))), 3, PAD))
        ids = expand(compact, MASK).document_ids
        assert compact.pairs() == int((ids[:, :, None] == ids[:, None, :]).sum())
