"""One outcome on all ranks: what fails on one rank is the same error on every one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Optional, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from parallel.errors import CheckpointError, may_pass

T = TypeVar("T")


def distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def io_error(error: BaseException) -> Optional[OSError]:
    """The OSError that `error` is, or that it was raised from: torch's serialiser hides a full disk behind its own errors."""
    seen: Optional[BaseException] = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def passing(error: BaseException) -> bool:
    """Whether `error` is, or was raised from, a fault of the storage that another start may not meet."""
    found = io_error(error)
    return getattr(error, "passing", False) or (found is not None and may_pass(found))


def reason(error: BaseException) -> str:
    """`error` in one line; what the operating system said, where it said something."""
    found = io_error(error)
    if found is not None and found.errno:
        limit = " (the process's file size limit, `ulimit -f`)" if found.errno == errno.EFBIG else ""
        return f"{found.strerror}{limit}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def agreed(function: Callable[[], T], group: Optional[dist.ProcessGroup] = None) -> list[T]:
    """Calls `function` on this rank; its results on all ranks, in rank order. Collective over `group` (None = all ranks).

    If it failed on any rank, every rank raises the first failing rank's error: CheckpointError for a mistake or an
    input/output error (`passing` says which), RuntimeError for anything else, and for a rank that is gone.
    """
    result: Any = None
    failure: Optional[tuple[bool, str, bool]] = None
    try:
        result = function()
    except CheckpointError as error:
        failure = (True, str(error), passing(error))
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        failure = (io_error(error) is not None, reason(error), passing(error))
    everyone: list[Any] = [(failure, result)]
    if distributed():
        everyone = [None] * dist.get_world_size(group)
        try:
            dist.all_gather_object(everyone, (failure, result), group=group)
        except RuntimeError as error:
            raise gone(error) from error
    for rank, (failed, _) in enumerate(everyone):
        if failed is not None:
            expected, text, passes = failed
            raise CheckpointError(text, passing=passes) if expected else RuntimeError(f"rank {rank}: {text}")
    return [result for _, result in everyone]


def gone(error: RuntimeError) -> RuntimeError:
    """What to say when a collective itself fails."""
    return RuntimeError(
        f"checkpoint: a rank ended or hangs; the newest complete checkpoint is untouched ({reason(error)})"
    )


def first_cause(error: CheckpointException) -> CheckpointError | RuntimeError:
    """What torch.distributed.checkpoint, which tells all ranks of every rank's failure, was told first."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    if isinstance(cause, CheckpointError):
        return CheckpointError(str(cause), passing=passing(cause))
    said = f"rank {rank}: {reason(cause)}"
    return RuntimeError(said) if io_error(cause) is None else CheckpointError(said, passing=passing(cause))
