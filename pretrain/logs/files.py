"""One rank's log (pretrain.watching.rank_log), read in parts: from a time on, or its last lines; never a whole file in memory.

A message is a line that begins with a time, and the lines behind it that do not (a traceback, what a library prints).
"""

from __future__ import annotations

import calendar
import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from pretrain.watching.rank_log import STAMP

CHUNK = 1 << 16
LOOK_BACK = 4 << 20  # how much without any time is read in search of one
MOST_LINES = 250  # of one message are kept for sure; twice as many at most
LONGEST = 1 << 14  # bytes of a line that are kept
_BACK = 1 << 14  # read at once from the end
_STAMP_BYTES = 32  # more than a time has
_KEPT = 1 << 18  # of a message that is longer
_BEGINS = re.compile(rb"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} ", re.MULTILINE)
_STAMPED = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{3}) ")
_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HEADER = re.compile(r"=== start (\S+): rank \d+ of (\d+) on (.+), process \d+")


@dataclass
class Message:
    """What one rank said at once. at: seconds since the epoch, None where the file does not say. more: lines that were left out in
    its middle.
    """

    rank: int
    at: Optional[float]
    lines: list[str] = field(default_factory=list)
    more: int = 0

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def add(self, line: str) -> None:
        """Of a long message its beginning and its end are kept."""
        self.lines.append(line)
        if len(self.lines) >= 2 * MOST_LINES:
            self.more += MOST_LINES
            del self.lines[MOST_LINES // 2 : -MOST_LINES // 2]

    def shown(self) -> list[str]:
        """The lines, with a word where some were left out."""
        if not self.more:
            return list(self.lines)
        return [*self.lines[: MOST_LINES // 2], f"... {self.more:,} lines left out ...", *self.lines[MOST_LINES // 2 :]]


def order(message: Message) -> tuple[float, int]:
    """By time, those without one first, then by rank."""
    return (-math.inf if message.at is None else message.at, message.rank)


@functools.lru_cache(maxsize=4096)  # many lines of one second
def seconds_of(stamp: str) -> float:
    """A time as logs have it (UTC) as seconds since the epoch. ValueError if it is none."""
    return calendar.timegm(time.strptime(stamp, STAMP))


def split(raw: bytes) -> tuple[Optional[float], str]:
    """(time, text) of one line, its end taken off; None for a line without a time."""
    at, found = None, _STAMPED.match(raw)
    if found:
        try:
            at = seconds_of(found[1].decode()) + int(found[2]) / 1000
            raw = raw[found.end() :]
        except (ValueError, OverflowError):  # the 31st of February: text like any other
            at = None
    return at, plain(raw)


def plain(raw: bytes) -> str:
    """A line as any terminal may show it: without what a progress bar wrote over, control characters made visible."""
    line = raw[:LONGEST].rstrip(b"\r\n")
    text = line[line.rfind(b"\r") + 1 :].decode(errors="replace")
    if not text.isprintable():
        text = _SEQUENCE.sub("", text)  # colours and cursor movements
        text = _CONTROL.sub(lambda c: f"\\x{ord(c[0]):02x}", text)
    return text + (" ..." if len(raw) > LONGEST + 2 else "")


def _message(rank: int, raw: bytes) -> Message:
    """One message from all its bytes."""
    first, *lines = raw.rstrip(b"\n").split(b"\n")
    at, text = split(first)
    message = Message(rank, at, [text])
    for line in lines:
        message.add(plain(line))
    return message


class RankFile:
    """The log of one rank, between two bytes of it."""

    def __init__(self, path: Path, rank: int):
        self.path, self.rank = path, rank
        self.begin, self.end = 0, self.size()
        self.chunk = CHUNK  # read at once; less where many files are read side by side

    def size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except OSError:
            return 0

    def read(self, offset: int, length: int) -> bytes:
        """The file is open only meanwhile: a thousand ranks have more logs than a process may have open files."""
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError:
            return b""

    def raw_lines(self, offset: int) -> Iterator[tuple[int, bytes]]:
        """(where it begins, line) from `offset`, the beginning of a line, on; a last line without its end as well."""
        rest = b""
        begin = offset
        while offset < self.end:
            data = self.read(offset, min(self.chunk, self.end - offset))
            if not data:
                break
            offset += len(data)
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield begin, line
                begin += len(line) + 1
            if len(rest) > 2 * CHUNK:  # no line: kept short, its length is only counted
                yield begin, rest
                begin, rest = begin + len(rest), b""
        if rest:
            yield begin, rest

    def messages(self, offset: int) -> Iterator[Message]:
        """Every message from `offset` on. Where the first lines have no time, they come as a message without one."""
        message: Optional[Message] = None
        for _, raw in self.raw_lines(offset):
            at, text = split(raw)
            if message is None or at is not None:
                if message is not None:
                    yield message
                message = Message(self.rank, at)
            message.add(text)
        if message is not None:
            yield message

    def limit_to(self, launch: str) -> bool:
        """Only what was said in the start of that name, its newest one; whether there is any. Searched from the end."""
        start = f" === start {launch}: ".encode()
        found = self._last(start, self.end)
        if found is None:
            self.begin = self.end
            return False
        self.begin = self._line_start(found)
        following = self._first(b" === start ", found + len(start))
        if following is not None:
            self.end = self._line_start(following)
        return True

    def newest_start(self) -> Optional[tuple[float, str]]:
        """When the newest start in this file was, and its name."""
        if (found := self._last(b" === start ", self.end)) is None:
            return None
        at, text = split(self.read(self._line_start(found), LONGEST).split(b"\n")[0])
        header = HEADER.fullmatch(text)
        return (at, header[1]) if header and at is not None else None

    def from_time(self, since: float) -> int:
        """Where the first message at or behind `since` begins. Halves the file: times grow, but for a host's clock that is set."""
        low, high = self.begin, self.end
        while low < high:
            middle = (low + high) // 2
            at, begin = self._time_behind(middle, high)
            if at is None or at >= since:
                high = middle
            else:
                low = begin + 1
        at, begin = self._time_behind(low, self.end)
        return self._line_start_behind(low) if at is None else begin

    def last_messages(self, number: int, wanted: Optional[Callable[[Message], bool]], bound: Optional[int]) -> int:
        """Where the `number` newest messages that are `wanted` (None: any) begin; the beginning if there are fewer.

        bound: most bytes that are read (None: all).
        """
        end, left = self.end, number
        least = self.begin if bound is None else max(self.begin, self.end - bound)
        rest = b""  # what was read already of the message that `end` lies in
        while end > least:
            start = max(end - _BACK, least)
            block = self.read(start, end - start) + rest
            first = 0 if start == self.begin else block.find(b"\n") + 1
            stop = len(block)
            fresh = end - start  # what lies behind was searched before, but for a time that the border cuts
            begins = [found.start() for found in _BEGINS.finditer(block, first, fresh + _STAMP_BYTES)]
            for at in reversed([at for at in begins if at < fresh]):
                if wanted is None or wanted(_message(self.rank, block[at:stop])):
                    left -= 1
                    if not left:
                        return start + at
                stop = at
            rest, end = block[: min(stop, _KEPT if wanted else _STAMP_BYTES)], start
        return self._line_start_behind(end)

    def _time_behind(self, offset: int, end: int) -> tuple[Optional[float], int]:
        """(time, where it begins) of the first stamped line that begins at or behind `offset` and before `end`."""
        begin = self._line_start_behind(offset)
        for position, raw in self.raw_lines(begin):
            if position >= end or position - begin > LOOK_BACK:
                break
            at = split(raw)[0]
            if at is not None:
                return at, position
        return None, end

    def _line_start_behind(self, offset: int) -> int:
        """The first byte at or behind `offset` at which a line begins."""
        if offset <= self.begin:
            return self.begin
        at = offset - 1
        while at < self.end:
            data = self.read(at, CHUNK)
            if (found := data.find(b"\n")) >= 0 or not data:
                return min(at + found + 1, self.end) if data else self.end
            at += len(data)
        return self.end

    def _line_start(self, offset: int) -> int:
        """Where the line that holds the byte `offset` begins; a stamp is short."""
        start = max(offset - 64, 0)
        return start + self.read(start, offset - start).rfind(b"\n") + 1

    def _last(self, words: bytes, end: int) -> Optional[int]:
        while end > self.begin:
            start = max(end - 16 * CHUNK, self.begin)
            if (found := self.read(start, end - start + len(words)).rfind(words)) >= 0:
                return start + found
            end = start
        return None

    def _first(self, words: bytes, start: int) -> Optional[int]:
        while start < self.end:
            if (found := self.read(start, 16 * CHUNK + len(words)).find(words)) >= 0:
                return start + found
            start += 16 * CHUNK
        return None
