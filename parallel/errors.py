"""Mistakes that a person can fix and that only this package can see."""

from __future__ import annotations

import errno

LASTING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: which one, why, and what to do, in one line.

    `passing`: a fault of the storage that another start may not meet, not one of the checkpoint.
    """

    def __init__(self, message: str = "", *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


def may_pass(error: OSError) -> bool:
    """Whether what the system said may be otherwise at the next start; False for a file that is not there."""
    return error.errno is not None and error.errno not in LASTING
