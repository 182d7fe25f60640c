"""What ranks say from now on: their logs, looked at again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from pretrain.logs.files import Message, RankFile, order, split

POLL_SECONDS = 0.5
MOST_BYTES = 1 << 20  # of one log in one look; the rest follows in the next


class Follower:
    """Complete messages as they come. A log that begins later, or begins anew, is read from its beginning."""

    def __init__(self, files: Callable[[], list[RankFile]], offsets: Mapping[int, int]):
        """files: the logs there are now, each time it is called. offsets: rank -> byte up to which its log was shown."""
        self._files, self._offsets = files, dict(offsets)
        self._open: dict[int, Message] = {}  # the newest of each rank: more lines of it may follow

    def more(self) -> list[Message]:
        """What is complete since the last call, in the order of time."""
        complete = []
        for file in self._files():
            rank, fresh = file.rank, False
            for raw in self._lines(file):
                at, text = split(raw)
                fresh = True
                message = self._open.get(rank)
                if message is None or at is not None:
                    if message is not None:
                        complete.append(message)
                    message = self._open[rank] = Message(rank, at)
                message.add(text)
            if not fresh and rank in self._open:  # quiet since the last look: nothing more belongs to it
                complete.append(self._open.pop(rank))
        return sorted(complete, key=order)

    def wait(self) -> None:
        time.sleep(POLL_SECONDS)

    def _lines(self, file: RankFile) -> list[bytes]:
        offset = self._offsets.get(file.rank, 0)
        if file.end < offset:
            offset = 0
        data = file.read(offset, min(file.end - offset, MOST_BYTES))
        end = data.rfind(b"\n") + 1
        if not end and len(data) == MOST_BYTES:  # a line without an end
            end = len(data)
        self._offsets[file.rank] = offset + end
        return data[:end].split(b"\n")[:-1] if data[:end].endswith(b"\n") else [data[:end]] if end else []
