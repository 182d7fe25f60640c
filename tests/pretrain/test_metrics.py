"""Metrics and the validation bound, against token-by-token sums and against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from data.batch import DiffusionBatch
from data.manifest import SpecialIds
from parallel.mesh import single_process_mesh
from pretrain.evaluation.validation import Validation
from pretrain.metrics import T_BINS, global_counts, sums_by_level, token_sums, train_metrics
from tests.distributed import training_case as case


@pytest.fixture(scope="module")
def group() -> list[DiffusionBatch]:
    return case.batches(steps=5)[2]


def made_up_output(batch: DiffusionBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value, cross-entropy and correct, none of which follows from another."""
    g = torch.Generator().manual_seed(int(batch.sample_ids[0]))
    value, ce = (torch.rand(batch.masked.shape, generator=g) * 5 * batch.masked for _ in range(2))
    return value, ce, (torch.rand(ce.shape, generator=g) < 0.4) & batch.masked


def test_every_metric_equals_a_loop_over_tokens_and_does_not_depend_on_the_split(group):
    outputs = [made_up_output(b) for b in group]
    normalizer, masked = global_counts(group, single_process_mesh())
    found = train_metrics(sum(token_sums(b, *o) for b, o in zip(group, outputs)), normalizer)
    tokens = [
        {k: getattr(b, k)[i, j].item() for k in ("masked", "eligible", "weight", "t", "p_mask")}
        | {"value": value[i, j].item(), "ce": ce[i, j].item(), "correct": correct[i, j].item()}
        for b, (value, ce, correct) in zip(group, outputs)
        for i, j in itertools.product(*map(range, ce.shape))
    ]
    counted = [x for x in tokens if x["masked"]]
    eligible = [x for x in tokens if x["eligible"]]
    assert (normalizer, masked) == (len(eligible), len(counted)) and 0 < masked < normalizer < len(tokens)
    expected = {
        "train/loss": sum(x["weight"] * x["value"] for x in counted) / len(eligible),
        "train/ce_loss": sum(x["ce"] for x in counted) / len(counted),
        "train/accuracy": sum(x["correct"] for x in counted) / len(counted),
        "train/mask_ratio": len(counted) / len(eligible),
        "train/num_masked_tokens": len(counted),
        "train/avg_p_mask": sum(x["p_mask"] for x in eligible) / len(eligible),
        "train/importance_weight_avg": sum(x["weight"] for x in counted) / len(counted),
    }
    for k in range(T_BINS):
        inside = [x["value"] for x in counted if min(int(x["t"] * T_BINS), T_BINS - 1) == k]
        if inside:
            expected[f"train/loss_t_bin_{k}"] = sum(inside) / len(inside)
    assert found == pytest.approx(expected, rel=1e-6)


def test_sums_by_level_are_counted_in_ten_bins_of_which_the_last_holds_its_end(group):
    t = torch.tensor([0.0, 0.0999, 0.1, 0.55, 0.95, 1.0, 0.5]).expand(1, -1).float()
    masked = torch.tensor([[True] * 6 + [False]])
    batch = DiffusionBatch(**{**group[0].tensors(), "t": t, "masked": masked})
    sums, counts = sums_by_level(batch, torch.tensor([[1.0, 2, 4, 8, 16, 32, 64]])).tolist()
    assert sums == [3, 4, 0, 0, 0, 8, 0, 0, 0, 48] and counts == [2, 1, 0, 0, 0, 1, 0, 0, 0, 2]


VOCAB, LENGTH = 4, 3


class UnigramEngine:
    """An engine whose model knows only token frequencies, so that the exact bound is the cross-entropy with them."""

    mesh = single_process_mesh()
    chunks = ()

    def __init__(self, probabilities: list[float]):
        self.cost = -torch.tensor(probabilities, dtype=torch.float64).log()

    def forward(self, batch: dict[str, torch.Tensor]):
        value = self.cost[batch["target_ids"]].masked_fill(~batch["masked"], 0.0)
        return type("Output", (), {"value": value})


class Tokens:
    special = SpecialIds(mask=0, eos=1, pad=1)
    row_tokens, has_spans = 0, False

    def __init__(self, ids: np.ndarray):
        self.ids, self.tokens = ids.astype(np.uint16), len(ids)

    def read_tokens(self, start: int, count: int) -> np.ndarray:
        return self.ids[start : start + count]


