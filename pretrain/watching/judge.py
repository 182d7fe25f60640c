"""Which rank holds up the others: a pure function of what all ranks say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

from pretrain.watching.faults import Fault, Kind
from pretrain.watching.heartbeat import PHASES, Record

STOPPED = "its process was stopped from outside (SIGSTOP, a debugger)"
OTHER_PHASES = 6.0  # a start compiles, a save writes a hundred gigabytes: so much more patience than in a step


@dataclass(frozen=True)
class Limits:
    """Seconds of patience.

    stall: without progress in phase `step`. beat: between what a rank publishes.
    """

    stall: float
    beat: float

    def of(self, phase: str) -> float:
        """Without progress in `phase`."""
        return self.stall if phase == "step" else OTHER_PHASES * self.stall

    @property
    def silence(self) -> float:
        """Without a change of what a rank publishes, after which its publishing thread does not run any more."""
        return max(3 * self.beat, self.stall / 2)


@dataclass(frozen=True)
class Age:
    """Of one rank's record, by the clock of the reader (hosts' clocks differ).

    unchanged: seconds since anything in it changed. idle: seconds since the rank's last beat. process: what the rank's own watch
    says of the process: `stopped`, `blocked` (uninterruptible), `ended CODE`, or anything else for one that runs.
    """

    unchanged: float
    idle: float
    process: str = ""


def culprit(records: Mapping[int, Optional[Record]], ages: Mapping[int, Age], limits: Limits) -> Optional[Fault]:
    """The rank that the others wait for, or None while nobody waits too long.

    records: of every rank of the world; None for one that has not said anything yet. ages: of the same ranks.

    A fault needs two things: a rank that is heard of and makes no progress for longer than its phase may take, and a culprit that
    has used up its own phase's time as well (a rank that still saves is not to blame for those that wait for it). Who is it, in
    this order: a rank whose process is stopped; one that is not heard of any more; the one that is behind; nobody.
    """
    heard, silent = _heard(records, ages, limits)
    stalled = {rank for rank in heard if ages[rank].idle >= limits.of(_phase(records[rank]))}
    if not stalled:
        return None
    idle = max(ages[rank].idle for rank in stalled)
    for rank in sorted(records):
        if ages[rank].process == "stopped":
            return _fault("stopped", rank, records, STOPPED)
    lost = [rank for rank in silent if records[rank] is not None or ages[rank].unchanged >= limits.of("start")]
    if lost:
        longest = max(lost, key=lambda rank: (ages[rank].unchanged, -rank))
        return _fault("silent host", longest, records, _silence(records[longest], ages[longest], idle))
    if silent:
        return None  # it may still be starting
    behind, reason = _behind({rank: r for rank in heard if (r := records[rank]) is not None})
    late = [rank for rank in behind if rank in stalled]
    if not late:
        return None
    if len(behind) == len(heard) > 1:
        first = min(late)
        return Fault(
            "stalled",
            phase=_phase(records[first]),
            step=_step(records[first]),
            doing=_doing(records[first]),
            cause=f"all ranks wait in the same place for {_seconds(idle)}: no rank is behind the others (the network, or a "
            "collective that not all of them take part in); the stacks show where",
        )
    worst = max(late, key=lambda rank: (ages[rank].idle, -rank))
    cause = f"no progress for {_seconds(ages[worst].idle)}" + (f", {reason[worst]}" if reason.get(worst) else "")
    if ages[worst].process == "blocked":
        cause += "; its process is blocked in the kernel (state D): storage or a driver does not answer"
    if len(behind) > 1:
        cause += f"; as far behind: {len(behind) - 1} more"
    return _fault("stalled", worst, records, cause)


def _heard(
    records: Mapping[int, Optional[Record]], ages: Mapping[int, Age], limits: Limits
) -> tuple[list[int], list[int]]:
    """(ranks that still publish, ranks that do not though they should), each in order; a rank that has ended is neither."""
    running = [rank for rank in sorted(records) if not ages[rank].process.startswith("ended")]
    said = {rank: record for rank in running if (record := records[rank]) is not None}
    silent = [rank for rank, r in said.items() if r.phase != "end" and ages[rank].unchanged >= limits.silence]
    if len(silent) == len(said):
        # Nobody is heard of, the reader's own rank included: that is the folder's fault, and says nothing about a rank.
        silent = []
    heard = [rank for rank in said if rank not in silent]
    return heard, sorted(silent + [rank for rank in running if rank not in said])


def _behind(records: Mapping[int, Record]) -> tuple[list[int], dict[int, str]]:
    """(The ranks that are furthest behind, what each is behind in): by step and phase, then by the collectives they have begun.

    In a group, a rank that has begun fewer collectives holds up those that have begun more. Who holds up others and is held up by
    nobody is behind: its neighbours may be late only because of it.
    """
    if not records:
        return [], {}
    place = {rank: (-1 if r.step is None else r.step, PHASES.index(r.phase)) for rank, r in records.items()}
    least = min(place.values())
    back = [rank for rank in records if place[rank] == least]
    if len(back) < len(records):
        ahead = next(r for rank, r in records.items() if place[rank] == max(place.values()))
        where = f"phase {ahead.phase}" + (f" of step {ahead.step}" if ahead.step is not None else "")
        reason = dict.fromkeys(back, f"while others are in {where}")
    else:
        reason = {}
    holds_up: dict[int, str] = {}
    held_up: set[int] = set()
    for group in sorted({name for rank in back for name in records[rank].collectives}):
        counts = {rank: records[rank].collectives[group] for rank in back if group in records[rank].collectives}
        most = max(counts.values())
        for rank, count in counts.items():
            if count < most:
                holds_up.setdefault(rank, f"{count} collectives begun in group {group}, the others {most}")
        held_up |= {rank for rank, count in counts.items() if count > min(counts.values())}
    roots = [rank for rank in back if rank in holds_up and rank not in held_up]
    if roots:
        return roots, {rank: "; ".join(filter(None, (reason.get(rank), holds_up[rank]))) for rank in roots}
    return back, reason


def _silence(record: Optional[Record], age: Age, idle: float) -> str:
    if record is None:
        return f"it has not said anything since this start, {_seconds(age.unchanged)} ago; the others wait for {_seconds(idle)}"
    if age.process == "blocked":
        return f"not heard of for {_seconds(age.unchanged)}, its process is blocked in the kernel (state D)"
    return (
        f"not heard of for {_seconds(age.unchanged)} while the others wait: the host, its network, or the whole process "
        "(a thread that holds Python's lock) hangs"
    )


def _fault(kind: Kind, rank: int, records: Mapping[int, Optional[Record]], cause: str) -> Fault:
    record = records[rank]
    return Fault(
        kind,
        rank,
        record.host if record else "",
        _phase(record),
        _step(record),
        _doing(record),
        cause,
    )


def _phase(record: Optional[Record]) -> str:
    return record.phase if record else "start"


def _step(record: Optional[Record]) -> Optional[int]:
    return record.step if record else None


def _doing(record: Optional[Record]) -> str:
    return record.doing if record else ""


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s"
