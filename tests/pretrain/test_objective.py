"""What the objective section means, and which settings are refused before anything starts."""

from __future__ import annotations

import math

import pytest

from data.errors import InputError
from pretrain.config import Config, DataConfig, ObjectiveConfig
from pretrain.objective import (
    batch_form,
    check_objective,
    lookahead,
    masking_options,
    normalizer,
    not_a_bound,
    row_length,
    row_loss_of,
    schedule,
)


def config(data=None, **objective):
    chosen = Config(objective=ObjectiveConfig(**objective))
    chosen.data = DataConfig(**{"sequence_length": 24} | (data or {}))
    return chosen


BAD = [
    ({"mask_ratio": (-0.1, 0.5)}, "objective.mask_ratio"),
    ({"mask_ratio": (0.2, 1.3)}, "objective.mask_ratio"),
    ({"mask_ratio": (0.6, 0.6)}, "objective.mask_ratio"),
    ({"mask_ratio": (0.0, 0.0005)}, "objective.eps"),
    ({"eps": 0.0}, "objective.eps"),
    ({"schedule": "polynomial", "power": 0.0}, "objective.power"),
    ({"schedule": "polynomial", "power": -1.0}, "objective.power"),
    ({"schedule": "polynomial", "power": math.nan}, "objective.power"),
    ({"schedule": "polynomial", "power": 0.5}, "objective.power"),
    ({"schedule": "polynomial", "power": 0.1, "masking": "fixed_count"}, "objective.power"),
    ({"normalizer": "masked"}, "objective.normalizer"),
    ({"kind": "block", "block_size": 4, "normalizer": "masked"}, "objective.normalizer"),
    ({"kind": "uniform", "mask_ratio": (0.9995, 1.0)}, "objective.eps"),
    ({"kind": "flow", "eps": 0.4, "mask_ratio": (0.7, 1.0)}, "objective.eps"),
    ({"anneal_attention": 5000}, "train.steps"),
    ({"kind": "block"}, "objective.block_size"),
    ({"kind": "block", "block_size": 5}, "nearest: 4"),
    ({"kind": "block", "block_size": 48}, "nearest: 24"),
    ({"block_size": 4}, "only block has blocks"),
    ({"kind": "block", "block_size": 4, "shift": True}, "objective.shift"),
    ({"kind": "uniform", "shift": True}, "objective.shift"),
    ({"kind": "autoregressive", "anneal_attention": 10}, "objective.anneal_attention"),
    ({"anneal_attention": -1}, "objective.anneal_attention"),
    ({"kind": "uniform", "masking": "fixed_count"}, "objective.masking"),
    ({"kind": "flow", "masking": "fixed_count"}, "objective.masking"),
    ({"noise_unit": "document"}, "objective.noise_unit"),
    (
        {"noise_unit": "document", "data": {"packing": "isolate"}, "kind": "block", "block_size": 4},
        "objective.noise_unit",
    ),
    ({"kind": "flow", "smoothing": 0.0}, "objective.smoothing"),
    ({"kind": "flow", "temperature": (1e-8, 1e-3)}, "objective.temperature"),
    ({"kind": "flow", "temperature": (1e-3, 0.0)}, "objective.temperature"),
    ({"kind": "flow", "temperature_steps": 0}, "objective.temperature_steps"),
    ({"kind": "flow", "candidates": 0}, "objective.candidates"),
    ({"kind": "flow", "candidates": 1000}, "objective.candidates"),
]


@pytest.mark.parametrize("objective,named", BAD, ids=lambda x: str(x)[:60])
def test_settings_that_make_no_sense_are_refused_in_one_line_that_names_them(objective, named):
    with pytest.raises(InputError) as error:
        check_objective(config(**objective))
    assert named in str(error.value) and "\n" not in str(error.value)


GOOD = [
    {},
    {"kind": "block", "block_size": 8, "masking": "fixed_count"},
    {"kind": "block", "block_size": 24},
    {"kind": "bert"},
    {"normalizer": "masked", "weighting": False},
    {"normalizer": "answers"},
    {"schedule": "polynomial", "power": 0.3, "masking": "fixed_count"},
    {"kind": "uniform", "schedule": "cosine"},
    {"kind": "flow"},
    {"kind": "autoregressive"},
    {"shift": True, "anneal_attention": 100},
    {"noise_unit": "document", "data": {"packing": "isolate"}},
    {"mask_ratio": (0.3, 0.8), "schedule": "polynomial", "power": 0.6},
]


@pytest.mark.parametrize("objective", GOOD, ids=str)
def test_settings_that_make_sense_are_taken(objective):
    chosen = config(**objective)
    check_objective(chosen)
    assert batch_form(chosen.objective, 7).start_id == 7
    assert masking_options(chosen).schedule == schedule(chosen.objective)
    assert row_length(chosen) == (48 if chosen.objective.kind == "block" else 24)


@pytest.mark.parametrize(
    "objective,bound",
    [
        ({}, True),
        ({"masking": "fixed_count", "schedule": "cosine"}, True),
        ({"kind": "block", "block_size": 4}, True),
        ({"kind": "uniform"}, True),
        ({"kind": "autoregressive", "weighting": False}, True),
        ({"kind": "bert"}, False),
        ({"kind": "flow"}, False),
        ({"weighting": False}, False),
        ({"eps": 0.3}, False),
        ({"eps": 0.3, "masking": "fixed_count"}, True),
        ({"kind": "uniform", "eps": 0.3}, False),
        ({"mask_ratio": (0.3, 0.8)}, False),
        ({"kind": "block", "block_size": 4, "mask_ratio": (0.3, 1.0)}, False),
    ],
    ids=str,
)
def test_a_loss_that_is_no_bound_says_why(objective, bound):
    assert (not_a_bound(config(**objective).objective) == "") is bound


def test_bert_is_plain_cross_entropy_per_masked_token_at_15_to_99_percent():
    bert = config(kind="bert").objective
    assert (schedule(bert).low, schedule(bert).high) == (0.15, 0.99)
    assert normalizer(bert) == "masked" and not batch_form(bert, 0).weighting
    assert normalizer(config().objective) == "tokens" and batch_form(config().objective, 0).weighting


def test_attention_grows_from_causal_to_full():
    chosen = config(anneal_attention=10)
    grown = [lookahead(chosen, step) for step in range(12)]
    assert (
        max(len({lookahead(config(anneal_attention=900, data={"sequence_length": 4096}), s) for s in range(900)}), 1)
        <= 65
    )
    assert grown[0] == 0 and grown[10:] == [None, None] and grown[:10] == sorted(grown[:10]) and grown[9] == 20
    assert lookahead(config(), 0) is None


def test_row_losses_by_kind():
    names = {kind: type(row_loss_of(config(kind=kind).objective)).__name__ for kind in ("masked", "uniform", "flow")}
    assert names == {"masked": "CrossEntropy", "uniform": "UniformBound", "flow": "SymmetricKL"}
    assert row_loss_of(config(kind="flow", smoothing=0.1).objective).smoothing == 0.1
