"""Everything `status` says of one run, as plain values; what cannot be known is None and named under `missing`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Optional

from parallel.shape import ModelShape, parameter_table
from pretrain.quantities import duration, size
from pretrain.status import state as states
from pretrain.status.progress import assumption, loss_trend, pace, speed, training_lines
from pretrain.status.records import Job, Records
from pretrain.status.spool import Line, number

STORED_BYTES = 12  # of a parameter in a checkpoint: its float32 value and both moments
SHIPPED_LATE_SECONDS = 300.0  # a tracker that lacks older points than this is behind
Report = dict[str, Any]


def describe(found: Records, jobs: Optional[Mapping[str, Job]]) -> Report:
    """jobs: what Slurm says of the run's jobs, None if it says nothing."""
    assert found.spool is not None
    tail = found.spool.tail()
    lines = training_lines(tail)
    state = states.state_of(found, jobs)
    last = lines[-1] if lines else None
    stored = found.checkpoint
    step = last["step"] if last else stored.step if stored else None
    if found.spool.unreadable:
        found.missing.append(f"metrics.jsonl: {found.spool.unreadable} lines of its end cannot be read")
    report: Report = {
        "run": found.folder.name or str(found.folder),
        "folder": str(found.folder),
        "time": found.now,
        "state": state.kind,
        "why": state.why,
        "launch": state.launch,
        "slurm": None if jobs is None else [asdict(job) for job in jobs.values()],
        "step": step,
        "last_step": states.last_step(found),
        "steps": found.get("train", "steps", 1000),
        "tokens": number(last.get("train/tokens")) if last else None,
        "last_metrics_age": max(found.now - tail[-1]["time"], 0.0) if tail else None,
        "loss": asdict(trend) if (trend := loss_trend(lines)) else None,
        "validation": _validation(found),
        "speed": asdict(now) if (now := speed(lines, states.begun_at(found))) else None,
        "left": _left(found, lines, state.kind),
        "checkpoint": _checkpoint(found, step),
        "writing": found.writing,
        "attempts": _attempts(found),
        "skipped_steps": _skipped(last),
        "roll_backs": [event for event in found.events if event["what"] == "rolled_back"],
        "ranks": _ranks(found, state.launch),
        "mlflow": _mlflow(found, lines),
        "disk": {"free": found.disk_free, "next_checkpoint": stored.bytes if stored else _expected_bytes(found)},
        "missing": found.missing,
    }
    report = _finite(report)
    report["warnings"] = _warnings(found, report, last)
    return report


def _validation(found: Records) -> Optional[dict[str, Any]]:
    """The newest bound and the one before it."""
    assert found.spool is not None
    values = [
        {
            "step": line["step"],
            "nelbo": number(line["val/nelbo"]),
            "nelbo_se": number(line.get("val/nelbo_se")),
            "ppl_bound": number(line.get("val/ppl_bound")),
            "broken_blocks": int(number(line.get("val/broken_blocks")) or 0),
        }
        for line in found.spool.last_with("val/nelbo", 2)
    ]
    return values[-1] | {"before": values[0] if len(values) > 1 else None} if values else None


def _left(found: Records, lines: list[Line], kind: str) -> Optional[dict[str, Any]]:
    """Seconds until the last step, by the pace of the newest start that has made two steps."""
    assert found.spool is not None
    every = {
        "validation": found.get("train", "validate_every", 0),
        "sample": found.get("train", "sample_every", 0),
        "save": found.get("train", "checkpoint_every", 0),
    }
    before = math.inf
    for since in [*(start["time"] for start in reversed(found.starts[-3:])), 0.0]:
        own = next((line for line in reversed(lines) if line["time"] < before), None)
        went = pace(found.spool, own, since, every) if own else None
        if went:
            seconds = max(states.last_step(found) - lines[-1]["step"], 0) * went.seconds
            return {
                "seconds": seconds,
                "ends_at": found.now + seconds if kind == states.RUNNING else None,
                "step_seconds": went.seconds,
                "assumes": assumption(went, every),
            }
        before = since
    return None


