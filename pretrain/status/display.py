"""A run's report as one screen, and several as a table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from pretrain.quantities import count, duration, size
from pretrain.status import state as states
from pretrain.status.report import Report, some
from pretrain.terminal import paint

BAR = 24  # characters
SHOWN_STARTS = 4
_COLOURS = {
    states.RUNNING: "green",
    states.FINISHED: "green",
    states.WAITING: "yellow",
    states.STOPPED: "yellow",
    states.NEVER_STARTED: "yellow",
    states.STALLED: "alarm",
    states.FAULT: "alarm",
}


def screen(report: Report, colours: bool, blocks: bool = True) -> str:
    """blocks: whether the bar may be drawn with block characters."""
    state = paint(report["state"].upper(), _COLOURS[report["state"]], colours)
    lines = [f"{paint(report['run'], 'bold', colours)}  {state}  {report['why']}"]
    lines += [paint(f"! {warning}", "red", colours) for warning in report["warnings"]]
    lines += [f"{paint(f'{name:<11}', 'dim', colours)} {text}" for name, text in _rows(report, blocks)]
    return "\n".join(lines)


def _rows(report: Report, blocks: bool) -> Iterator[tuple[str, str]]:
    yield "step", _step(report, blocks)
    yield "loss", _loss(report["loss"])
    yield "validation", _validation(report["validation"])
    yield "speed", _speed(report["speed"])
    yield "left", _left(report)
    yield "checkpoint", _checkpoint(report)
    for i, text in enumerate(_starts(report)):
        yield "" if i else "starts", text
    yield "updates", _updates(report)
    yield "ranks", _ranks(report["ranks"], report["state"] in (states.RUNNING, states.STALLED))
    yield "mlflow", _mlflow(report["mlflow"])
    yield "disk", _disk(report["disk"])
    for i, text in enumerate(report["missing"]):
        yield "" if i else "not known", text


def _step(report: Report, blocks: bool) -> str:
    step, last = report["step"], report["last_step"]
    if step is None:
        return f"none of {last:,} yet"
    share = min(step / last, 1.0) if last else 1.0
    full, empty = ("█", "░") if blocks else ("#", ".")
    filled = int(share * BAR)
    tokens = f"   {count(report['tokens'])} tokens" if report["tokens"] is not None else ""
    age = report["last_metrics_age"]
    heard = f"   last metrics {duration(age)} ago" if age is not None else ""
    whole = f" (train.stop_at; train.steps is {report['steps']:,})" if last != report["steps"] else ""
    # Rounded down: 100% is the end.
    return f"{step:,} of {last:,}{whole}  {full * filled}{empty * (BAR - filled)} {int(1000 * share) / 10:g}%{tokens}{heard}"


def _loss(loss: Optional[dict[str, Any]]) -> str:
    if loss is None:
        return "no finite loss recorded"
    text = f"{loss['loss']:.4f}, the mean of the last {_many('step', loss['steps'])}"
    if loss["change"] is None:
        return text
    # Two standard errors: what chance alone does in one of twenty looks.
    sure = abs(loss["change"]) > 2 * loss["error"]
    trend = ("falls" if loss["change"] < 0 else "RISES") if sure else "no clear trend"
    return f"{text}; {trend}: {loss['change']:+.4f} +- {loss['error']:.4f} against the {loss['steps']} before"


def _validation(found: Optional[dict[str, Any]]) -> str:
    if found is None:
        return "none recorded"
    if found["nelbo"] is None:
        return f"not finite at step {found['step']:,}"
    error = "" if found["nelbo_se"] is None else f" +- {found['nelbo_se']:.4f}"
    perplexity = "" if found["ppl_bound"] is None else f", perplexity {found['ppl_bound']:.2f}"
    text = f"{found['nelbo']:.4f}{error} nats per token{perplexity} (val/nelbo at step {found['step']:,}"
    before = found["before"]
    if before and before["nelbo"] is not None:
        text += f"; {found['nelbo'] - before['nelbo']:+.4f} against step {before['step']:,}"
    return text + ")"


def _speed(found: Optional[dict[str, Any]]) -> str:
    if found is None:
        return "not measured yet"
    mfu = (
        f"MFU {100 * found['mfu']:.1f}%"
        if found["mfu"] is not None
        else "MFU not measured (the device's peak is not known)"
    )
    return (
        f"{found['tokens_per_second']:,.0f} tokens/s, {found['step_seconds']:.3g} s a step, {mfu}; medians of "
        f"{_many('step', found['steps'])}"
    )


def _left(report: Report) -> str:
    left = report["left"]
    if report["state"] == states.FINISHED:
        return "nothing"
    if left is None:
        return "not known: the time of a step follows from two of them"
    if left["ends_at"] is None:
        return f"{duration(left['seconds'])} of running ({left['assumes']})"
    return f"{duration(left['seconds'])}, until {moment(left['ends_at'])} ({left['assumes']})"


def _checkpoint(report: Report) -> str:
    stored, writing = report["checkpoint"], report["writing"]
    live = report["state"] in (states.RUNNING, states.STALLED)
    more = ""
    if writing is not None:
        more = f"; that of step {writing:,} is being written" if live else f"; that of step {writing:,} is half-written"
    if stored is None:
        return f"none complete{more}"
    since = f"{_many('step', stored['steps_since'])} since" if stored["steps_since"] else "no step since"
    return f"step {stored['step']:,}, {duration(stored['age'])} ago, {size(stored['bytes'])}; {since}{more}"


def _starts(report: Report) -> list[str]:
    attempts = report["attempts"]
    if not attempts:
        return ["none recorded"]
    shown = attempts[-SHOWN_STARTS:]
    lines = [f"{len(attempts)}, {len(attempts) - 1} of them restarts" + ("; the last ones:" if len(shown) > 1 else "")]
    for attempt in shown:
        at = f"at step {attempt['step']:,}" if isinstance(attempt["step"], int) else "at an unknown step"
        ranks = f", {_many('rank', attempt['world'])}" if attempt["world"] else ""
        job = f", job {attempt['job']}" if attempt["job"] else ""
        number = "?" if attempt["attempt"] is None else attempt["attempt"]
        lines.append(
            f"#{number} {moment(attempt['time'])} {at}{ranks}{job}: {_end(attempt, attempt is attempts[-1], report)}"
        )
    return lines


def _end(attempt: dict[str, Any], newest: bool, report: Report) -> str:
    end, fault = attempt["ended"], attempt["fault"]
    if end is None:
        if fault:
            return fault
        return report["state"] if newest else "no end recorded"
    reasons = {0: "done", 2: "a mistake in config or input", 75: "asked to leave", 130: "interrupted"}
    reason = fault or reasons.get(end["code"], f"exit code {end['code']}")
    step = f" at step {end['step']:,}" if isinstance(end["step"], int) else ""
    return f"{reason}{step}" + (f"; then: {end['decision']}" if end["decision"] else "")


def _updates(report: Report) -> str:
    skipped = report["skipped_steps"]
    text = "skipped updates not known" if skipped is None else f"{skipped} skipped" if skipped else "none skipped"
    backs = report["roll_backs"]
    return f"{text}, {_many('roll-back', len(backs))}"


def _ranks(ranks: Optional[dict[str, Any]], live: bool) -> str:
    if ranks is None:
        return "none has said anything of itself (RUN/health)"
    first, last, behind = ranks["first_step"], ranks["last_step"], ranks["behind"]
    steps = f"step {last:,}" if first == last else f"steps {first:,} to {last:,}"
    if not live:
        return f"{_many('rank', ranks['world'])}, last heard of {duration(ranks['newest'])} ago at {steps}"
    text = f"{ranks['heard']} of {ranks['world']} heard of; at {steps}, as of up to {duration(ranks['oldest'])} ago"
    if ranks["never_heard"]:
        text += f"; never heard of: {some('rank', ranks['never_heard'])}"
    if ranks["world"] > 1:
        doing = behind["doing"] or behind["phase"]
        text += f"; furthest behind: rank {behind['rank']} on {behind['host']} ({doing})"
    return text


def _mlflow(found: Optional[dict[str, Any]]) -> str:
    if found is None:
        return "off (tracking.uri none)"
    if not found["points"]:
        return "has every point" if found["run_id"] else "nothing to ship yet"
    about = "" if found["exact"] else "about "
    return f"{about}{found['points']:,} points not shipped yet (it has the steps up to {found['shipped_step']:,})"


def _disk(found: dict[str, Any]) -> str:
    free = "free space not known" if found["free"] is None else f"{size(found['free'])} free"
    needed = found["next_checkpoint"]
    return f"{free}; the next checkpoint needs {'an unknown size' if needed is None else size(needed)}"


def _many(what: str, number: int) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def moment(seconds: float) -> str:
    """A time as 2026-01-31 12:00 UTC: hosts and people sit in several time zones."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "a far time"


