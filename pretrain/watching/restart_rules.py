"""Whether a run is started again: the rules, which know nothing but its attempts so far.

A run that lost its time slot goes on. A fault of the machine goes on too, with growing pauses; a fault that comes again at the
same step is the run's own and no number of restarts mends it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Optional

from pretrain.config import HealthConfig
from pretrain.watching.faults import INTERRUPTED, LEAVES, MISTAKE

STOPS = 77  # exit code of `restart`: do not start again
DAY_SECONDS, LONGEST_WAIT_SECONDS = 24 * 3600.0, 15 * 60.0
FRUITLESS = 3  # time slots in a row without a new checkpoint
# What ended a start, as slurm/job.sh saw it.
LIMIT, REQUEUED, NODE_DOWN, LOST, THEMSELVES = "limit", "requeued", "node down", "lost", "ranks"
_CANCELLED = (INTERRUPTED, 128 + 15, 15)  # Ctrl-C; scancel as srun reports it


@dataclass(frozen=True)
class Attempt:
    """One start of a run and its end.

    began, ended: seconds since 1970 (0: unknown, not yet). started_at: the step that it went on from (0: a new run). reached: step
    of the newest complete checkpoint at its end (-1: none). code: None while it runs, and if the host died with it. decision:
    `restart`, `stop`, or "" while none was made. restarts: how often Slurm had requeued its job (-1: unknown, no Slurm). why: what
    ended it: LIMIT, REQUEUED (Slurm or a person), NODE_DOWN (Slurm, too), LOST (no word of its end), THEMSELVES (its ranks), or
    "" if nobody said. left: when its ranks wrote that they leave to be requeued (seconds since 1970, 0: they did not).
    """

    number: int
    launch: str
    job: str = ""
    world: int = 0
    began: float = 0.0
    started_at: int = -1
    ended: float = 0.0
    code: Optional[int] = None
    reached: int = -1
    fault: Optional[dict[str, Any]] = None
    decision: str = ""
    restarts: int = -1
    why: str = ""
    left: float = 0.0

    @property
    def progress(self) -> bool:
        """Whether it left a newer checkpoint than it found."""
        return self.reached > self.started_at

    @property
    def faulty(self) -> bool:
        return self.code is not None and self.code not in (0, MISTAKE, LEAVES, *_CANCELLED)

    @property
    def fruitless(self) -> bool:
        """Whether the machine took it away, perhaps because of what it did there, before it had left a newer checkpoint."""
        return not self.progress and (self.code is None or (self.code == LEAVES and self.why == NODE_DOWN))

    @property
    def over(self) -> float:
        """When it ended, or the latest time known of it."""
        return self.ended or self.began


@dataclass(frozen=True)
class Decision:
    restart: bool
    wait_seconds: float
    reason: str


def decide(history: Sequence[Attempt], health: HealthConfig) -> Decision:
    """What becomes of a run whose attempts were these, the last one just over. Pure.

    Attempts up to one that was followed by `stop` do not count: a person has looked at the run since. Not so where the same job
    was requeued behind the `stop`: nobody has.
    """
    last = history[-1]
    since = [
        i for i, (one, then) in enumerate(pairwise(history)) if one.decision == "stop" and not _requeued(one, then)
    ]
    attempts = _with_what_they_left(history[since[-1] + 1 :] if since else history)
    if last.code == 0:
        return Decision(False, 0.0, "the run is done")
    if last.code == MISTAKE:
        return Decision(False, 0.0, "a mistake in the config or the data: another start would meet it again")
    if last.code in _CANCELLED and last.fault is None:
        return Decision(False, 0.0, f"cancelled by its user (exit code {last.code})")
    if last.code == LEAVES and not last.fruitless:
        return _behind_a_slot(attempts)
    counted = [attempt for attempt in attempts if attempt.faulty or attempt.fruitless]
    # A fault that comes back weeks of progress later is not the run's own.
    same = [a for a in counted[:-1] if a is not last and _same(a.fault, last.fault) and a.reached >= last.reached]
    said = _brief(last)
    if same:
        return Decision(
            False,
            0.0,
            f"the same fault at {step_words((last.fault or {}).get('step'))} as in attempt {same[-1].number}: {said}",
        )
    lately = [attempt for attempt in counted if last.over - attempt.over <= DAY_SECONDS]
    if len(lately) > health.max_restarts:
        lost = sum(attempt.fruitless for attempt in lately)
        of_them = f", {lost} of them starts that a host took away before a new checkpoint" if lost else ""
        return Decision(
            False,
            0.0,
            f"{len(lately)} faults within 24 hours{of_them} (health.max_restarts {health.max_restarts}): {said}",
        )
    wait = _pause(attempts, health.restart_backoff_seconds)
    return Decision(True, wait, f"{said}; goes on from {step_words(last.reached)}")


def _behind_a_slot(attempts: Sequence[Attempt]) -> Decision:
    """The last attempt left to be requeued. What Slurm takes away for a higher job, or a node, says nothing of the time limit."""
    last = attempts[-1]
    slots = [a for a in attempts if a.code != LEAVES or a.why in (LIMIT, "")][-FRUITLESS:]
    short = len(slots) == FRUITLESS and slots[-1] is last and all(a.code == LEAVES for a in slots)
    if short and last.reached <= slots[0].started_at:
        return Decision(
            False,
            0.0,
            f"{FRUITLESS} time slots in a row ended without a new checkpoint (the newest is of {step_words(last.reached)}): "
            "the time limit is too short for start and first checkpoint; lengthen it, or lower train.checkpoint_every",
        )
    what = {REQUEUED: "requeued by Slurm", NODE_DOWN: "requeued by Slurm, a node is down"}.get(last.why, "left")
    return Decision(True, 0.0, f"{what} with a checkpoint of {step_words(last.reached)}")


def _requeued(one: Attempt, then: Attempt) -> bool:
    """Whether Slurm started the same job again, without anybody who submitted it."""
    return bool(one.job) and one.job == then.job and -1 < one.restarts < then.restarts


def _with_what_they_left(history: Sequence[Attempt]) -> list[Attempt]:
    """The same attempts; one without an end, but the last, reached at least what the next one went on from."""
    attempts = list(history)
    for i, then in enumerate(attempts[1:]):
        if attempts[i].code is None and not attempts[i].ended:
            attempts[i] = replace(attempts[i], reached=max(attempts[i].reached, then.started_at))
    return attempts


def _pause(attempts: Sequence[Attempt], base: float) -> float:
    """Seconds before the next start: 0 after the first fault without progress, then base, twice base, ... up to 15 minutes."""
    fruitless = 0
    for attempt in reversed(attempts):
        if not (attempt.faulty or attempt.fruitless):
            break
        fruitless += 1
        if attempt.progress:
            break
    return 0.0 if fruitless <= 1 else min(base * 2.0 ** min(fruitless - 2, 30), LONGEST_WAIT_SECONDS)


def _same(one: Optional[Mapping[str, Any]], other: Optional[Mapping[str, Any]]) -> bool:
    """Whether two faults are the same but for the rank, the host and numbers in the text."""
    if one is None or other is None:
        return False
    return _key(one) == _key(other)


def _key(fault: Mapping[str, Any]) -> tuple[Any, Any, str]:
    cause = str(fault.get("cause", "")).replace(str(fault.get("host") or "\0"), "#")
    cause = re.sub(r"\b0x[0-9a-f]+\b|\d+", "#", cause)
    return fault.get("kind"), fault.get("step"), cause


def _brief(attempt: Attempt) -> str:
    fault = attempt.fault
    if not fault and attempt.code is None:
        return "ended without a word: the node of its batch script went down, or it was killed there"
    if not fault and attempt.why == NODE_DOWN:
        return "a node went down"
    if not fault:
        return f"ended with exit code {attempt.code}, and no watch left a word"
    who = f"rank {fault['rank']} on {fault['host']} " if fault.get("rank") is not None else ""
    where = f" in phase {fault.get('phase')}" + (
        f" of {step_words(fault['step'])}" if fault.get("step") is not None else ""
    )
    return f"{who}{fault.get('kind')}{where}: {fault.get('cause')}"


def step_words(step: Optional[int]) -> str:
    return "the start" if step is None or step < 0 else f"step {step}"
