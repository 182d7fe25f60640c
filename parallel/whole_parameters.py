"""Parameters that are cut up, put together again for a look: one block at a time, and everything as it was afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


def by_unit(parameters: Mapping[str, T]) -> Iterator[dict[str, T]]:
    """The parameters of each block together, every other one alone, in their order."""

    def unit(item: tuple[str, T]) -> str:
        first, _, rest = item[0].partition(".")
        return f"{first}.{rest.partition('.')[0]}" if first == "blocks" else item[0]

    for _, items in groupby(parameters.items(), unit):
        yield dict(items)


@contextlib.contextmanager
def gathered_by_zero3(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, `.data` of these parameters (DeepSpeed ZeRO-3) is whole. Collective over their shard group.

    One that is whole already stays so. The module hooks and their trace see nothing of it.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    apart: list[Any] = [p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]  # type: ignore[attr-defined]
    if apart:
        apart[0].all_gather_coalesced(apart).wait()
    try:
        yield
    finally:
        for parameter in apart:
            parameter.partition()
