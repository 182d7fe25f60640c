"""Whether a run runs, and how that is known: pure functions of what its folder and Slurm say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from pretrain.quantities import duration
from pretrain.status.records import Heard, Job, Records
from pretrain.status.spool import number
from pretrain.watching.faults import Fault
from pretrain.watching.judge import Age, Limits, culprit

RUNNING, WAITING, STALLED, STOPPED = "running", "waiting in the queue", "stalled", "stopped"
FINISHED, NEVER_STARTED, FAULT = "finished", "never started", "ended with a fault"
SILENT_BEATS, SILENT_SECONDS = 3, 30.0  # a rank is silent after so many missed records, and no earlier than so long
CLOCKS_SECONDS = 120.0  # how far the clocks of two hosts may be apart


@dataclass(frozen=True)
class State:
    """kind: one of the words above. why: how that is known. launch: the newest start, "" if there was none."""

    kind: str
    why: str
    launch: str = ""


def last_step(found: Records) -> int:
    """The step at which the run ends by its config."""
    steps, stop_at = found.get("train", "steps", 1000), found.get("train", "stop_at", 0)
    return min(stop_at or steps, steps)


def silent_after(found: Records) -> float:
    """Seconds after which a rank's record is too old for a live one."""
    return max(SILENT_BEATS * found.get("health", "beat_seconds", 10.0), SILENT_SECONDS)


def newest_launch(found: Records) -> str:
    """The newest start: by the list of attempts, or by the youngest record."""
    if found.starts:
        return str(found.starts[-1].get("launch", ""))
    youngest = min(found.ranks, key=lambda heard: heard.age, default=None)
    return youngest.record.launch if youngest else ""


def begun_at(found: Records) -> float:
    """When the newest start was (seconds since the epoch), 0 if that is not recorded."""
    return found.starts[-1]["time"] if found.starts else 0.0


def ranks_of(found: Records, launch: str) -> list[Heard]:
    """What the ranks of one start say; launch names may come again, so a record must also be younger than the start."""
    youngest = found.now - begun_at(found) + CLOCKS_SECONDS
    return [heard for heard in found.ranks if heard.record.launch == launch and heard.age <= youngest]


def newest_job(found: Records) -> str:
    return str(found.starts[-1].get("job") or "") if found.starts else ""


def newest_end(found: Records, launch: str) -> Optional[dict[str, Any]]:
    """How the newest start ended, None if that is not recorded."""
    ends = (end for end in reversed(found.ends) if end.get("launch") == launch and end["time"] >= begun_at(found))
    return next(ends, None)


def newest_fault(found: Records, launch: str) -> Optional[Fault]:
    """The fault that the watches have found in the newest start."""
    fault = found.faults.get(launch)
    return fault if fault and fault.time >= begun_at(found) - CLOCKS_SECONDS else None


def stall(found: Records, ranks: list[Heard]) -> Optional[Fault]:
    """Who holds up the others for too long, as the watch of the run would judge it; None while nobody does."""
    if not ranks:
        return None
    limits = Limits(found.get("health", "stall_seconds", 300.0), found.get("health", "beat_seconds", 10.0))
    world = max(heard.record.world for heard in ranks)
    since = found.now - begun_at(found) if found.starts else max(heard.age for heard in ranks)
    said = {heard.record.rank: heard for heard in ranks}
    records = {rank: said[rank].record if rank in said else None for rank in range(world)}
    ages = {rank: Age(said[rank].age, said[rank].idle) if rank in said else Age(since, since) for rank in records}
    return culprit(records, ages, limits)


def state_of(found: Records, jobs: Optional[Mapping[str, Job]]) -> State:
    """jobs: what Slurm says of the run's jobs, None if it says nothing."""
    launch = newest_launch(found)
    job = (jobs or {}).get(newest_job(found)) or next(iter((jobs or {}).values()), None)
    if job and job.state == "PENDING":
        begins = f", expected to start {job.start}" if job.start not in ("N/A", "") else ""
        return State(WAITING, f"Slurm: job {job.job} is pending ({job.reason}){begins}", launch)
    ranks = ranks_of(found, launch)
    fault, end = newest_fault(found, launch), newest_end(found, launch)
    done = found.checkpoint is not None and found.checkpoint.step >= last_step(found)
    if end is not None:
        return _ended(found, end, fault, done, launch)
    if fault is not None:
        return State(FAULT, fault.sentence(), launch)
    fresh = [heard for heard in ranks if heard.age <= silent_after(found)]
    if any(heard.record.phase != "end" for heard in fresh):
        return _alive(found, ranks, fresh, launch)
    if done:
        return State(FINISHED, f"the checkpoint of step {last_step(found)} is complete", launch)
    if found.holder is not None:
        return State(
            RUNNING, f"process {found.holder} of this host holds the run folder; its ranks say nothing", launch
        )
    heard = min((one.age for one in ranks), default=None)
    if job and job.state in ("RUNNING", "COMPLETING", "CONFIGURING"):
        said = f"Slurm: job {job.job} is {job.state.lower()} on {job.nodes}"
        if heard is None:
            return State(RUNNING, f"{said}; no rank has said anything yet", launch)
        return State(STALLED, f"{said}, but no rank was heard of for {duration(heard)}", launch)
    if not launch and found.checkpoint is None and not (found.spool and found.spool.size):
        return State(NEVER_STARTED, "no start is recorded, no step, no checkpoint", launch)
    return _unrecorded(found, heard, launch)


def _alive(found: Records, ranks: list[Heard], fresh: list[Heard], launch: str) -> State:
    if fault := stall(found, ranks):
        return State(STALLED, fault.sentence(), launch)
    world = max(heard.record.world for heard in ranks)
    within = duration(max(heard.age for heard in fresh))
    phases = ", ".join(sorted({heard.record.phase for heard in fresh}))
    return State(RUNNING, f"phase {phases}; {len(fresh)} of {world} ranks heard of within {within}", launch)


def _ended(found: Records, end: Mapping[str, Any], fault: Optional[Fault], done: bool, launch: str) -> State:
    code, ago = end.get("code"), duration(max(found.now - end["time"], 0.0))
    then = f"; then: {end['decision']}" if end.get("decision") else ""
    if done and code in (0, 75):
        return State(FINISHED, f"ended {ago} ago; the checkpoint of step {last_step(found)} is complete", launch)
    if code in (0, 75):
        asked = "asked to leave" if code == 75 else "done, short of train.steps"
        return State(STOPPED, f"ended {ago} ago: {asked} (exit code {code}){then}", launch)
    said = fault.sentence() if fault else "ended without a word" if code is None else f"exit code {code}"
    return State(FAULT, f"{said}; ended {ago} ago{then}", launch)


def _unrecorded(found: Records, heard: Optional[float], launch: str) -> State:
    """Nothing runs and no end is recorded: by what training itself said last, if it said anything in this start."""
    said: dict[str, Any] = next((event for event in reversed(found.events) if event["what"] == "state"), {})
    at = number(said.get("time")) or 0.0
    if at >= begun_at(found) and said.get("state") in ("failed", "preempted"):
        ago, step = duration(max(found.now - at, 0.0)), said.get("step")
        if said["state"] == "failed":
            return State(FAULT, f"training failed at step {step}, {ago} ago: see `logs`", launch)
        return State(STOPPED, f"asked to leave at step {step}, {ago} ago", launch)
    last = f"; the last sign of a rank is {duration(heard)} old" if heard is not None else ""
    return State(STOPPED, f"nothing runs, and no end was recorded (killed, or its host is gone){last}", launch)
