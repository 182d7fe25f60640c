"""Whether a run is started again: every start and every end in RUN/health/attempts.jsonl, and the rules that read them.

A run that lost its time slot goes on. A fault of the machine goes on too, with growing pauses; a fault that comes again at the
same step is the run's own and no number of restarts mends it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Optional

from parallel.checkpoint_names import latest, step_of
from pretrain.config import HealthConfig
from pretrain.launch import job_id, launch_name
from pretrain.watch_faults import INTERRUPTED, LEAVES, MISTAKE, fault_from, fault_path

STOPS = 77  # exit code of `restart`: do not start again
DAY_SECONDS, HOUR_SECONDS, LONGEST_WAIT_SECONDS = 24 * 3600.0, 3600.0, 15 * 60.0
FRUITLESS = 3  # time slots in a row without a new checkpoint
ATTEMPTS = "attempts.jsonl"
_CANCELLED = (INTERRUPTED, 128 + 15, 15)  # Ctrl-C; scancel as srun reports it


@dataclass(frozen=True)
class Attempt:
    """One start of a run and its end.

    began, ended: seconds since 1970 (0: unknown, not yet). started_at: the step that it went on from (0: a new run). reached: step
    of the newest complete checkpoint at its end (-1: none). code: None while it runs, and if the host died with it. decision:
    `restart`, `stop`, or "" while none was made.
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

    @property
    def progress(self) -> bool:
        """Whether it left a newer checkpoint than it found."""
        return self.reached > self.started_at

    @property
    def faulty(self) -> bool:
        return self.code is not None and self.code not in (0, MISTAKE, LEAVES, *_CANCELLED)


@dataclass(frozen=True)
class Decision:
    restart: bool
    wait_seconds: float
    reason: str


def decide(history: Sequence[Attempt], health: HealthConfig) -> Decision:
    """What becomes of a run whose attempts were these, the last one just over. Pure.

    Attempts up to one that was followed by `stop` do not count: a person has looked at the run since.
    """
    last = history[-1]
    since = [i for i, attempt in enumerate(history[:-1]) if attempt.decision == "stop"]
    attempts = list(history[since[-1] + 1 :] if since else history)
    if last.code == 0:
        return Decision(False, 0.0, "the run is done")
    if last.code == MISTAKE:
        return Decision(False, 0.0, "a mistake in the config or the data: another start would meet it again")
    if last.code in _CANCELLED and last.fault is None:
        return Decision(False, 0.0, f"cancelled by its user (exit code {last.code})")
    if last.code == LEAVES:
        slots = attempts[-FRUITLESS:]
        if (
            len(slots) == FRUITLESS
            and all(a.code == LEAVES for a in slots)
            and slots[-1].reached <= slots[0].started_at
        ):
            return Decision(
                False,
                0.0,
                f"{FRUITLESS} time slots in a row ended without a new checkpoint (the newest is of {_step(last.reached)}): "
                "the time limit is too short for start and first checkpoint; lengthen it, or lower train.checkpoint_every",
            )
        return Decision(True, 0.0, f"left with a checkpoint of {_step(last.reached)}")
    faults = [attempt for attempt in attempts if attempt.faulty]
    same = [attempt for attempt in faults[:-1] if _same(attempt.fault, last.fault)]
    said = _brief(last)
    if same:
        return Decision(
            False,
            0.0,
            f"the same fault at {_step((last.fault or {}).get('step'))} as in attempt {same[-1].number}: {said}",
        )
    lately = [attempt for attempt in faults if last.ended - attempt.ended <= DAY_SECONDS]
    if len(lately) > health.max_restarts:
        return Decision(
            False, 0.0, f"{len(lately)} faults within 24 hours (health.max_restarts {health.max_restarts}): {said}"
        )
    wait = _pause(attempts, health.restart_backoff_seconds)
    return Decision(True, wait, f"{said}; goes on from {_step(last.reached)}")


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
    run: Path, code: int, health: HealthConfig, environ: Optional[Mapping[str, str]] = None
) -> tuple[list[Attempt], Decision]:
    """Notes that the newest start is over with `code` and what becomes of the run; the whole history and the decision."""
    environ = os.environ if environ is None else environ
    history = read_attempts(run)
    reached = newest_step(run)
    if history and history[-1].code is None and _of_this_start(history[-1], environ):
        open_attempt, history = history[-1], history[:-1]
    else:  # it ended before it could say that it began
        started_at = history[-1].reached if history else -1
        open_attempt = Attempt(len(history) + 1, "", job_id(environ), started_at=started_at)
    fault = None if code in (0, LEAVES) else _fault_of(run, open_attempt, environ, history)
    if fault and fault.get("kind") == "mistake":
        code = MISTAKE
    launch = open_attempt.launch or (fault or {}).get("launch", "")
    now = round(time.time(), 3)
    attempt = replace(open_attempt, launch=launch, ended=now, code=code, reached=reached, fault=fault)
    decision = decide([*history, attempt], health)
    attempt = replace(attempt, decision="restart" if decision.restart else "stop")
    end = {
        "ended": attempt.number,
        "time": now,
        "launch": launch,
        "job": attempt.job,
        "code": code,
        "step": reached,
        "fault": fault,
        "decision": attempt.decision,
        "reason": decision.reason,
        "wait_seconds": decision.wait_seconds,
    }
    _append(run, end)
    return [*history, attempt], decision


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
                attempts.append(Attempt(len(attempts) + 1, *start))
                continue
            end = {
                "ended": values["time"],
                "code": values["code"],
                "reached": values["step"],
                "fault": values["fault"],
                "decision": values["decision"],
            }
            if attempts and attempts[-1].code is None and attempts[-1].launch == values["launch"]:
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


