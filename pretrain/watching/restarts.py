"""Every start of a run and every end, in RUN/health/attempts.jsonl: noted, read back, and judged by the rules (restart_rules)."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Optional

from parallel.checkpoint_names import latest, step_of
from pretrain.config import HealthConfig
from pretrain.launch import job_id, launch_name
from pretrain.watching.faults import LEAVES, MISTAKE, fault_from, fault_path
from pretrain.watching.restart_rules import LOST, Attempt, Decision, decide, step_words

ENDED_BY = "PALIMPSEST_ENDED_BY"  # set by slurm/job.sh: what ended a start, as it saw it
ATTEMPTS = "attempts.jsonl"
HOUR_SECONDS = 3600.0
_TORCHRUN = 1  # what torchrun ends with, whatever its ranks ended with


def record_attempt(run: Path, *, world: int, step: int, environ: Optional[Mapping[str, str]] = None) -> int:
    """Notes a start; called by rank 0 of `train` when it knows the step that it goes on from (0: a new run). The number of this
    attempt, from 1. OSError if it cannot be written.
    """
    environ = os.environ if environ is None else environ
    number = len(read_attempts(run)) + 1
    start = {
        "attempt": number,
        "time": round(time.time(), 3),
        "launch": launch_name(environ),
        "job": job_id(environ),
        "world": world,
        "step": step,
    }
    _append(run, start)
    return number


def record_end(
    run: Path,
    code: int,
    health: HealthConfig,
    environ: Optional[Mapping[str, str]] = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> tuple[list[Attempt], Decision]:
    """Notes that the newest start is over with `code` and what becomes of the run; the whole history and the decision.

    A history that cannot be written is said, and costs no run: then 75 goes on, and a fault is judged by what could be read.
    """
    environ = os.environ if environ is None else environ
    attempt, earlier = _ended(run, code, environ)
    history = [*earlier, attempt]
    decision = decide(history, health)
    try:
        _append(run, _end_line(attempt, decision))
    except OSError as error:
        say(f"restart: {run / 'health' / ATTEMPTS} cannot be written ({error.strerror}): this end counts only now")
        if attempt.code == LEAVES:
            decision = Decision(True, 0.0, f"left with a checkpoint of {step_words(attempt.reached)}")
        elif decision.restart:  # nothing makes the pauses grow
            decision = replace(decision, wait_seconds=max(decision.wait_seconds, health.restart_backoff_seconds))
    history[-1] = replace(attempt, decision="restart" if decision.restart else "stop")
    return history, decision


def record_lost(
    run: Path, health: HealthConfig, environ: Optional[Mapping[str, str]] = None
) -> Optional[tuple[list[Attempt], Decision]]:
    """At a start of a requeued job: if nobody noted how its last start ended, since the node that was to note it went down with it,
    that is noted now, and what becomes of the run. None if there is nothing to note. OSError if it cannot be written.
    """
    environ = os.environ if environ is None else environ
    job, count = job_id(environ), int(environ.get("SLURM_RESTART_COUNT", "0"))
    history = read_attempts(run)
    if not job or not count:
        return None
    of_job = [attempt for attempt in history if attempt.job == job]
    if of_job and of_job[-1].ended and of_job[-1].restarts in (-1, count - 1):
        return None
    earlier = dict(environ) | {"SLURM_RESTART_COUNT": str(count - 1), ENDED_BY: LOST}
    attempt, before = _ended(run, None, earlier)
    decision = decide([*before, attempt], health)
    _append(run, _end_line(attempt, decision))
    return [*before, replace(attempt, decision="restart" if decision.restart else "stop")], decision


def _ended(run: Path, code: Optional[int], environ: Mapping[str, str]) -> tuple[Attempt, list[Attempt]]:
    """The start that is over with `code`, not yet decided upon, and the attempts before it."""
    history = read_attempts(run)
    job = job_id(environ)
    if history and not history[-1].ended and _of_this_start(history[-1], environ):
        attempt, history = history[-1], history[:-1]
    else:  # it ended before it could say that it began
        attempt = Attempt(len(history) + 1, "", job, started_at=history[-1].reached if history else -1)
    fault = None if code in (0, LEAVES) else _fault_of(run, attempt, environ, history)
    left = 0.0
    if fault and fault.get("kind") == "mistake":
        code = MISTAKE
    elif fault is None and code == _TORCHRUN and (left := _left_at(run, attempt, history)):
        code = LEAVES
    return replace(
        attempt,
        launch=attempt.launch or (fault or {}).get("launch", ""),
        ended=round(time.time(), 3),
        code=code,
        reached=newest_step(run),
        fault=fault,
        restarts=int(environ.get("SLURM_RESTART_COUNT", "0")) if job else -1,
        why=environ.get(ENDED_BY, ""),
        left=left,
    ), history


def _end_line(attempt: Attempt, decision: Decision) -> dict[str, Any]:
    return {
        "ended": attempt.number,
        "time": attempt.ended,
        "launch": attempt.launch,
        "job": attempt.job,
        "restarts": attempt.restarts,
        "code": attempt.code,
        "why": attempt.why,
        "left": attempt.left,
        "step": attempt.reached,
        "fault": attempt.fault,
        "decision": "restart" if decision.restart else "stop",
        "reason": decision.reason,
        "wait_seconds": decision.wait_seconds,
    }


def read_attempts(run: Path) -> list[Attempt]:
    """Every attempt so far, oldest first. A line that a full disk or a kill cut short is left out."""
    try:
        lines = (run / "health" / ATTEMPTS).read_text(errors="replace").splitlines()
    except OSError:
        return []
    attempts: list[Attempt] = []
    for line in lines:
        try:
            values = json.loads(line)
            if "attempt" in values:
                start = [values[key] for key in ("launch", "job", "world", "time", "step")]
                started = Attempt(len(attempts) + 1, *start)
                attempts.append(replace(started, restarts=_restarts_in(started.launch, started.job)))
                continue
            end = {
                "ended": values["time"],
                "code": values["code"],
                "reached": values["step"],
                "fault": values["fault"],
                "decision": values["decision"],
                "restarts": values.get("restarts", -1),
                "why": values.get("why", ""),
                "left": values.get("left", 0.0),
            }
            if attempts and not attempts[-1].ended and attempts[-1].launch == values["launch"]:
                attempts[-1] = replace(attempts[-1], **end)
            else:
                reached = attempts[-1].reached if attempts else -1
                attempts.append(
                    replace(Attempt(len(attempts) + 1, values["launch"], values["job"], started_at=reached), **end)
                )
        except (ValueError, KeyError, TypeError):
            continue
    return attempts


def newest_step(run: Path) -> int:
    """The step of the newest complete checkpoint, -1 if there is none."""
    newest = latest(run / "checkpoints")
    return step_of(newest) if newest else -1


def _of_this_start(attempt: Attempt, environ: Mapping[str, str]) -> bool:
    """Whether an attempt without an end is the one that has just ended: a host may have died with an earlier one."""
    job = job_id(environ)
    if not job:
        return True
    return bool(re.fullmatch(rf"{re.escape(job)}-\d+-{environ.get('SLURM_RESTART_COUNT', '0')}", attempt.launch))


def _restarts_in(launch: str, job: str) -> int:
    """How often a job had been requeued, from the name of a start under srun; -1 for other names."""
    found = re.fullmatch(rf"{re.escape(job)}-\d+-(\d+)", launch) if job else None
    return int(found[1]) if found else -1


def _fault_of(
    run: Path, attempt: Attempt, environ: Mapping[str, str], earlier: Sequence[Attempt]
) -> Optional[dict[str, Any]]:
    """The fault that ended an attempt, None if no watch named one."""
    if attempt.launch:
        paths = [fault_path(run, attempt.launch)]
    elif attempt.job:
        # It never got so far as to say its launch's name; the batch script knows all of it but the step's number.
        end = f"-{environ.get('SLURM_RESTART_COUNT', '0')}.json"
        paths = sorted((run / "health").glob(f"fault-{attempt.job}-*{end}"), reverse=True)
    else:
        paths = list((run / "health").glob("fault-*.json"))
    known = [a.fault["time"] for a in earlier if a.fault]  # a launch name may come again
    faults = []
    for path in paths:
        try:
            fault = fault_from(path.read_bytes())
        except OSError:
            continue
        if fault and fault.time not in known and fault.time >= _not_before(attempt):
            faults.append(fault)
    if not faults:
        return None
    return asdict(faults[0] if attempt.launch or attempt.job else max(faults, key=lambda fault: fault.time))


def _left_at(run: Path, attempt: Attempt, earlier: Sequence[Attempt]) -> float:
    """When a rank of this attempt wrote that it leaves to be requeued; 0 if none did."""
    known = [a.left for a in earlier]
    pattern = f"leaving-{attempt.launch}.json" if attempt.launch else "leaving-*.json"
    times = [0.0]
    for path in (run / "health").glob(pattern):
        try:
            at = float(json.loads(path.read_bytes())["time"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if at not in known and at >= _not_before(attempt):
            times.append(at)
    return max(times)


def _not_before(attempt: Attempt) -> float:
    """What is older is of an earlier start: hosts' clocks may differ by an hour. An attempt that never began has ended just now."""
    return (attempt.began or time.time()) - HOUR_SECONDS


def _append(run: Path, values: Mapping[str, Any]) -> None:
    """One line, on disk when this returns; behind a line that was cut short it begins a new one."""
    path = run / "health" / ATTEMPTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        cut = file.seek(0, 2) and (file.seek(-1, 2) >= 0 and file.read(1) != b"\n")
        file.write((b"\n" if cut else b"") + json.dumps(values).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
