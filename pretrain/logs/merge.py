"""What many ranks said, in the order of time: equal lines once, and marks where a rank fell silent."""

from __future__ import annotations

import heapq
import statistics
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Optional

from pretrain.logs.files import CHUNK, HEADER, Message, RankFile, order
from pretrain.quantities import duration
from pretrain.rank_set import ranges

FOLD_SECONDS = 2.0  # what ranks say alike within this time is one line
GAP_SECONDS = 60.0  # a shorter silence is never marked
_PAUSES = 20  # of a rank, that its usual pause is taken from
_LEAST_PAUSES = 3
_UNUSUAL = 10.0  # times the usual pause
_AT_ONCE_BYTES = 1 << 24  # of all files together


@dataclass
class Group:
    """One message of one or more ranks. hosts: of ranks that started."""

    message: Message
    ranks: set[int]
    hosts: list[str] = field(default_factory=list)

    @property
    def at(self) -> Optional[float]:
        return self.message.at

    def lines(self) -> list[str]:
        """As they are shown."""
        lines = self.message.shown()
        if self.hosts and (header := HEADER.fullmatch(lines[0])):
            hosts = ", ".join(self.hosts[:4]) + (f" and {len(self.hosts) - 4} more" if len(self.hosts) > 4 else "")
            lines[0] = f"=== start {header[1]}: {len(self.ranks)} of {header[2]} ranks on {hosts}"
        return lines


def merged(parts: Sequence[tuple[RankFile, int]]) -> Iterator[Message]:
    """Every message of some logs, each from its own offset on, in the order of time; those without a time come first."""
    for file, _ in parts:
        file.chunk = max(min(_AT_ONCE_BYTES // len(parts), CHUNK), 4096)
    return heapq.merge(*(file.messages(offset) for file, offset in parts), key=order)


def folded(messages: Iterable[Message]) -> Iterator[Group]:
    """Messages that several ranks say alike within FOLD_SECONDS as one group, at the time of the first of them.

    What one rank says twice is two groups.
    """
    open_: OrderedDict[int, tuple[str, Group]] = OrderedDict()  # by number, in order of time
    newest: dict[str, int] = {}  # text -> the number of the last group with it
    for number, message in enumerate(messages):
        at = order(message)[0]
        while open_:
            first, (key, group) = next(iter(open_.items()))
            before = order(group.message)[0]
            if at == before or at - before <= FOLD_SECONDS:  # equal: also both without a time
                break
            del open_[first]
            if newest.get(key) == first:
                del newest[key]
            yield group
        header = HEADER.fullmatch(message.lines[0])
        key = f"=== start {header[1]}" if header else message.text
        known = newest.get(key)
        if known is not None and message.rank not in open_[known][1].ranks:
            group = open_[known][1]
            group.ranks.add(message.rank)
        else:
            group = Group(message, {message.rank})
            open_[number] = key, group
            newest[key] = number
        if header and header[3] not in group.hosts:
            group.hosts.append(header[3])
    for _, group in open_.values():
        yield group


class Silences:
    """Marks for what is shown: where nobody said anything, and where a rank that used to speak did not."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[float, float]] = {}  # rank -> (when it spoke, how long all were silent until then)
        self._pauses: dict[int, deque[float]] = {}
        self._newest: Optional[float] = None
        self._all_silent = 0.0

    def before(self, group: Group) -> list[str]:
        """The marks that belong above this group, which is the next one in time."""
        at = group.at
        if at is None:
            return []
        marks = []
        if self._newest is not None and at - self._newest >= GAP_SECONDS:
            marks.append(f"--- nobody said anything for {duration(at - self._newest)}")
            self._all_silent += at - self._newest
        silent: dict[str, list[int]] = {}
        for rank in sorted(group.ranks):
            if self._unusual(rank, at):
                silent.setdefault(duration(at - self._last[rank][0]), []).append(rank)
            if rank in self._last:
                self._pauses.setdefault(rank, deque(maxlen=_PAUSES)).append(self._silence(rank, at))
            self._last[rank] = at, self._all_silent
        marks += [f"--- [{ranges(ranks)}] silent for {pause}" for pause, ranks in silent.items()]
        self._newest = at
        return marks

    def after(self) -> list[str]:
        """The marks below the last group: ranks that others went on without."""
        if self._newest is None:
            return []
        gone = sorted(rank for rank in self._last if self._unusual(rank, self._newest))
        return [f"--- [{rank}] silent for the last {duration(self._newest - self._last[rank][0])}" for rank in gone]

    def seen(self) -> set[int]:
        """Ranks of which anything was shown."""
        return set(self._last)

    def _silence(self, rank: int, until: float) -> float:
        """Seconds for which a rank said nothing while others spoke."""
        at, all_silent = self._last[rank]
        return until - at - (self._all_silent - all_silent)

    def _unusual(self, rank: int, until: float) -> bool:
        """Whether a rank's silence until then is long, and long for this rank: most ranks say little while all is well."""
        pauses = self._pauses.get(rank, ())
        if rank not in self._last or len(pauses) < _LEAST_PAUSES:
            return False
        return self._silence(rank, until) >= max(GAP_SECONDS, _UNUSUAL * statistics.median(pauses))
