"""The exceptions that mean "the user can fix this": shown as one line, exit code 2, or 1 for what may pass by itself."""

from __future__ import annotations

import errno
from typing import Any

LASTING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})


class InputError(ValueError):
    """A mistake in configuration, data or layout, with what is wrong, where, what is allowed and what to do.

    `passing`: a fault of storage or network that another start may not meet (exit code 1).
    """

    def __init__(self, message: str = "", *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class ShardError(InputError):
    """The bytes of one shard cannot be used, while the rest of its set can.

    `shard`: its number in the set. `reason`: what is wrong with it, without its path and without advice.
    """

    def __init__(self, message: str, shard: int = -1, reason: str = "", *, passing: bool = False) -> None:
        super().__init__(message, passing=passing)
        self.shard, self.reason = shard, reason or message

    def __reduce__(self) -> tuple[Any, ...]:  # it must survive the way back from a loader's worker process
        return ShardError, (str(self), self.shard, self.reason), {"passing": self.passing}


def may_pass(error: OSError) -> bool:
    """Whether what the system said may be otherwise at the next start; False for a file that is not there, which is a mistake."""
    return error.errno is not None and error.errno not in LASTING
