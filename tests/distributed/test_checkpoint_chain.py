"""A run handed from layout to layout and engine to engine: bit-equal weights and moments, and it trains on as one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from parallel.shape import parameter_table
from pretrain.model import model_shape
from tests import reference_model
from tests.distributed import training_case as case
from tests.distributed.chain_worker import MODEL
from tests.distributed.launch import run

pytestmark = pytest.mark.parity

# (ranks, legs): the second launch goes on where the first ended.
LAUNCHES: list[tuple[int, dict[str, dict]]] = [
    (
        4,
        {
            "z3 dp4": {"layout": {"engine": "deepspeed"}, "steps": 2},
            "fsdp2 tp2 dp2": {"layout": {"engine": "fsdp2", "tensor": 2, "sequence_parallel": True}, "steps": 2},
            "z3 pp2 tp2": {"layout": {"tensor": 2, "pipeline": 2}, "steps": 2},
            "fsdp2 zbv dp2": {"layout": {"engine": "fsdp2", "pipeline": 2, "schedule": "zbv"}, "steps": 2},
            "z1 dp4": {"layout": {"zero_stage": 1}, "steps": 2},
            "fsdp2 hybrid": {"layout": {"engine": "fsdp2", "shard_group": 2}, "steps": 2},
        },
    ),
    (1, {"z3 one rank": {"layout": {}, "steps": 2}, "z0 one rank": {"layout": {"zero_stage": 0}, "steps": 2}}),
]
LEGS = [name for _, legs in LAUNCHES for name in legs]
WORLD = {name: world for world, legs in LAUNCHES for name in legs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    for number, (world, legs) in enumerate(LAUNCHES):
        file = folder / f"legs{number}.json"
        file.write_text(json.dumps(legs))
        run("tests.distributed.chain_worker", [str(folder), str(file)], world)
    return folder


def whole(folder: Path, leg: str, when: str) -> dict[str, torch.Tensor]:
    """Full tensors put together from every rank's boxes, without torch.distributed.checkpoint; nan where nobody holds a value."""
    table = parameter_table(model_shape(MODEL))
    full = {
        f"{kind}/{name}": torch.full(spec.shape, float("nan"))
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, spec in table.items()
    }
    for rank in range(WORLD[leg]):
        for name, parts in torch.load(folder / f"{leg}-{when}-{rank}.pt", weights_only=True).items():
            for offset, values in parts:
                place = tuple(slice(o, o + size) for o, size in zip(offset, values.shape))
                there = full[name][place]
                assert torch.equal(there[~there.isnan()], values[~there.isnan()]), f"replicas of {name} differ"
                full[name][place] = values
    return full


@pytest.mark.parametrize("before, after", list(zip(LEGS, LEGS[1:])))
def test_weights_and_both_moments_pass_from_layout_to_layout_bit_for_bit(folder, before, after):
    saved, loaded = whole(folder, before, "saved"), whole(folder, after, "loaded")
    for name, values in saved.items():
        assert not values.isnan().any(), f"{name} is not wholly held"
        assert torch.equal(values, loaded[name]), name
    moments = torch.cat([v.flatten() for n, v in saved.items() if n.startswith("exp_avg")])
    assert (moments != 0).float().mean() > 0.5  # else nothing was passed on


def test_the_chain_trains_as_one_uninterrupted_process_in_float64(folder):
    shape = model_shape(MODEL)
    weights = case.full_weights(shape)
    optimizer = reference_model.AdamW(weights, case.BETAS, case.EPS, case.DECAY, case.CLIP)
    groups = case.batches()
    losses = [loss for leg in LEGS for loss in json.loads((folder / f"{leg}.json").read_text())]
    assert len(losses) == 2 * len(LEGS)
    for group, count, found in zip(groups, case.normalizer(groups), losses):
        value = sum(reference_model.loss(weights, shape, b.tensors(), count) for b in group)
        optimizer.step(reference_model.gradients(weights, value), case.LR)
        assert found == pytest.approx(value.item(), rel=2e-6)
    final = whole(folder, LEGS[-1], "saved")
    for name, w in weights.items():
        assert float((final[f"weight/{name}"].double() - w).norm() / w.norm()) < 1e-5, name
    for kind, moment in (("exp_avg", optimizer.m), ("exp_avg_sq", optimizer.v)):
        for name, truth in moment.items():
            assert float((final[f"{kind}/{name}"].double() - truth).norm() / truth.norm()) < 1e-4, (kind, name)