def _checkpoint(found: Records, step: Optional[int]) -> Optional[dict[str, Any]]:
    if (stored := found.checkpoint) is None:
        return None
    since = max((step or stored.step) - stored.step, 0)
    return {
        "step": stored.step,
        "path": str(stored.path),
        "age": stored.age,
        "bytes": stored.bytes,
        "steps_since": since,
    }


def _attempts(found: Records) -> list[dict[str, Any]]:
    """Every recorded start with how it ended, oldest first."""
    attempts = []
    for i, start in enumerate(found.starts):
        until = found.starts[i + 1]["time"] if i + 1 < len(found.starts) else math.inf
        launch = str(start.get("launch", ""))
        ends = (e for e in found.ends if e.get("launch") == launch and start["time"] <= e["time"] < until)
        end, fault = next(ends, None), found.faults.get(launch)
        if fault and not start["time"] - states.CLOCKS_SECONDS <= fault.time < until:
            fault = None
        attempts.append(
            {
                **{key: start.get(key) for key in ("attempt", "time", "launch", "job", "world", "step")},
                "ended": end and {key: end.get(key) for key in ("time", "code", "step", "decision", "wait_seconds")},
                "fault": fault.sentence() if fault else None,
            }
        )
    return attempts


def _skipped(last: Optional[Line]) -> Optional[int]:
    """Steps whose update was not applied: not finite, or without a masked token."""
    applied = number(last.get("train/applied_steps")) if last else None
    return None if last is None or applied is None else int(last["step"] - applied)


def _ranks(found: Records, launch: str) -> Optional[dict[str, Any]]:
    """Where the ranks of the newest start are."""
    ranks = states.ranks_of(found, launch)
    if not ranks:
        return None
    fresh = [heard for heard in ranks if heard.age <= states.silent_after(found)]
    said = {heard.record.rank for heard in ranks}
    world = max(heard.record.world for heard in ranks)
    behind = min(ranks, key=lambda h: (_place(h), sum(h.record.collectives.values()), -h.idle))
    return {
        "world": world,
        "heard": len(fresh),
        "oldest": max(heard.age for heard in ranks),
        "newest": min(heard.age for heard in ranks),
        "silent": [heard.record.rank for heard in ranks if heard not in fresh and heard.record.phase != "end"],
        "never_heard": [rank for rank in range(world) if rank not in said],
        "first_step": max(_place(behind), 0),
        "last_step": max(max(_place(heard) for heard in ranks), 0),
        "behind": {
            "rank": behind.record.rank,
            "host": behind.record.host,
            "phase": behind.record.phase,
            "doing": behind.record.doing,
            "idle": behind.idle,
        },
        "clock": max((found.now - h.age - h.record.time for h in fresh), key=abs, default=0.0),
    }


def _place(heard: Any) -> int:
    return -1 if heard.record.step is None else heard.record.step


def _mlflow(found: Records, lines: list[Line]) -> Optional[dict[str, Any]]:
    """What the tracker does not have yet. None: tracking is off. exact: whether the points were counted, not estimated."""
    if found.get("tracking", "uri", "") == "none":
        return None
    shipped = found.shipped.get("shipped")
    shipped = {k: v for k, v in shipped.items() if isinstance(v, (int, float))} if isinstance(shipped, dict) else {}

    def lacks(line: Line, name: str) -> bool:
        return line["step"] > shipped.get(name, shipped.get(name.split("/")[0], -1))

    counts, oldest = [], None
    for line in lines:
        names = [name for name, value in line.items() if "/" in name and not isinstance(value, str)]
        counts.append(sum(lacks(line, name) for name in names))
        if counts[-1] and oldest is None:
            oldest = line["time"]
    have = max((int(step) for name, step in shipped.items() if name.startswith("train")), default=0)
    points, exact = sum(counts), not (counts and counts[0] and lines[0]["step"] > have + 1)
    if not exact:
        points = round(points / len(lines) * (lines[-1]["step"] - have))
    return {
        "run_id": found.shipped.get("run_id"),
        "shipped_step": have,
        "points": points,
        "exact": exact,
        "oldest": None if oldest is None else max(found.now - oldest, 0.0),
    }


