"""`logs`: what all ranks of a run said, as one text in the order of time."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Optional, TextIO

from data.errors import InputError
from pretrain.logs.files import LOOK_BACK, Message, RankFile, seconds_of
from pretrain.logs.follow import Follower
from pretrain.logs.merge import Group, Silences, folded, merged
from pretrain.rank_set import ranges, ranks_of
from pretrain.terminal import coloured, paint
from pretrain.watching.rank_log import STAMP

LAST = 200  # messages, where nothing else says how many
NEWEST = "last"  # for --start
_ASKED = 8
_AGO = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NAME = re.compile(r"rank-(\d{5,})\.log")
_ALARMING = re.compile(r"\b(error|exception|traceback|warning|fatal|abort(ed)?|killed|nan)\b", re.IGNORECASE)


def logs(
    run: str,
    ranks: str = "",
    last: Optional[int] = None,
    since: str = "",
    grep: str = "",
    follow: bool = False,
    start: str = "",
) -> int:
    """Prints what the ranks of the run folder `run` said. Returns the exit code.

    ranks: `0,3-5`, "": all. last: newest messages shown; None: 200, or all where `since` or `start` is given. since: a time in UTC,
    or `10m`, `2h`, `3d` ago. grep: only messages that match. follow: goes on with what comes, until interrupted. start: only that
    start of the run, by its name, or `last`. InputError for options that make no sense and for a run without logs.
    """
    if last is not None and last < 1:
        raise InputError(f"logs: --last is {last}, it must be >= 1")
    begin = moment_of(since, time.time()) if since else None
    wanted = _matching(grep)
    chosen = ranks_of(ranks, "logs: --ranks") if ranks else None
    files = _files(Path(run), chosen)
    if start:
        files = _of_start(run, files, start)
    if last is None and not (since or start):
        last = LAST
    try:
        page = _Page(sys.stdout)
        parts = _parts(files, last, begin, wanted, bool(grep))
        groups: Iterable[Group] = folded(message for message in merged(parts) if wanted(message))
        for group in groups if last is None else deque(groups, maxlen=last):
            page.show(group)
        page.end([] if grep else [file.rank for file in files])
        if follow:
            follower = Follower(lambda: _files(Path(run), chosen), {file.rank: file.end for file in files})
            while True:
                for group in folded(message for message in follower.more() if wanted(message)):
                    page.show(group)
                follower.wait()
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # `logs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parts(
    files: list[RankFile], last: Optional[int], since: Optional[float], wanted: Callable[[Message], bool], grep: bool
) -> list[tuple[RankFile, int]]:
    """Each log with the place to read it from, so that at least the `last` newest wanted messages of all are behind it."""
    offsets = [file.begin for file in files]
    if since is not None:
        offsets = [file.from_time(since) for file in files]
    if last is not None:
        for i, file in enumerate(files):
            offsets[i] = max(
                offsets[i], file.last_messages(last, wanted if grep else None, None if grep else LOOK_BACK)
            )
    return list(zip(files, offsets))


def _files(run: Path, ranks: Optional[set[int]]) -> list[RankFile]:
    """The logs of a run, by rank."""
    folder = run / "logs"
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise InputError(
            f"logs: {folder} cannot be read ({error.strerror}); name the folder of a run that was started"
        ) from None
    known = {int(found[1]): folder / name for name in names if (found := _NAME.fullmatch(name))}
    if not known:
        raise InputError(f"logs: {folder} holds no rank-NNNNN.log; name the folder of a run that was started")
    if ranks is not None:
        if lacking := sorted(ranks - known.keys()):
            raise InputError(
                f"logs: --ranks {ranges(lacking)}: no log of that; there are logs of ranks {ranges(known)}"
            )
        known = {rank: path for rank, path in known.items() if rank in ranks}
    return [RankFile(path, rank) for rank, path in sorted(known.items())]


def _of_start(run: str, files: list[RankFile], start: str) -> list[RankFile]:
    """Those that know the start of that name, and of them only its part."""
    # Files that were written last know the newest start; a thousand need not be searched for it.
    newest = sorted(files, key=lambda file: _mtime(file.path))[-_ASKED:]
    known = sorted(found for file in newest if (found := file.newest_start()))
    if start == NEWEST and not known:
        raise InputError(f"logs: --start {start}: no start is recorded in {run}/logs")
    name = known[-1][1] if start == NEWEST else start
    if not (kept := [file for file in files if file.limit_to(name)]):
        there = f"the newest is {known[-1][1]}" if known else f"none is recorded in {run}/logs"
        raise InputError(f"logs: --start {start}: no rank knows it; {there}")
    return kept


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def moment_of(text: str, now: float) -> float:
    """A time as people give it, as seconds since the epoch; InputError if it is none.

    `2026-01-31T12:00:05` or shorter, `12:00` of today (all UTC, as in the logs); `90s`, `10m`, `2h`, `3d` ago.
    """
    if ago := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return now - float(ago[1]) * _AGO[ago[2]]
    today = time.strftime("%Y-%m-%d", time.gmtime(now))
    full = (
        f"{today}T{text}" if re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?", text) else text.replace(" ", "T").removesuffix("Z")
    )
    for missing in ("", ":00", "T00:00:00"):
        try:
            return seconds_of(f"{full}{missing}")
        except ValueError:
            continue
    raise InputError(
        f"logs: --since is {text!r}, it must be a time (UTC) like {today}T12:00, 12:00, or 10m, 2h, 3d ago"
    )


def _matching(grep: str) -> Callable[[Message], bool]:
    try:
        pattern = re.compile(grep)
    except (re.error, OverflowError) as error:
        raise InputError(f"logs: --grep {grep!r} is no regular expression: {error}") from None
    return (lambda message: bool(pattern.search(message.text))) if grep else (lambda message: True)


class _Page:
    """Where the text goes: times of the day, ranks, and the day where it changes."""

    def __init__(self, out: TextIO):
        self._out, self._colours = out, coloured(out)
        self._silences, self._day = Silences(), ""

    def show(self, group: Group) -> None:
        for mark in self._silences.before(group):
            self._print(mark, "yellow")
        clock = " " * 12
        if group.at is not None:
            stamp = time.strftime(STAMP, time.gmtime(group.at))
            if stamp[:10] != self._day:
                self._day = stamp[:10]
                self._print(f"--- {self._day} (UTC)", "dim")
            clock = f"{stamp[11:]}.{int(group.at * 1000 + 0.5) % 1000:03d}"
        label = f"[{ranges(group.ranks)}]"
        first, *rest = group.lines()
        style = "bold" if first.startswith("=== start") else "red" if _ALARMING.search(first) else ""
        head = f"{paint(clock, 'dim', self._colours)} {paint(label, 'cyan', self._colours)}"
        print(head, paint(first, style, self._colours), file=self._out)
        for line in rest:
            print(" " * (len(clock) + len(label) + 1), line, file=self._out)
        self._out.flush()

    def end(self, ranks: list[int]) -> None:
        """Marks below what was shown. ranks: whose silence is worth a word."""
        for mark in self._silences.after():
            self._print(mark, "yellow")
        unseen = [rank for rank in ranks if rank not in self._silences.seen()]
        if unseen and len(unseen) < len(ranks):
            self._print(f"--- [{ranges(unseen)}] said nothing in this part", "dim")
        self._out.flush()

    def _print(self, text: str, style: str) -> None:
        print(paint(text, style, self._colours), file=self._out)
