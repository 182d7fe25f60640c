"""Learning rate and batch as functions of the cell."""

from __future__ import annotations

import math
from collections.abc import Mapping

from data.errors import InputError
from pretrain.study.design.spec import RuleConfig


def value_of(rule: RuleConfig, quantities: Mapping[str, float], default: float) -> float:
    """What a rule gives for a cell. quantities: its parameters, width, tokens, ...; default: where the rule says nothing (at 0)."""
    if not rule.at:
        return default
    if rule.rule == "constant":
        return rule.at
    try:
        value = rule.at * (quantities[rule.of] / rule.reference) ** rule.exponent
    except OverflowError:
        value = math.inf
    if not 0 < value < math.inf:
        raise InputError(
            f"study: a rule with at {rule.at:g}, reference {rule.reference:g} and exponent {rule.exponent:g} gives {value:g} where "
            f"{rule.of} is {quantities[rule.of]:g}: it must give a positive number"
        )
    return value


def whole_batch(value: float, multiple: int) -> int:
    """The multiple of `multiple` that is nearest to `value`, at least one."""
    return max(1, round(value / multiple)) * multiple


def micro_batch(per_rank: int, most: int) -> int:
    """The largest divisor of a rank's samples that is at most `most`."""
    return max(size for size in range(1, min(per_rank, most) + 1) if per_rank % size == 0)