def _expected_bytes(found: Records) -> Optional[int]:
    """Of a checkpoint of a run that has none yet."""
    sizes = found.config.get("model")
    if not isinstance(sizes, dict):
        return None
    try:
        shape = ModelShape(**{key: sizes[key] for key in ModelShape.__dataclass_fields__ if key in sizes})
        return STORED_BYTES * sum(math.prod(spec.shape) for spec in parameter_table(shape).values())
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def _warnings(found: Records, report: Report, last: Optional[Line]) -> list[str]:
    """What a person should look at, the worst first."""
    said = []
    if report["state"] in (states.STALLED, states.FAULT):
        said.append(f"{report['state']}: {report['why']}")
    if found.report and report["state"] not in (states.RUNNING, states.FINISHED):
        said.append(f"it is not started again; why, and what to do: {found.folder / 'health' / 'report.txt'}")
    alive = report["state"] in (states.RUNNING, states.STALLED)
    ranks = report["ranks"]
    if alive and ranks and ranks["silent"]:
        said.append(f"not heard of any more: {some('rank', ranks['silent'])}")
    if alive and ranks and abs(ranks["clock"]) > states.CLOCKS_SECONDS:
        said.append(f"the clocks of the ranks' hosts and of this one are {duration(abs(ranks['clock']))} apart")
    free, needed = report["disk"]["free"], report["disk"]["next_checkpoint"]
    if free is not None and needed and free < 1.05 * needed and report["state"] != states.FINISHED:
        said.append(f"the disk has {size(free)} free, the next checkpoint needs {size(needed)}")
    if last and (in_a_row := number(last.get("train/skipped_in_a_row"))):
        bound = found.get("train", "max_skipped", 10)
        said.append(f"the last {in_a_row:.0f} updates were skipped, not finite (train.max_skipped {bound})")
    if report["loss"] and report["loss"]["broken"]:
        said.append(f"the loss of {report['loss']['broken']} recent steps is not finite")
    if report["validation"] and report["validation"]["broken_blocks"]:
        said.append(f"validation: the loss of {report['validation']['broken_blocks']} blocks is not finite")
    every = found.get("train", "checkpoint_every", 0)
    since = report["checkpoint"]["steps_since"] if report["checkpoint"] else report["step"] or 0
    if every and since > 2 * every:
        said.append(f"no checkpoint was completed for {since} steps (train.checkpoint_every {every})")
    if report["roll_backs"]:
        at = ", ".join(f"{event.get('last')} to {event.get('step')}" for event in report["roll_backs"][-3:])
        said.append(f"rolled back {len(report['roll_backs'])} times: step {at}")
    same = [start for start in found.starts if start.get("step") == found.starts[-1].get("step")]
    if len(same) >= 3 and same == found.starts[-len(same) :]:
        said.append(f"the last {len(same)} starts all began at step {same[-1].get('step')}: no progress between them")
    mlflow = report["mlflow"]
    if mlflow and mlflow["oldest"] is not None and mlflow["oldest"] > SHIPPED_LATE_SECONDS:
        points = f"{'' if mlflow['exact'] else 'about '}{mlflow['points']:,} points"
        said.append(
            f"MLflow lacks {points}, the oldest {duration(mlflow['oldest'])} old: `track sync --run {found.folder}`"
        )
    return said


def some(what: str, numbers: list[int]) -> str:
    """ "ranks 1, 2, 3 and 7 more" """
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"{what}{'s' if len(numbers) > 1 else ''} {shown}"


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
