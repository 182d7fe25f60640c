"""`restart --run RUN --code CODE`: what the launcher's script asks when a start of the run is over."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.errors import InputError
from pretrain.config import HealthConfig
from pretrain.tracking.metric_log import last_step
from pretrain.tracking.run_events import record_state
from pretrain.watching.faults import LEAVES, MISTAKE
from pretrain.watching.restart_rules import DAY_SECONDS, LOST, STOPS, Attempt, Decision
from pretrain.watching.restarts import ENDED_BY, record_end, record_lost

REPORT = "report.txt"
_ASKING = {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT}


def restart(run: str, code: int, wait: bool = True, config: str = "") -> int:
    """Notes the end, says what becomes of the run, waits if it has to. 0: done, 2: a mistake, 75: start again now, 77: do not.

    code: what the start ended with. config: file to take `health` from instead of RUN/config.yaml. When the run is not to be
    started again because of a fault, RUN/health/report.txt says why and what to do. PALIMPSEST_ENDED_BY in the environment says
    what ended it (Attempt.why); with `lost` the job has just been started again: an end that nobody noted is noted, 75 or 77.
    """
    folder = Path(run)
    lost = os.environ.get(ENDED_BY) == LOST
    if (lost or code in (0, MISTAKE)) and not folder.is_dir():
        return LEAVES if lost else code
    if not folder.is_dir():
        raise InputError(f"restart: {run} is no run folder; name the one that `train` made")
    with _undisturbed():
        result = _decided(folder, code, config, lost)
    if isinstance(result, int):
        return result
    if wait:
        _pause(result.wait_seconds)
    return LEAVES


def _decided(folder: Path, code: int, config: str, lost: bool) -> int | Decision:
    """Notes the end and says what becomes of the run: an exit code, or the pause before the next start."""
    health = _health(folder, config)
    if lost:
        try:
            found = record_lost(folder, health)
        except OSError as error:
            _warn(f"{folder / 'health'} cannot be written ({error.strerror}): how the last start ended is not noted")
            return LEAVES
        if found is None:
            return LEAVES
        history, decision = found
    else:
        history, decision = record_end(folder, code, health)
    print(_line(history[-1], decision), flush=True)
    if history[-1].code in (0, MISTAKE):
        return int(history[-1].code or 0)
    if decision.restart:
        return decision
    path = folder / "health" / REPORT
    try:
        record_state(folder, "failed", last_step(folder))  # for the tracker, which a killed run could not tell
        path.write_text(report(folder, history, decision))
    except OSError as error:
        _warn(f"{folder} cannot be written ({error.strerror}): no {path}")
    else:
        print(f"restart: {path} says more", flush=True)
    return STOPS


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait until the body is over. What the caller ignores, as slurm/job.sh does until here, stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pause(seconds: float) -> None:
    """From here on a signal may end this process: all is noted, and what it would say is that the run goes on."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
    time.sleep(seconds)


def report(run: Path, history: Sequence[Attempt], decision: Decision) -> str:
    """Why a run was not started again, for a person: all attempts, the fault, where to look, what to do."""
    last = history[-1]
    lines = [f"Run {run}: not started again.", "", f"Why: {decision.reason}", ""]
    if fault := last.fault:
        lines += ["Fault of the last attempt:"]
        lines += [f"  {key:7} {fault[key]}" for key in ("kind", "rank", "host", "phase", "step", "doing", "cause")]
        lines += [
            f"  {'stacks':7} {fault['stacks']}/rank-*.txt (of the stopped or killed rank as seen from outside)",
            "",
        ]
    lines += [f"{'attempt':>7} {'began (UTC)':17} {'hours':>6} {'from':>8} {'to':>8} {'code':>5}  fault"]
    for attempt in history:
        hours = (attempt.ended - attempt.began) / 3600 if attempt.began and attempt.ended else 0.0
        began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(attempt.began)) if attempt.began else "?"
        code = "?" if attempt.code is None else str(attempt.code)
        reached = str(attempt.reached) if attempt.reached >= 0 else "-"
        what = attempt.fault["kind"] if attempt.fault else ""
        where = f" rank {attempt.fault['rank']} on {attempt.fault['host']}" if attempt.fault else ""
        lines.append(
            f"{attempt.number:>7} {began:17} {hours:>6.1f} {attempt.started_at:>8} {reached:>8} {code:>5}  {what}{where}"
        )
    lines += [
        "",
        "from, to: step of the checkpoint that it went on from, of the newest one at its end.",
        "",
        "What to do:",
    ]
    return "\n".join(lines + [f"- {advice}" for advice in _advice(run, history)]) + "\n"


def _advice(run: Path, history: Sequence[Attempt]) -> list[str]:
    last = history[-1]
    fault = last.fault or {}
    advice = {
        "stalled": ["read the stacks: the rank that is named is where the others are not"],
        "stopped": ["somebody or something stopped the process (a debugger, a suspended job): ask who"],
        "silent host": [
            f"look at host {fault.get('host') or '?'}: is it up, does it reach the shared folder; exclude it"
        ],
        "died": ["look at the kernel's log of that host (dmesg): memory, GPU errors (Xid), machine checks"],
        "crashed": [f"read the traceback in {run / 'logs'}/rank-*.log"],
    }.get(str(fault.get("kind")), [])
    if "out of memory" in str(fault.get("cause")):
        advice.append("the host's memory was full: fewer data.workers, or more memory for the job")
    hosts = [a.fault["host"] for a in history if a.fault and a.fault["host"] and last.ended - a.ended <= DAY_SECONDS]
    often = max(set(hosts), key=hosts.count) if hosts else ""
    if hosts.count(often) > 1:
        advice.append(f"host {often} is named in {hosts.count(often)} faults of the last 24 hours: exclude it")
    if last.code == LEAVES:
        advice.append("ask for more time, or make the start and the way to the first checkpoint shorter")
    again = (
        "submit the run again (a requeue of the same job would not do)" if last.job else "start the run again as before"
    )
    advice.append(f"then {again}: what was attempted up to here does not count any more")
    return advice


def _line(attempt: Attempt, decision: Decision) -> str:
    what = "goes on" if decision.restart else "ends"
    pause = f", after {decision.wait_seconds:.0f} s" if decision.wait_seconds else ""
    return f"restart: the run {what}{pause}: {decision.reason} (attempt {attempt.number}, exit code {attempt.code})"


def _health(folder: Path, config: str) -> HealthConfig:
    """The run's own rules; the defaults for one that ended before it kept its config, or whose config cannot be read."""
    from pretrain.load_config import load_config

    path = Path(config) if config else folder / "config.yaml"
    try:
        if not config and not path.is_file():
            return HealthConfig()
        return load_config(["--config", str(path)]).health
    except (Exception, SystemExit) as error:  # whatever is wrong with it must not end a run that can go on
        said = " ".join(str(error).split())[:300]
        _warn(f"{path} cannot be read ({said}): the defaults of `health` hold")
        return HealthConfig()


def _warn(text: str) -> None:
    print(f"restart: warning: {text}", file=sys.stderr, flush=True)
