"""Blocks, chunks and schedules without any engine: outputs and every gradient equal one dense process in float64."""

from __future__ import annotations

import json

import pytest
import torch

from parallel.shape import parameter_table
from pretrain.model import model_shape
from tests import reference_model
from tests.distributed import chunks_case as case
from tests.distributed.launch import run
from tests.distributed.training_case import full_weights

pytestmark = pytest.mark.parity  # the everyday cells of the parity matrix run the same chunks inside engines

SP = {"tensor": 2, "sequence_parallel": True}
# ranks -> name -> layout; one launch for each number of ranks
CELLS: dict[int, dict[str, dict]] = {
    1: {
        "one rank": {},
        "full checkpointing": {"activation_checkpointing": "full"},
        "selective checkpointing": {"activation_checkpointing": "selective"},
    },
    2: {
        "tp2": {"tensor": 2},
        "sp2": SP,
        "sp2, full": {**SP, "activation_checkpointing": "full"},
        "sp2, selective": {**SP, "activation_checkpointing": "selective"},
        "gpipe": {"pipeline": 2, "schedule": "gpipe"},
        "1f1b": {"pipeline": 2, "layers_per_stage": [4, 1]},
        "interleaved": {"pipeline": 2, "schedule": "interleaved", "activation_checkpointing": "full"},
        "interleaved_zb": {"pipeline": 2, "schedule": "interleaved_zb"},
        "zbv": {"pipeline": 2, "schedule": "zbv"},
    },
    4: {
        "1f1b sp2": {"pipeline": 2, **SP},
        "zbv tp2": {"pipeline": 2, "schedule": "zbv", "tensor": 2},
        "zbv sp2": {"pipeline": 2, "schedule": "zbv", **SP},
        "pp4": {"pipeline": 4, "layers_per_stage": [1, 1, 2, 1]},
    },
}


@pytest.fixture(scope="module")
def truth() -> dict:
    shape = model_shape(case.MODEL)
    weights = full_weights(shape)
    groups, eligible = case.batches()
    value = sum(reference_model.loss(weights, shape, b.tensors(), eligible) for b in groups)
    gradients = reference_model.gradients(weights, value)
    with torch.no_grad():
        dense = [reference_model.logits(weights, shape, b.noisy_ids, b.position_ids, b.document_ids) for b in groups]
        ce = [
            torch.nn.functional.cross_entropy(z.transpose(1, 2), b.target_ids, reduction="none") * b.masked
            for z, b in zip(dense, groups)
        ]
        logits = reference_model.logits(weights, shape, groups[0].noisy_ids, groups[0].position_ids)
    return {"loss": value.item(), "gradients": gradients, "ce": torch.cat(ce), "logits": logits}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict]]:
    found = {}
    for world, cells in CELLS.items():
        folder = tmp_path_factory.mktemp(f"chunks{world}")
        (folder / "cells.json").write_text(json.dumps(cells))
        run("tests.distributed.chunks_worker", [str(folder), str(folder / "cells.json")], world)
        for name in cells:
            found[name] = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(world)]
    return found


NAMES = [name for cells in CELLS.values() for name in cells]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_token_losses_are_the_same_on_every_rank_and_equal_the_dense_ones(name, results, truth):
    dp = {r["place"][1] for r in results[name]}
    total = sum(next(r["loss"] for r in results[name] if r["place"][1] == d) for d in sorted(dp))
    assert float(total) == pytest.approx(truth["loss"], rel=1e-6)
    for d in dp:
        same = [r for r in results[name] if r["place"][1] == d]
        assert all(torch.equal(r["ce"], same[0]["ce"]) for r in same)
        share = truth["ce"].chunk(len(dp))[d]
        assert relative(same[0]["ce"], share) < 1e-6
        assert relative(same[0]["alone"], share[-case.MICRO_BATCH :]) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_forward_alone_are_the_same_on_every_rank_of_the_pipeline(name, results, truth):
    for result in results[name]:
        if result["place"][1] == 0:
            assert relative(result["logits"], truth["logits"]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_equals_the_dense_one_once(name, results, truth):
    """Summed over data-parallel ranks, joined over tensor-parallel ones; each parameter lives in exactly one stage."""
    table = parameter_table(model_shape(case.MODEL))
    ranks = {tuple(r["place"]): r["gradients"] for r in results[name]}
    stages, dp, tp = (1 + max(place[axis] for place in ranks) for axis in range(3))
    for parameter, spec in table.items():
        homes = [s for s in range(stages) if parameter in ranks[s, 0, 0]]
        assert len(homes) == 1, f"{parameter} is on the stages {homes}"
        shares = [sum(ranks[homes[0], d, t][parameter].double() for d in range(dp)) for t in range(tp)]
        dense = truth["gradients"][parameter]
        if spec.tp_dim is None:
            assert all(relative(share, dense) < 1e-5 for share in shares), parameter
            continue
        whole = torch.cat(shares, spec.tp_dim)
        assert not whole[spec.shape[0] :].any(), f"{parameter}: rows of the vocabulary's padding got a gradient"
        assert relative(whole[: spec.shape[0]], dense) < 1e-5, parameter
