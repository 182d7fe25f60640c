"""Whom the judge names, over a table of what ranks say of themselves."""

from __future__ import annotations

import pytest

from pretrain.watching.heartbeat import PHASES, Record
from pretrain.watching.judge import Age, Limits, culprit

LIMITS = Limits(stall=300, beat=10)


def record(rank, phase="step", step=7, doing="train_step", **collectives):
    return Record(rank=rank, world=4, host=f"node{rank}", phase=phase, step=step, doing=doing, collectives=collectives)


def everybody(ages=None, **of_rank):
    """Four ranks that all wait in step 7; of_rank: r2=(record, age) changes one."""
    records = {rank: record(rank, world=50) for rank in range(4)}
    aged = {rank: Age(5, 310) for rank in range(4)} | (ages or {})
    for name, (changed, age) in of_rank.items():
        records[int(name[1:])], aged[int(name[1:])] = changed, age
    return records, aged


def named(records, ages):
    fault = culprit(records, ages, LIMITS)
    return fault and (fault.kind, fault.rank)


@pytest.mark.parametrize(
    "what, state, expected",
    [
        ("all move", everybody({r: Age(5, 12) for r in range(4)}), None),
        ("just before the limit", everybody({r: Age(5, 299) for r in range(4)}), None),
        ("nobody is behind", everybody(), ("stalled", None)),
        ("one collective behind", everybody(r2=(record(2, world=49), Age(5, 310))), ("stalled", 2)),
        ("one step behind", everybody(r2=(record(2, step=6, world=50), Age(5, 310))), ("stalled", 2)),
        ("still validates, within its time", everybody(r2=(record(2, "validate", 6), Age(5, 900))), None),
        ("validates for too long", everybody(r2=(record(2, "validate", 6), Age(5, 1801))), ("stalled", 2)),
        ("behind but moving", everybody(r2=(record(2, step=6), Age(5, 2))), None),
        ("stopped", everybody(r3=(record(3, world=50), Age(310, 310, "stopped"))), ("stopped", 3)),
        ("stopped, and nobody waits yet", everybody({r: Age(5, 90, "stopped" * (r == 3)) for r in range(4)}), None),
        (
            "stopped comes before behind",
            everybody(r1=(record(1, world=49), Age(5, 310)), r3=(record(3, world=50), Age(310, 310, "stopped"))),
            ("stopped", 3),
        ),
        ("not heard of", everybody(r1=(record(1, world=50), Age(320, 330))), ("silent host", 1)),
        ("a hiccup of the file system", everybody(r1=(record(1, world=50), Age(60, 330))), ("stalled", None)),
        ("not heard of, all others move", everybody({r: Age(5 + 400 * (r == 1), 4) for r in range(4)}), None),
        ("a folder that nobody can write", everybody({r: Age(400, 400) for r in range(4)}), ("stalled", None)),
        ("one that never came", everybody(r2=(None, Age(1900, 0))), ("silent host", 2)),
        ("one that may still come", everybody(r2=(None, Age(400, 0))), None),
        ("one that has ended", everybody(r2=(record(2, "end", 7), Age(4000, 4000, "ended 0"))), ("stalled", None)),
        ("one that sits at its end, the others in a step", everybody(r2=(record(2, "end", 7), Age(400, 400))), None),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(what, state, expected):
    if what.startswith("one that sits"):  # rank 2 is ahead, the three others are equally behind
        fault = culprit(*state, LIMITS)
        assert fault and fault.kind == "stalled" and fault.rank in (0, 1, 3) and "as far behind: 2 more" in fault.cause
        return
    assert named(*state) == expected


def test_a_chain_of_waits_ends_at_the_one_that_waits_for_nobody():
    # tp groups [0,1] and [2,3], dp groups [0,2] and [1,3]. Rank 3 hangs; 2 waits for it in tp, 1 in dp; 0 waits for 2 in dp.
    records = {
        0: record(0, **{"tp[0,1]": 9, "dp[0,2]": 4}),
        1: record(1, **{"tp[0,1]": 9, "dp[1,3]": 4}),
        2: record(2, **{"tp[2,3]": 9, "dp[0,2]": 3}),
        3: record(3, **{"tp[2,3]": 8, "dp[1,3]": 3}),
    }
    fault = culprit(records, {rank: Age(5, 310) for rank in range(4)}, LIMITS)
    assert fault and fault.rank == 3 and "3 collectives begun in group dp[1,3], the others 4" in fault.cause
    assert (fault.host, fault.phase, fault.step, fault.doing) == ("node3", "step", 7, "train_step")


@pytest.mark.parametrize("phase", PHASES)
def test_a_world_of_one_is_named_after_its_phases_time_even_if_nothing_can_be_published(phase):
    limit = 300 if phase == "step" else 1800
    for published in (5, 5000):
        alone = {0: Record(phase=phase, step=3)}
        assert culprit(alone, {0: Age(published, limit - 1)}, LIMITS) is None
        fault = culprit(alone, {0: Age(published, limit)}, LIMITS)
        assert fault and (fault.kind, fault.rank, fault.phase, fault.step) == ("stalled", 0, phase, 3)


def test_causes_carry_no_rank_and_no_host():
    for changed in ({"r2": (record(2, world=49), Age(5, 310))}, {"r1": (record(1, world=50), Age(320, 330))}):
        fault = culprit(*everybody(**changed), LIMITS)
        assert fault and fault.host and fault.host not in fault.cause and "rank 1" not in fault.cause