def test_the_validation_bound_is_exact_where_it_can_be_computed_and_its_standard_error_is_honest():
    """For independent tokens the NELBO of any mask count is the cross-entropy: E[L / l sum over masked] = L E[cost].

    300 token sets: their mean must be the exact bound, and their spread what each says of itself. The last block of each is
    shorter, so that blocks weigh differently. The noise levels are stratified over blocks, so the error may only be overstated.
    """
    probabilities = [0.1, 0.2, 0.3, 0.4]
    engine = UnigramEngine([0.25, 0.25, 0.2, 0.3])
    exact = float((torch.tensor(probabilities, dtype=torch.float64) * engine.cost).sum())
    found = []
    for seed in range(300):
        ids = np.random.default_rng(seed).choice(VOCAB, LENGTH * 40 - 2, p=probabilities)
        metrics = Validation(Tokens(ids), LENGTH, 64).run(engine)
        assert metrics["val/ppl_bound"] == pytest.approx(math.exp(metrics["val/nelbo"]))
        found.append((metrics["val/nelbo"], metrics["val/nelbo_se"]))
    values, errors = np.array(found).T
    spread = values.std(ddof=1)
    assert abs(values.mean() - exact) < 4 * spread / math.sqrt(len(values))
    assert 0.85 < np.sqrt((errors**2).mean()) / spread < 1.25


def test_blocks_without_a_finite_loss_are_counted_and_named():
    """Token 3 costs no number: the blocks that have one masked are broken, the value is nan, and nothing crashes."""
    ids = np.full(7 * 12, 2)
    ids[7 * 4 : 7 * 5] = ids[7 * 9 : 7 * 10] = 3
    validation, cost = Validation(Tokens(ids), 7, 5), UnigramEngine([0.25] * 4)
    whole = validation.run(cost)
    assert set(whole) == {"val/nelbo", "val/nelbo_se", "val/ppl_bound"} and "finite" not in validation.sentence(whole)
    for value in (math.nan, math.inf):
        cost.cost[3] = value
        found = validation.run(cost)
        assert not math.isfinite(found["val/nelbo"])
        assert (found["val/broken_blocks"], found["val/first_broken_block"]) == (2, 4)
        assert validation.sentence(found).endswith("; the loss is not finite in 2 of 12 blocks, block 4 first")


def test_the_range_of_a_blocks_noise_level_follows_from_its_number_and_the_number_of_blocks():
    """So a set in which every fourth block is dear is not estimated without bias, and other `most` are other draws."""
    ids = np.full(16 * 8, 2)

    def levels(most: int, seed: int) -> np.ndarray:
        batches = Validation(Tokens(ids), 8, 16, most, seed=seed).batches(0, 1)
        return np.concatenate([batch.t[:, 0].numpy() for batch in batches])

    strata = [np.floor(levels(16, seed) * 16) for seed in range(5)]
    assert all(np.array_equal(strata[0], other) for other in strata) and sorted(strata[0]) == list(range(16))
    assert not np.allclose(levels(16, 0)[:8], levels(8, 0))


def test_one_block_alone_has_no_standard_error():
    metrics = Validation(Tokens(np.array([2, 3, 2])), LENGTH, 4).run(UnigramEngine([0.25] * 4))
    assert metrics["val/nelbo"] > 0 and math.isnan(metrics["val/nelbo_se"])


def test_validation_is_the_same_for_any_microbatch_and_number_of_ranks():
    ids = np.random.default_rng(1).integers(0, VOCAB, 101 * 7 - 3)
    engine = UnigramEngine([0.1, 0.2, 0.3, 0.4])
    one = Validation(Tokens(ids), 7, 101).run(engine)
    for micro in (1, 4, 50):
        assert Validation(Tokens(ids), 7, micro).run(engine) == pytest.approx(one, rel=1e-12)
    for ranks, micro in ((2, 3), (5, 8), (7, 50)):
        validation = Validation(Tokens(ids), 7, micro)
        parts = [list(validation.batches(rank, ranks)) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1, "every rank must run the same number of collective forwards"
        counted = sorted(int(s) for part in parts for b in part for s in b.sample_ids[b.masked.any(1)])
        assert counted == list(range(101))


def test_unigram_entropy_is_that_of_the_token_frequencies():
    ids = np.array([2] * 50 + [3] * 25 + [5] * 25)
    assert Validation(Tokens(ids), 7, 4).unigram_entropy() == pytest.approx(1.5 * math.log(2))
