"""Twenty clipped steps end where one float64 process ends: losses, norms, weights and Adam moments; NaN changes nothing.

The parity matrix takes three steps at every kind of layout; here a few go further, one of them compiled.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from parallel import checkpoint
from parallel.boxes import Boxes
from parallel.shape import parameter_table
from pretrain.model import model_shape
from tests import reference_model
from tests.distributed import training_case as case
from tests.distributed.launch import run

# name: (ranks, tensor-parallel ranks, flags)
pytestmark = pytest.mark.parity  # the everyday cells of the parity matrix take the first steps

LAYOUTS = {
    "dp2 tp2, tied embeddings": (4, 2, ("tied", "checkpointing")),
    "dp1 compiled": (1, 1, ("compile",)),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


@pytest.fixture(scope="module")
def reference() -> dict[bool, dict]:
    """The float64 run, untied and tied: losses, norms, first gradients, final state."""
    results = {}
    for tied in (False, True):
        shape = model_shape(replace(case.MODEL, tie_embeddings=tied))
        weights = case.full_weights(shape)
        groups = case.batches()
        optimizer = reference_model.AdamW(weights, case.BETAS, case.EPS, case.DECAY, case.CLIP)
        losses, norms, first = [], [], None
        for group, count in zip(groups, case.normalizer(groups)):
            value = sum(reference_model.loss(weights, shape, b.tensors(), count) for b in group)
            grads = reference_model.gradients(weights, value)
            first = first or grads
            losses.append(value.item())
            norms.append(optimizer.step(grads, case.LR))
        state = {f"weight/{k}": w.detach() for k, w in weights.items()}
        state |= {f"exp_avg/{k}": m for k, m in optimizer.m.items()} | {
            f"exp_avg_sq/{k}": v for k, v in optimizer.v.items()
        }
        results[tied] = {"losses": losses, "norms": norms, "first": first, "state": state, "shape": shape}
    return results


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory, reference) -> dict:
    world, tensor, flags = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("parity")
    run("tests.distributed.training_worker", [str(tensor), str(folder), *flags], world)
    return {
        "folder": folder,
        "tp": tensor,
        "dp": world // tensor,
        "truth": reference["tied" in flags],
        **json.loads((folder / "steps.json").read_text()),
    }


def test_loss_and_gradient_norm_of_every_step_equal_one_process_in_float64(layout):
    assert len(layout["steps"]) == case.STEPS
    for step, loss, norm in zip(layout["steps"], layout["truth"]["losses"], layout["truth"]["norms"]):
        assert step["applied"]
        assert step["loss"] == pytest.approx(loss, rel=1e-6)
        assert step["norm"] == pytest.approx(norm, rel=2e-5)


def test_every_gradient_equals_the_dense_one(layout):
    """Summed over data-parallel ranks and joined over tensor-parallel ones, before any engine touches them."""
    table = parameter_table(layout["truth"]["shape"])
    tp, dp = layout["tp"], layout["dp"]
    grads = [torch.load(layout["folder"] / f"grads-{r}.pt", weights_only=True) for r in range(tp * dp)]
    assert set(grads[0]) == set(table)
    for name, spec in table.items():
        shares = [sum(grads[d * tp + t][name].double() for d in range(dp)) for t in range(tp)]
        if spec.tp_dim is None:
            assert all(relative(share, layout["truth"]["first"][name]) < 1e-5 for share in shares), name
            continue
        whole = torch.cat(shares, spec.tp_dim)
        assert not whole[spec.shape[0] :].any(), f"{name}: rows of the vocabulary's padding got a gradient"
        assert relative(whole[: spec.shape[0]], layout["truth"]["first"][name]) < 1e-5, name


def test_weights_and_both_moments_after_twenty_steps_equal_one_process_in_float64(layout):
    state = {name: torch.full(tuple(t.shape), float("nan")) for name, t in layout["truth"]["state"].items()}
    boxes = {name: Boxes(t.shape, [((0,) * t.dim(), t)]) for name, t in state.items()}
    checkpoint.load(checkpoint.latest(layout["folder"] / "checkpoints"), boxes)
    for name, truth in layout["truth"]["state"].items():
        assert relative(state[name], truth) < 1e-4, name


def test_a_gradient_that_is_not_finite_changes_nothing_and_the_next_step_works(layout):
    assert layout["poison_skipped"]
    assert layout["recovered"]