def _fault_of(
    run: Path, attempt: Attempt, environ: Mapping[str, str], earlier: Sequence[Attempt]
) -> Optional[dict[str, Any]]:
    """The fault that ended an attempt, None if no watch named one."""
    health = run / "health"
    if attempt.launch:
        paths = [fault_path(run, attempt.launch)]
    elif attempt.job:
        # It never got so far as to say its launch's name; the batch script knows all of it but the step's number.
        end = f"-{environ.get('SLURM_RESTART_COUNT', '0')}.json"
        paths = sorted(health.glob(f"fault-{attempt.job}-*{end}"), reverse=True)
    else:
        paths = []
    known = [a.fault["time"] for a in earlier if a.fault]  # a launch name may come again
    for path in paths:
        try:
            fault = fault_from(path.read_bytes())
        except OSError:
            continue
        if fault and fault.time not in known and fault.time >= attempt.began - HOUR_SECONDS:
            return asdict(fault)
    return None


def _pause(attempts: Sequence[Attempt], base: float) -> float:
    """Seconds before the next start: 0 after the first fault without progress, then base, twice base, ... up to 15 minutes."""
    fruitless = 0
    for attempt in reversed(attempts):
        if not attempt.faulty:
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
    if not fault:
        return f"ended with exit code {attempt.code}, and no watch left a word"
    who = f"rank {fault['rank']} on {fault['host']} " if fault.get("rank") is not None else ""
    where = f" in phase {fault.get('phase')}" + (f" of {_step(fault['step'])}" if fault.get("step") is not None else "")
    return f"{who}{fault.get('kind')}{where}: {fault.get('cause')}"


def _step(step: Optional[int]) -> str:
    return "the start" if step is None or step < 0 else f"step {step}"


def _append(run: Path, values: Mapping[str, Any]) -> None:
    """One line, on disk when this returns; behind a line that was cut short it begins a new one."""
    path = run / "health" / ATTEMPTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        cut = file.seek(0, 2) and (file.seek(-1, 2) >= 0 and file.read(1) != b"\n")
        file.write((b"\n" if cut else b"") + json.dumps(values).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
