"""The end of a metrics.jsonl, read without reading its beginning: a run of a million steps has a gigabyte of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

Line = dict[str, Any]
TAIL_BYTES = 1 << 19  # a few hundred lines
FARTHEST_BYTES = 1 << 26  # how far back to look for a kind of line that is rare
LONGEST_LINE = 1 << 20
_CHUNK = 1 << 22


class Spool:
    """One run's metrics.jsonl as it is now. Lines that are no objects with a step (zeros after a power cut) are passed over.

    size: bytes. unreadable: lines that were passed over so far, the cut one at the end not counted. problem: why nothing can be
    read, None if it can.
    """

    def __init__(self, path: Path):
        self.path, self.size, self.unreadable = path, 0, 0
        self.problem: Optional[str] = None
        try:
            self.size = os.stat(path).st_size
            with open(path, "rb"):
                pass
        except OSError as error:
            self.problem = error.strerror or str(error)

    def tail(self, most: int = TAIL_BYTES) -> list[Line]:
        """The lines of the last `most` bytes, oldest first."""
        start = max(self.size - most, 0)
        content = self._read(start, self.size - start)
        if start:
            content = content[content.find(b"\n") + 1 :]
        whole = content[: content.rfind(b"\n") + 1]
        lines = []
        for raw in whole.splitlines():
            line = _parse(raw)
            if line is None:
                self.unreadable += 1
            else:
                lines.append(line)
        return lines

    def last_with(self, key: str, count: int, farthest: int = FARTHEST_BYTES) -> list[Line]:
        """The newest `count` lines that hold `key`, oldest first, of the last `farthest` bytes."""
        wanted = json.dumps(key).encode() + b":"
        found: list[Line] = []
        end = self.size
        rest = b""  # the beginning of the part that was read before: the end of a line that begins further up
        while end > 0 and self.size - end < farthest and len(found) < count:
            start = max(end - _CHUNK, 0)
            block = self._read(start, end - start) + rest
            first = block.find(b"\n") + 1 if start else 0
            at = block.rfind(wanted, first)
            while at >= first and len(found) < count:
                begin = block.rfind(b"\n", first, at) + 1 or first
                stop = block.find(b"\n", at)
                if stop >= 0 and (line := _parse(block[begin:stop])) is not None and key in line:
                    found.append(line)
                at = block.rfind(wanted, first, begin)
            rest, end = block[:first][-LONGEST_LINE:], start
        return found[::-1]

    def first_where(self, reached: Callable[[Line], bool]) -> Optional[Line]:
        """The first line for which `reached` holds, None if there is none. It must hold for every line behind it: the search halves
        the file, some thirty short reads however large it is.
        """
        low, high = 0, self.size  # `reached` is false for lines that begin before low; true, or no line, from high on
        found = None
        while low < high:
            middle = (low + high) // 2
            line, begin, behind = self._line_from(middle)
            if line is None or begin >= high:
                high = middle
            elif reached(line):
                found, high = line, middle
            else:
                low = behind
        return found

    def _line_from(self, offset: int) -> tuple[Optional[Line], int, int]:
        """The first whole, readable line that begins at or behind `offset`, where it begins and where it ends."""
        try:
            with open(self.path, "rb") as file:
                if offset:
                    file.seek(offset - 1)
                    file.readline(LONGEST_LINE)
                while True:
                    begin = file.tell()
                    raw = file.readline(LONGEST_LINE)
                    if not raw.endswith(b"\n") or begin >= self.size:
                        return None, begin, begin
                    if (line := _parse(raw)) is not None:
                        return line, begin, file.tell()
        except OSError:
            return None, offset, offset

    def _read(self, start: int, length: int) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            self.problem = error.strerror or str(error)
            return b""


def _parse(raw: bytes) -> Optional[Line]:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    return line if all(number(line.get(key)) is not None for key in ("step", "time")) else None


def number(value: Any) -> Optional[float]:
    """A value as it lies in the spool, None if it is no finite number (a metric that is not finite is text there)."""
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:  # a whole number of a thousand digits
        return None