def table(reports: Sequence[Report], colours: bool) -> str:
    """One line a run; the worst warning of each behind it."""
    head = ("run", "state", "step", "%", "loss", "val/nelbo", "tokens/s", "left", "checkpoint", "warnings")
    rows = [head, *(_cells(report) for report in reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = []
    for row, report in zip(rows, [None, *reports]):
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        if report:
            cells[1] = paint(cells[1], _COLOURS[report["state"]], colours)
        lines.append("  ".join([*cells, paint(row[-1], "red" if report else "", colours)]).rstrip())
    return "\n".join(lines)


def _cells(report: Report) -> tuple[str, ...]:
    step, last, loss, val = report["step"], report["last_step"], report["loss"], report["validation"]
    left, stored, warnings = report["left"], report["checkpoint"], report["warnings"]
    more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
    return (
        report["run"],
        report["state"],
        "-" if step is None else f"{step:,}/{last:,}",
        "-" if step is None else f"{int(100 * min(step / last, 1.0)) if last else 100}",
        f"{loss['loss']:.3f}" if loss else "-",
        f"{val['nelbo']:.3f}" if val and val["nelbo"] is not None else "-",
        f"{report['speed']['tokens_per_second']:,.0f}" if report["speed"] else "-",
        duration(left["seconds"]) if left and left["seconds"] else "-",
        f"{stored['step']:,}, {duration(stored['age'])} ago" if stored else "none",
        f"{warnings[0]}{more}" if warnings else "",
    )
