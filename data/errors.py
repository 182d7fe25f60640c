"""The exceptions that mean "the user can fix this": shown as one line, exit code 2."""

from __future__ import annotations

from typing import Any


class InputError(ValueError):
    """A mistake in configuration, data or layout, with what is wrong, where, what is allowed and what to do."""


class ShardError(InputError):
    """The bytes of one shard cannot be used, while the rest of its set can.

    `shard`: its number in the set. `reason`: what is wrong with it, without its path and without advice.
    """

    def __init__(self, message: str, shard: int = -1, reason: str = "") -> None:
        super().__init__(message)
        self.shard, self.reason = shard, reason or message

    def __reduce__(self) -> tuple[Any, ...]:  # it must survive the way back from a loader's worker process
        return ShardError, (str(self), self.shard, self.reason)
