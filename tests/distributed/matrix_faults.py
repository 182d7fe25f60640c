"""The list of planted faults: each breaks the product inside the ranks of a cell, and the parity matrix must catch it.

A mutant is caught when the cell's numbers are wrong, or when it ends with an error or in a hang that is bounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.distributed.matrix import Cell


@dataclass(frozen=True)
class Mutant:
    """What is broken, and the names of the cells that must notice."""

    what: str
    cells: tuple[str, ...]
    broken: Callable[[], contextlib.AbstractContextManager]
    hangs: bool = False  # it ends a launch, so it comes last


MUTANTS: dict[str, Mutant] = {}


def mutant(what: str, *cells: str, hangs: bool = False) -> Callable[[Callable[[], Iterator[None]]], None]:
    """Lists a generator that patches the product, yields, and repairs it."""

    def listed(function: Callable[[], Iterator[None]]) -> None:
        MUTANTS[function.__name__] = Mutant(what, cells, contextlib.contextmanager(function), hangs)

    return listed


def list_mutants() -> None:
    """Fills MUTANTS."""
    from tests.distributed import matrix_engine_mutants, matrix_mutants  # noqa: F401


def all_faults(cells: Sequence[Cell]) -> list[tuple[Cell, str]]:
    """Every fault in every cell that must catch it; those that hang come last."""
    by_name = {cell.name: cell for cell in cells}
    order = sorted(MUTANTS, key=lambda name: MUTANTS[name].hangs)
    return [(by_name[cell], name) for name in order for cell in MUTANTS[name].cells]


def everyday_faults(cells: Sequence[Cell]) -> list[tuple[Cell, str]]:
    """The faults of `make test`: every one that does not hang and has a cell of two ranks, there."""
    by_name = {cell.name: cell for cell in cells}
    found = {name: [by_name[n] for n in m.cells if by_name[n].world <= 2] for name, m in MUTANTS.items() if not m.hangs}
    return [(small[0], name) for name, small in found.items() if small]
