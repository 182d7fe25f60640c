"""Row losses and soft inputs under tensor and pipeline parallelism and both engines: equal to one dense float64 process."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from tests.distributed import row_losses_case as case
from tests.distributed.launch import run

pytestmark = pytest.mark.parity  # the everyday cells of the parity matrix have one of each objective

FSDP2, ZERO = {"engine": "fsdp2"}, {"engine": "deepspeed"}
LAYOUTS = {
    "fsdp2 dp2": FSDP2,
    "fsdp2 tp2": {**FSDP2, "tensor": 2},
    "fsdp2 sp2": {**FSDP2, "tensor": 2, "sequence_parallel": True, "activation_checkpointing": "full"},
    "fsdp2 pp2": {**FSDP2, "pipeline": 2, "schedule": "1f1b"},
    "zero1 pp2": {**ZERO, "zero_stage": 1, "pipeline": 2, "schedule": "1f1b"},
    "zero1 tp2": {**ZERO, "zero_stage": 1, "tensor": 2},
    "zero3 dp2": {**ZERO, "zero_stage": 3},
}
UNTIED = ("fsdp2 pp2", "zero1 pp2", "zero1 tp2")
CELLS = {
    f"{kind}, {layout}": {
        "layout": LAYOUTS[layout],
        "row_loss": kind,
        "soft": kind != "uniform",
        "tied": kind == "symmetric_kl" and layout not in UNTIED,
    }
    for kind, layout in (
        *(("uniform", layout) for layout in LAYOUTS),
        *(("symmetric_kl", layout) for layout in LAYOUTS),
        ("cross_entropy", "fsdp2 tp2"),
    )
}
truth = cache(case.truth)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("row_losses")
    (folder / "cells.json").write_text(json.dumps(CELLS))
    run("tests.distributed.row_losses_worker", [str(folder)], 2)
    return {
        name: [torch.load(folder / f"{number}-{rank}.pt", weights_only=True) for rank in range(2)]
        for number, name in enumerate(CELLS)
    }


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def wanted(name: str):
    cell = CELLS[name]
    return truth(case.ROW_LOSSES[cell["row_loss"]], cell["soft"], cell["tied"])


@pytest.mark.parametrize("name", CELLS)
def test_loss_and_token_values_equal_the_dense_ones_on_every_rank(name, results):
    loss, values, _ = wanted(name)
    ranks = {r["dp_rank"]: r for r in results[name]}
    assert float(sum(r["loss"] for r in ranks.values())) == pytest.approx(float(loss), rel=3e-6)
    for r in results[name]:
        share = values[r["dp_rank"] * len(r["value"]) :][: len(r["value"])]
        assert all(relative(got, want) < 1e-5 for got, want in zip(r["value"], share, strict=True))
        assert relative(r["alone"], share[0]) < 1e-5
        same = CELLS[name]["row_loss"] == "cross_entropy"
        assert all(torch.equal(a, b) == same for a, b in zip(r["value"], r["ce"], strict=True))


@pytest.mark.parametrize("name", CELLS)
def test_every_gradient_equals_the_dense_one(name, results):
    _, _, gradients = wanted(name)
    whole = {}
    for r in results[name]:
        for parameter, parts in r["gradients"].items():
            full = whole.setdefault(parameter, torch.full(r["shapes"][parameter], torch.nan))
            for offset, values in parts:
                full[tuple(slice(o, o + s) for o, s in zip(offset, values.shape))] = values
    assert {f"gradient/{n}" for n in gradients} == set(whole)
    for parameter, dense in gradients.items():
        assert relative(whole[f"gradient/{parameter}"], dense) < 2e-5, parameter
