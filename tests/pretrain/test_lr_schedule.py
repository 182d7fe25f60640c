"""The learning rate of every schedule, against its definition."""

from __future__ import annotations

import math

import pytest

from pretrain.config import OptimizerConfig
from pretrain.load_config import load_config
from pretrain.lr_schedule import learning_rate


def rates(total: int, **options) -> list[float]:
    return [learning_rate(step, total, OptimizerConfig(**options)) for step in range(total)]


def test_warm_up_is_linear_and_reaches_the_peak():
    found = rates(20, schedule="constant", lr=2.0, warmup_steps=8)
    assert found[:8] == pytest.approx([2.0 * (i + 1) / 8 for i in range(8)])
    assert found[8:] == [2.0] * 12


def test_warm_up_stable_decay_holds_the_peak_and_ends_at_the_minimum():
    found = rates(30, schedule="wsd", lr=1.0, min_lr=0.1, warmup_steps=5, decay_steps=10)
    assert found[5:20] == [1.0] * 15
    assert found[20:] == pytest.approx([1.0 - 0.9 * (i + 1) / 10 for i in range(10)])


def test_cosine_is_half_a_cosine_between_warm_up_and_the_last_step():
    found = rates(24, schedule="cosine", lr=1.0, min_lr=0.2, warmup_steps=4)
    for step in range(4, 24):
        assert found[step] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * (step - 3) / 20)))
    assert found[-1] == pytest.approx(0.2)


def test_llada_s_own_stages():
    """4e-4 for 1.2 T tokens behind 2000 steps of warm-up, 1e-4 for 0.8 T, linear to 1e-5 over 0.3 T."""
    config = load_config(["--config", "configs/llada_8b.yaml"])
    rate = lambda step: learning_rate(step, config.train.steps, config.optimizer)  # noqa: E731
    tokens = config.train.global_batch_size * config.data.sequence_length
    assert rate(999) == pytest.approx(2e-4) and rate(1999) == pytest.approx(4e-4)
    assert rate(int(1.19e12 / tokens)) == 4e-4
    assert rate(int(1.21e12 / tokens)) == rate(int(1.99e12 / tokens)) == 1e-4
    assert rate(int(2.15e12 / tokens)) == pytest.approx(5.5e-5, rel=1e-2)
    assert rate(config.train.steps - 1) == pytest.approx(1e-5)
    assert config.train.steps * tokens == pytest.approx(2.3e12, rel=1e-5)
