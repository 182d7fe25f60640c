"""The parity matrix: every legal kind of layout trains like one dense float64 process, and planted faults do not pass.

`make parity` runs all cells and all faults; here run the cells and faults that `matrix.everyday` and `everyday_faults` choose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.equivalence import equivalence_class, features
from parallel.layout import SCHEDULES, Layout
from parallel.layout_rules import ENGINES, RECOMPUTE, ZERO_STAGES, Case
from parallel.legality import first_broken
from tests.distributed import matrix_case
from tests.distributed.matrix import CELLS, Cell, everyday
from tests.distributed.matrix_faults import MUTANTS, everyday_faults, list_mutants
from tests.distributed.matrix_run import Outcome, compare, run_cells
from tests.distributed.parity_table import cell_table, fault_table

list_mutants()
EVERYDAY = everyday()
FAULTS = everyday_faults(CELLS)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    solved = run_cells([(cell, None) for cell in EVERYDAY])
    print("\n" + cell_table(solved))
    return {outcome.cell.name: outcome for outcome in solved}


@pytest.fixture(scope="module")
def caught() -> dict[tuple[str, str], Outcome]:
    found = run_cells(FAULTS)
    print("\n" + fault_table(found))
    return {(str(outcome.mutant), outcome.cell.name): outcome for outcome in found}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [cell.name for cell in EVERYDAY])
def test_losses_norms_gradients_weights_and_moments_equal_one_process_in_float64(outcomes, name):
    assert not outcomes[name].wrong


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault, name", [(fault, cell.name) for cell, fault in FAULTS])
def test_a_planted_fault_is_caught(caught, fault, name):
    outcome = caught[fault, name]
    assert outcome.wrong, f"{MUTANTS[fault].what}: {name} did not notice"
    assert not outcome.hung, "caught by patience alone; mark it as one that hangs if that is how it fails"


# What the matrix covers.


def legal_layouts() -> list[Case]:
    """Every legal layout of the matrix's problem on up to 8 ranks, over a grid of all keys."""
    grid = itertools.product(
        (1, 2, 4, 8),
        [(engine, stage) for engine in ENGINES for stage in ZERO_STAGES],
        (0, 2),
        [(1, False), (2, False), (2, True)],
        (1, 2, 4),
        SCHEDULES,
        RECOMPUTE,
        (1, 2, 4, 8),
        [(False, ()), (True, ()), (False, (2, 3)), (False, (1, 2, 1, 1))],
    )
    cases = (
        Case(
            matrix_case.shape_of(tied),
            world,
            Layout(engine, stage, shard, tensor, pipeline, layers, schedule, sequence, recompute),
            matrix_case.GLOBAL_BATCH,
            micro,
            matrix_case.LENGTH,
        )
        for world, (engine, stage), shard, (tensor, sequence), pipeline, schedule, recompute, micro, (
            tied,
            layers,
        ) in grid
    )
    return [case for case in cases if first_broken(case) is None]


def test_the_class_and_every_feature_of_any_legal_layout_has_a_cell_and_no_cell_is_illegal():
    assert not [cell.name for cell in CELLS if first_broken(cell.case)]
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    wanted = set()
    for case in legal_layouts():
        wanted |= {equivalence_class(case.layout), *features(case)}
    proven = set().union(*(cell.covers() for cell in CELLS))
    assert wanted == proven


def test_the_everyday_cells_meet_every_engine_kind_schedule_tensor_mode_and_feature_that_four_ranks_can_show():
    def pieces(cell: Cell) -> set:
        return {*enumerate(equivalence_class(cell.layout)), *(feature for _, feature in features(cell.case))}

    assert set().union(*map(pieces, EVERYDAY)) == set().union(*(pieces(cell) for cell in CELLS if cell.world <= 4))
    assert {cell.layout.engine for cell in CELLS if cell.world == 8} == set(ENGINES)


def test_every_fault_names_cells_that_exist_and_both_engines_meet_faults():
    names = {cell.name for cell in CELLS}
    for fault, mutant in MUTANTS.items():
        assert mutant.cells and set(mutant.cells) <= names, fault
    assert {cell.layout.engine for cell, _ in FAULTS} == set(ENGINES)


# The comparison itself would notice.


def solved_exactly(dp: int = 2) -> list[dict[str, Any]]:
    """What `dp` ranks of a faultless cell would write: rank 0 holds rows of every tensor, the last rank the rest."""
    truth = matrix_case.truth()

    def share(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, list]:
        cuts = {name: (tensor.shape[0] // 2) for name, tensor in tensors.items()}
        return {
            name: [([0] * t.dim(), t[: cuts[name]].float())]
            if rank == 0
            else [([cuts[name], *[0] * (t.dim() - 1)], t[cuts[name] :].float())]
            for name, t in tensors.items()
        }

    return [
        {
            "place": [0, rank, 0],
            "losses": [loss / dp for loss in truth.losses],
            "norms": list(truth.norms),
            "applied": [True] * matrix_case.STEPS,
            "masked": truth.masked.chunk(dp, dim=1)[rank],
            "gradients": [share(gradients, rank) for gradients in truth.gradients],
            "state": share(truth.state, rank),
        }
        for rank in range(dp)
    ]


UNTIED = next(cell for cell in CELLS if not cell.tied)
NAME = "weight/blocks.3.o_proj.weight"
SPOILED: dict[str, tuple[str, Callable[[list[dict]], Any]]] = {
    "a box that no rank holds": ("elements are on no rank", lambda found: found[1]["state"].update({NAME: []})),
    "an element that is not a number": (NAME, lambda found: found[0]["state"][NAME][0][1].__setitem__(0, torch.nan)),
    "one weight off by a hundredth": (NAME, lambda found: found[1]["state"][NAME][0][1].view(-1)[3:4].mul_(1.01)),
    "a tensor too many": ("no tensor", lambda found: found[0]["state"].update(bias=[([0], torch.zeros(1))])),
    "a gradient of the last step": (
        "step 2",
        lambda found: found[0]["gradients"][2]["gradient/head.weight"][0][1].mul_(1.0001),
    ),
    "a norm on one rank": ("norm", lambda found: found[1]["norms"].__setitem__(1, found[1]["norms"][1] * 1.00001)),
    "a loss": ("loss", lambda found: found[1]["losses"].__setitem__(0, found[1]["losses"][0] * 1.0001)),
    "a loss that is not a number": ("loss", lambda found: found[1]["losses"].__setitem__(0, float("nan"))),
    "a skipped step": ("skipped", lambda found: found[1]["applied"].__setitem__(2, False)),
    "other masks": ("masks", lambda found: found[1]["masked"].logical_not_()),
}


def test_the_comparison_passes_what_is_right():
    assert not compare(UNTIED, None, solved_exactly()).wrong
    assert compare(replace(UNTIED, tied=True), None, solved_exactly()).wrong


@pytest.mark.parametrize("spoiled", SPOILED)
def test_the_comparison_notices(spoiled):
    words, spoil = SPOILED[spoiled]
    found = [{**one, "masked": one["masked"].clone(), "norms": list(one["norms"])} for one in solved_exactly()]
    spoil(found)
    wrong = compare(UNTIED, None, found).wrong
    assert any(words in text for text in wrong), wrong
