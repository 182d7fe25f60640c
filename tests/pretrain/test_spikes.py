"""The spike detector: nothing on runs that go well, every planted spike on those that do not, and the same after a resume."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pretrain.config import HealthConfig
from pretrain.loop.spikes import SpikeDetector, Verdict, deviations

HEALTH = HealthConfig()


def detector(sigma: float = HEALTH.spike_sigma, window: int = HEALTH.spike_window) -> SpikeDetector:
    return SpikeDetector(sigma, window)


def series(steps: int, seed: int = 0, noise: float = 0.04) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradient norms like those of a small masked-diffusion run: a power law with noise whose right tail is heavy (a
    few low noise levels carry large weights), norms that fall with it.
    """
    draw = np.random.default_rng(seed)
    level = 2.2 + 4.3 * (1 + np.arange(steps) / 30) ** -0.6
    heavy = draw.normal(size=steps) + 0.6 * draw.exponential(size=steps)
    norm = np.exp(0.25 * draw.normal(size=steps)) * (0.3 + 2 * (1 + np.arange(steps) / 50) ** -0.8)
    return level * (1 + noise * heavy), norm


def verdicts(found: SpikeDetector, losses, norms) -> list[Verdict]:
    return [found.observe(float(loss), float(norm), True) for loss, norm in zip(losses, norms)]


@pytest.mark.parametrize("seed", range(8))
def test_a_run_that_goes_well_has_no_spike_from_its_first_step_on(seed):
    found = verdicts(detector(), *series(5000, seed))
    assert not any(found)


def test_a_long_tail_of_normal_losses_is_no_spike_and_the_unit_of_the_loss_does_not_count():
    losses = np.exp(np.random.default_rng(3).normal(size=3000))  # one in a hundred is ten times the median
    assert not any(verdicts(detector(), losses, losses))
    losses[2000:2005] *= 1e5
    for unit in (1.0, 1e-6, 1e6):
        found = [step for step, verdict in enumerate(verdicts(detector(), unit * losses, losses)) if verdict]
        assert found == list(range(2000, 2005))


@pytest.mark.parametrize("at", [150, 600, 3000])
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_spike_is_found_at_its_step_and_only_there(seed, at):
    losses, norms = series(at + 50, seed)
    losses[at : at + 5] *= 2.5
    found = [step for step, verdict in enumerate(verdicts(detector(), losses, norms)) if verdict]
    assert found == list(range(at, at + 5))


def test_a_gradient_norm_alone_is_no_spike():
    found = detector()
    losses, norms = series(1000)
    norms[900] = 1e6
    assert not any(verdicts(found, losses, norms))


def test_deviations_are_counted_in_the_spread_of_the_steps_before_above_their_median():
    draw = np.random.default_rng(1)
    known = draw.normal(3.0, 0.5, 4001)
    middle = np.median(known)
    spread = 1.4826 * np.median(abs(known - middle))
    rising = sorted(known)  # an order in which nothing falls
    assert deviations(5.0, rising) == pytest.approx((5.0 - middle) / spread, rel=0.05)
    assert spread == pytest.approx(0.5, rel=0.05), "of normal values it is their standard deviation"
    assert deviations(1.0, rising) == 0.0, "a loss that falls is no trouble"
    long_tail = np.sort(np.where(np.arange(4001) % 5 == 0, known + 10, known))  # a fifth of the steps are high
    quantile = (np.quantile(long_tail, 0.9) - np.median(long_tail)) / 1.2816
    assert quantile > 5 * spread
    assert deviations(60.0, list(long_tail)) == pytest.approx((60 - np.median(long_tail)) / quantile, rel=1e-3)


def test_a_fall_is_not_taken_for_spread_and_a_rise_is_not_expected():
    noise = 0.01 * np.random.default_rng(2).normal(size=200)
    fall, rise = 5 - 0.01 * np.arange(200) + noise, 3 + 0.01 * np.arange(200) + noise
    assert deviations(3.3, list(fall)) == pytest.approx((3.3 - 3.0) / 0.01, rel=0.3)
    assert deviations(5.3, list(rise)) < 5


def test_a_loss_that_hardly_varies_does_not_alarm_and_a_constant_one_neither():
    found = detector()
    for step in range(400):
        assert found.observe(2.0 + 1e-6 * (step % 3), 1.0, True) == Verdict.FINE
    assert found.observe(2.05, 1.0, True) == Verdict.FINE, "50000 of its own deviations, but 2.5 percent"
    assert found.observe(3.0, 1.0, True) == Verdict.SPIKE
    zero = detector()
    assert not any(zero.observe(0.0, 0.0, True) for _ in range(300))
    assert zero.observe(1.0, 0.0, True) == Verdict.SPIKE


def test_nothing_is_a_spike_before_the_window_is_half_full_or_with_sigma_0():
    found = detector(window=50)
    for step in range(24):
        found.observe(2.0 + 0.01 * (step % 5), 1.0, True)
    assert found.observe(100.0, 1.0, True) == Verdict.FINE
    assert found.observe(100.0, 1.0, True) == Verdict.SPIKE
    off = detector(sigma=0.0)
    assert not any(off.observe(loss, 1.0, True) for loss in [2.0] * 300 + [1e6] * 20)


@pytest.mark.parametrize("patience", [2, 5, 10])
def test_spikes_do_not_hide_the_next_ones_in_a_window_of_twenty_times_the_patience(patience):
    for length in (10 * patience, 20 * patience):  # half full and full
        found = detector(window=20 * patience)
        for step in range(length):
            assert found.observe(2.0 + 0.1 * (step % 7), 1.0, True) == Verdict.FINE
        assert [found.observe(9.0, 1.0, True) for _ in range(patience)] == [Verdict.SPIKE] * patience


def test_a_new_level_becomes_the_normal_one():
    losses, norms = series(1200)
    losses[600:] *= 3
    found = [step for step, verdict in enumerate(verdicts(detector(), losses, norms)) if verdict]
    assert found == list(range(600, 600 + len(found)))
    assert 10 <= len(found) <= 110, "until enough of the window is of the new level"


@pytest.mark.parametrize("loss, norm, applied", [(math.nan, 1.0, True), (2.0, math.inf, False), (2.0, 1.0, False)])
def test_what_is_not_finite_or_was_not_applied_is_told_and_leaves_no_trace(loss, norm, applied):
    found, other = detector(), detector()
    losses, norms = series(300)
    for step in range(300):
        assert found.observe(losses[step], norms[step], True) == other.observe(losses[step], norms[step], True)
        assert found.observe(loss, norm, applied) == Verdict.NON_FINITE
    assert found.state() == other.state()


def test_a_resumed_run_decides_the_same_to_the_bit():
    losses, norms = series(900, noise=0.3)
    losses[::50] *= 2.2
    through = detector(sigma=2.0, window=40)
    whole = verdicts(through, losses, norms)
    assert 0 < sum(map(bool, whole)) < 300
    for cut in (0, 7, 33, 101, 500):
        first, second = detector(sigma=2.0, window=40), detector(sigma=2.0, window=40)
        before = verdicts(first, losses[:cut], norms[:cut])
        second.restore(json.loads(json.dumps(first.state())))
        assert before + verdicts(second, losses[cut:], norms[cut:]) == whole
        assert json.dumps(second.state()) == json.dumps(through.state())
