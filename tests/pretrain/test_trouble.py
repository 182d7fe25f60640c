"""The policy: what is noted, when nothing is saved, when a run goes back, how often, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
import random

import pytest

from pretrain.config import HealthConfig
from pretrain.loop.spikes import Verdict
from pretrain.loop.trouble import MOST_RECORDS, Trouble, describe, ranges

FINE, SPIKE, BROKEN = Verdict.FINE, Verdict.SPIKE, Verdict.NON_FINITE
HEALTH = HealthConfig(spike_patience=3, max_rollbacks=2)


def trouble(max_skipped: int = 4) -> Trouble:
    return Trouble(HEALTH, max_skipped)


def take(found: Trouble, verdicts: str, first: int = 1) -> list[int]:
    """Steps from `first` on, one a letter (. fine, ^ spike, x not finite); where each makes the run go back to (0: nowhere)."""
    kinds = {".": FINE, "^": SPIKE, "x": BROKEN}
    return [found.after_step(step, kinds[v], [step], "nan").first_bad for step, v in enumerate(verdicts, first)]


@pytest.mark.parametrize(
    "verdicts, expected",
    [
        ("....xxx.xxx.", [0] * 12),  # never four in a row
        ("....xxxx", [0] * 7 + [5]),  # to before the first of them
        ("..^.^..", [0] * 7),
        ("..^.^.^", [0] * 6 + [3]),  # three within six steps: to before the first
        ("..^^....^", [0] * 9),  # the first is six steps old and forgotten: two are left
        ("^...^.^^", [0] * 7 + [5]),  # 1 is forgotten
        ("..^xxx^.^", [0] * 9),  # a step that was skipped is no spike, and counts as a step
        ("..^xx^^", [0] * 6 + [3]),
    ],
)
def test_a_run_goes_back_to_before_the_first_of_enough_bad_steps(verdicts, expected):
    assert take(trouble(), verdicts) == expected


def test_no_checkpoint_while_trouble_is_under_way():
    found = trouble()
    assert found.may_save(0)
    take(found, "..x")
    assert not found.may_save(3)
    take(found, ".", 4)
    assert found.may_save(4), "one good step ends it: what was not finite changed nothing"
    take(found, "^", 5)
    allowed = []
    for step in range(6, 14):
        take(found, ".", step)
        allowed.append(found.may_save(step))
    assert allowed == [False] * 5 + [True] * 3, "until no roll-back can go to before the spike of step 5"


def test_a_checkpoint_is_never_from_inside_the_trouble_that_makes_the_run_go_back():
    draw = random.Random(0)
    went_back = 0
    for _ in range(300):
        found, saved, step = Trouble(HealthConfig(spike_patience=3, max_rollbacks=10**9), 4), 0, 0
        while step < 200:
            step += 1
            verdict = draw.choices([FINE, SPIKE, BROKEN], [80, 12, 20])[0]
            action = found.after_step(step, verdict, [step], "nan")
            if action.first_bad:
                went_back += 1
                waited = saved > action.first_bad  # only one that waited as long as spikes are remembered
                assert saved < action.first_bad or waited and step - saved <= 6
                found.rolled_back({})
                break
            if found.may_save(step) and found._waits_since == 0:
                saved = step
                found.saved()
    assert went_back > 100


def test_spikes_that_never_end_and_are_never_enough_do_not_hold_a_checkpoint_up_for_ever():
    found, saves = trouble(), []
    for step in range(1, 60):
        assert not found.after_step(step, SPIKE if step % 4 == 0 else FINE).first_bad
        if step >= 10 and found.may_save(step):  # due from step 10 on
            saves.append(step)
            break
    assert saves == [16], "as long after as spikes are remembered"


def test_after_too_many_roll_backs_without_a_new_checkpoint_the_run_ends_and_says_why():
    found = trouble()
    for _ in range(2):
        assert take(found, "xxxx")[-1] == 1
        found.rolled_back({})
        assert found.in_a_row == 0
    with pytest.raises(
        RuntimeError, match=r"step 4: 4 steps in a row .*nan.* rolled back 2 times .*health.max_rollbacks 2"
    ):
        take(found, "xxxx")
    found = trouble()
    for _ in range(5):
        take(found, "xxxx")
        found.rolled_back({})
        take(found, "....")
        assert found.may_save(4)
        found.saved()  # progress: the count begins anew
    found = trouble()
    take(found, "xxxx")
    found.rolled_back({})
    take(found, "x")
    found.saved()  # on leaving, in the middle of it: no progress
    take(found, "xxx")
    found.rolled_back({})
    with pytest.raises(RuntimeError, match="rolled back 2 times"):
        take(found, "xxxx")
    never = Trouble(HealthConfig(max_rollbacks=0), 4)
    with pytest.raises(RuntimeError, match="max_rollbacks 0"):
        take(never, "xxxx")


def test_a_resumed_run_does_what_the_unbroken_one_does():
    draw = random.Random(1)
    for _ in range(200):
        whole, first = trouble(), trouble()
        verdicts = "".join(draw.choices(".^x", [70, 15, 15], k=30))
        cut = draw.randrange(30)
        try:
            expected = take(whole, verdicts)
        except RuntimeError:
            continue
        before = take(first, verdicts[:cut])
        if any(before):
            continue  # a run that rolled back is somewhere else
        second = trouble()
        second.restore(json.loads(json.dumps(first.state())))
        assert before + take(second, verdicts[cut:], cut + 1) == expected
        assert json.dumps(second.state()) == json.dumps(whole.state())
        assert second.may_save(30) == whole.may_save(30)


def test_the_losses_that_steps_are_judged_by_are_those_of_the_checkpoint_after_a_roll_back():
    found = Trouble(HealthConfig(spike_window=20), 4)
    for _ in range(30):
        assert found.judge(2.0, 1.0, True) == FINE
    kept = json.loads(json.dumps(found.state()))
    for _ in range(30):
        found.judge(50.0, 1.0, True)
    assert found.judge(50.0, 1.0, True) == FINE
    found.rolled_back(kept)
    assert found.judge(50.0, 1.0, True) == SPIKE
    found.rolled_back({})  # to the beginning: nothing is known yet
    assert found.judge(50.0, 1.0, True) == FINE


def test_all_samples_under_suspicion_are_kept_as_few_ranges():
    draw = random.Random(2)
    for _ in range(200):
        numbers = draw.sample(range(400), draw.randrange(1, 60))
        exact = ranges(numbers, 1000)
        assert [n for first, last in exact for n in range(first, last + 1)] == sorted(numbers)
        few = ranges(numbers, 5)
        assert len(few) <= 5 and all(any(a <= n <= b for a, b in few) for n in numbers)
        assert all(a <= b for a, b in few) and all(x[1] < y[0] for x, y in zip(few, few[1:]))
        # No five ranges hold them with fewer numbers that are not theirs: the gaps kept are the widest.
        gaps = sorted((b[0] - a[1] - 1 for a, b in zip(exact, exact[1:])), reverse=True)
        assert sum(b - a + 1 for a, b in few) - len(numbers) == sum(gaps[4:])
    assert ranges([]) == [] and ranges([7, 7, 8]) == [[7, 8]]


def test_the_record_of_skipped_steps_outlives_roll_backs_and_stays_small():
    found = Trouble(HEALTH, 10**9)
    for step in range(1, MOST_RECORDS + 11):
        found.after_step(step, BROKEN, range(32 * step, 32 * step + 32), "a gradient is not finite")
    found.rolled_back({})
    kept = found.state()["skipped"]
    assert len(kept["records"]) == MOST_RECORDS and kept["older"] == 10
    assert kept["records"][0] == {"step": 11, "samples": [[352, 383]], "reason": "a gradient is not finite"}
    assert len(json.dumps(kept)) < 200_000
    again = Trouble(HEALTH, 10**9)
    again.restore({"skipped": json.loads(json.dumps(kept))})
    assert again.state()["skipped"] == kept


def test_inspect_tells_what_was_skipped_and_nothing_of_a_run_without_trouble():
    assert describe({}) == {"skipped_steps": None, "skipped_samples": None}
    assert describe(trouble().state()) == {"skipped_steps": None, "skipped_samples": None}
    found = trouble()
    found.after_step(7, BROKEN, [3, 4, 9], "the loss of sample 4 is not finite")
    stream = {"skips": [{"step": 4, "samples": [32, 63], "reason": "spikes"}]}
    said = describe(found.state() | {"stream": stream})
    assert said["skipped_steps"] == "1: step 7 (the loss of sample 4 is not finite; samples 3-4, 9)"
    assert said["skipped_samples"] == "1: 32-63 before step 5 (spikes)"
