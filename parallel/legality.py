"""Which layouts are legal: a pure function that answers in milliseconds, without GPUs or process groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from parallel.layout import Layout
from parallel.layout_rules import RULES, Case, Change, Rule, in_words
from parallel.shape import ModelShape


@dataclass(frozen=True)
class Illegal:
    """Why a layout is refused, and the nearest change of the config that removes the reason."""

    rule: str
    reason: str
    change: Change

    @property
    def alternative(self) -> str:
        """`change` in words: "parallel.tensor 2, parallel.zero_stage 3"."""
        return ", ".join(f"{key} {in_words(value)}" for key, value in self.change.items())


def first_broken(case: Case) -> Optional[Rule]:
    """The first rule that `case` breaks, None if it is legal."""
    return next((rule for rule in RULES if rule.broken(case)), None)


def judge(case: Case) -> Optional[Illegal]:
    """As `check_layout`, of a whole case."""
    rule = first_broken(case)
    if rule is None:
        return None
    cures = [change for change in rule.changes(case) if not rule.broken(case.with_change(change))]
    best = next((change for change in cures if first_broken(case.with_change(change)) is None), cures[0])
    return Illegal(rule.name, rule.reason(case), best)


def check_layout(
    shape: ModelShape,
    world_size: int,
    layout: Layout,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    sequence_length: int,
    bf16: bool = False,
    compile: bool = False,
) -> Optional[Illegal]:
    """None if the layout is legal on `world_size` ranks, else the first reason against it and the nearest way out."""
    return judge(Case(shape, world_size, layout, global_batch_size, micro_batch_size, sequence_length, bf16, compile))
