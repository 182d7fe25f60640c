"""Causal, look-ahead and block visibility reach every tensor-parallel rank, stage and engine: all equals one float64 process."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from parallel.attention import rotary_angles
from parallel.initialise import initialise
from parallel.mesh import build_mesh
from parallel.shape import parameter_table
from pretrain.model import DiffusionTransformer, model_shape
from tests import visibility_cases
from tests.distributed import visibility_case as case
from tests.distributed.launch import run

# The everyday cells of the parity matrix have causal and block rows too; here every way of it, without an engine as well.
pytestmark = pytest.mark.parity

CELLS: dict[str, dict] = {
    "tp2": {"tensor": 2},
    "sp2, full": {"tensor": 2, "sequence_parallel": True, "activation_checkpointing": "full"},
    "sp2, selective": {"tensor": 2, "sequence_parallel": True, "activation_checkpointing": "selective"},
    "1f1b": {"pipeline": 2, "schedule": "1f1b"},
    "gpipe": {"pipeline": 2, "schedule": "gpipe", "activation_checkpointing": "full"},
    "fsdp2 dp2 compiled": {"engine": "fsdp2", "compiled": True},
    "fsdp2 pp2": {"engine": "fsdp2", "pipeline": 2, "schedule": "1f1b"},
    "deepspeed dp2": {"engine": "deepspeed", "zero_stage": 3},
    "deepspeed pp2": {"engine": "deepspeed", "zero_stage": 3, "pipeline": 2, "schedule": "1f1b"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("visibility")
    (folder / "cells.json").write_text(json.dumps(CELLS))
    run("tests.distributed.visibility_worker", [str(folder), str(folder / "cells.json")], 2)
    return {name: [torch.load(folder / f"{name}-{r}.pt", weights_only=True) for r in range(2)] for name in CELLS}


def solve(seen_by) -> dict:
    """Token losses and gradients of one process in float64, every block given an enumerated mask: kind -> measures."""
    mesh = build_mesh()
    model = DiffusionTransformer(model_shape(case.MODEL), mesh)
    initialise(model, model.shape, mesh, case.SEED)
    model.double()
    found = {}
    for kind in case.KINDS:
        model.zero_grad()
        losses = []
        for m in case.microbatches(kind):
            x = model.embedding(m["noisy_ids"])
            cos, sin = rotary_angles(m["position_ids"], model.shape.head_dim, model.shape.rope_theta)
            mask = seen_by(m)[:, None]
            for block in model.blocks.values():
                x = block(x, cos.double(), sin.double(), mask)
            z = model.head(model.final_norm(x))
            ce = F.cross_entropy(z.transpose(1, 2), m["target_ids"], reduction="none") * m["masked"]
            ((ce * m["weight"].double()).sum() / case.NORMALIZER).backward()
            losses.append(ce.detach())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
        found[kind] = {"ce": torch.stack(losses), "gradients": gradients, "norm": norm}
    return found


@pytest.fixture(scope="module")
def truth() -> dict:
    return solve(lambda m: visibility_cases.seen(m["visibility"], m["document_ids"]))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def test_the_case_tells_visibilities_apart(truth):
    everything = solve(lambda m: visibility_cases.seen(None, m["document_ids"]))
    for kind in case.KINDS:
        for i in range(case.MICROBATCHES):
            assert relative(everything[kind]["ce"][i], truth[kind]["ce"][i]) > 2e-5  # 20 times the bound below


@pytest.mark.parametrize("kind", case.KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_token_losses_of_a_step_and_of_a_forward_alone_equal_the_dense_ones_on_every_rank(cell, kind, results, truth):
    dp = 1 + max(r["place"][1] for r in results[cell])
    for result in results[cell]:
        share = truth[kind]["ce"].chunk(dp)[result["place"][1]]
        assert relative(result[kind]["ce"], share) < 1e-6
        assert relative(result[kind]["alone"], share[-1]) < 1e-6


@pytest.mark.parametrize("kind", case.KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_equal_the_dense_ones(cell, kind, results, truth):
    dense = truth[kind]
    if "engine" in CELLS[cell]:
        assert all(r[kind]["norm"] == pytest.approx(dense["norm"], rel=1e-6) for r in results[cell])
        return
    ranks = {tuple(r["place"]): r[kind]["gradients"] for r in results[cell]}
    for name, spec in parameter_table(model_shape(case.MODEL)).items():
        shares = [held[name] for _, held in sorted(ranks.items()) if name in held]
        assert len(shares) == CELLS[cell].get("tensor", 1)
        want = dense["gradients"][name][: spec.shape[0]]
        if spec.tp_dim is None:
            assert all(relative(share, want) < 1e-5 for share in shares), name
        else:
            assert relative(torch.cat(shares, spec.tp_dim)[: spec.shape[0]], want) < 1e-5, name
