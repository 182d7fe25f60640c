"""The FSDP2 engine, beyond the parity matrix: traffic, float32 sums, skipped steps, the norm, uneven shards, compiled blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.engine import AdamWOptions
from parallel.engine_fsdp2 import Fsdp2Engine
from parallel.grad_norm import clip_
from parallel.initialise import rows
from parallel.layout import SCHEDULES, Layout
from parallel.mesh import single_process_mesh
from parallel.shape import parameter_table
from pretrain.model import model_shape
from tests import reference_model
from tests.distributed import fsdp2_worker as worker
from tests.distributed import matrix_case as case
from tests.distributed.launch import run

RANKS = 4
CHECKS = (
    "norms",
    "traffic",
    "float32_sums",
    "skipped_steps",
    "forwards_after_writes",
    "dropped_weights",
    "uneven_shards",
    "compiled_blocks",
)
pytestmark = [pytest.mark.parity, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    run("tests.distributed.fsdp2_worker", [str(folder), *CHECKS], RANKS, timeout=500)
    return folder


def found(folder: Path, check: str) -> list[dict[str, Any]]:
    """What each rank found."""
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob(f"{check}-*.pt"))]


def assembled(held: list[dict[str, list]], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Full tensors from the boxes of all ranks; nan where nobody holds a value."""
    full = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name, shape in shapes.items()}
    for one in held:
        for name, parts in one.items():
            for offset, values in parts:
                full[name][tuple(slice(o, o + size) for o, size in zip(offset, values.shape))] = values.double()
    return full


def off(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_gathers_once_and_reduces_once_in_float32_whatever_the_number_of_microbatches(folder, schedule):
    for one in found(folder, "traffic"):
        few, many = one[f"{schedule} x2"], one[f"{schedule} x4"]
        elements = sum(few["sizes"].values())
        assert few["calls"] == many["calls"]
        assert few["bytes"] == {"allgather": 4 * elements, "reduce_scatter": 4 * elements}
        assert many["bytes"] == {"allgather": 2 * elements, "reduce_scatter": 4 * elements}


def test_without_a_pipeline_only_blocks_are_gathered_again_for_the_backward(folder):
    for one in found(folder, "traffic"):
        for name, microbatches, width in (("none x2", 2, 4), ("none x4", 4, 2)):
            sizes = one[name]["sizes"]
            blocks = sum(size for key, size in sizes.items() if key.startswith("blocks."))
            elements = sum(sizes.values())
            assert one[name]["bytes"] == {
                "allgather": microbatches * width * (elements + blocks),
                "reduce_scatter": microbatches * 4 * elements,
            }


@pytest.mark.parametrize("layout", ["hybrid", "1f1b", "interleaved_zb", "zbv"])
def test_bf16_gradients_of_microbatches_and_ranks_add_up_in_float32(folder, layout):
    sum_error, bf16_error, size = 0.0, 0.0, 0.0
    for one in found(folder, "float32_sums"):
        for name, parts in one[layout]["together"].items():
            for i, (_, values) in enumerate(parts):
                terms = [alone[name][i][1] for alone in one[layout]["alone"]]
                exact = torch.stack(terms).double().sum(0)
                in_bf16 = torch.zeros_like(values, dtype=torch.bfloat16)
                for term in terms:
                    in_bf16 += term.bfloat16()
                sum_error += float((values.double() - exact).square().sum())
                bf16_error += float((in_bf16.double() - exact).square().sum())
                size += float(exact.square().sum())
    assert math.sqrt(sum_error / size) < 1e-6
    assert math.sqrt(bf16_error / size) > 1e-3  # so the bound above tells one from the other


@pytest.mark.parametrize("layout", ["hybrid", "1f1b", "interleaved_zb", "zbv"])
def test_under_bf16_loss_weights_normalizer_and_rotary_angles_are_not_rounded(folder, layout):
    for one in (rank[layout] for rank in found(folder, "float32_sums")):
        assert one["angles"] == ["torch.float32"]
        for loss, ce, weight in zip(one["losses"], one["ce"], one["masked weight"], strict=True):
            assert loss.dtype == ce.dtype == torch.float32
            assert loss.item() == pytest.approx(
                float((ce.double() * weight.double()).sum()) / worker.NORMALIZER, rel=1e-6
            )


@pytest.mark.parametrize("layout", ["data parallel", "hybrid", "pipeline", "zero bubble", "tensor"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_everywhere_and_changes_nothing(folder, layout):
    ranks = [one[layout] for one in found(folder, "skipped_steps")]
    for one in ranks:
        assert one["applied"] == [True, False, True]
        assert one["unchanged"]
        assert one["moved"]  # by the step after it
    assert len({one["norm"] for one in ranks}) == 1
    assert math.isfinite(ranks[0]["norm"])


@pytest.mark.parametrize("layout", ["data parallel", "pipeline", "bf16"])
def test_forwards_and_steps_after_a_forward_use_the_weights_written_last(folder, layout):
    for one in (rank[layout] for rank in found(folder, "forwards_after_writes")):
        first, doubled, restored = one["losses"]
        assert first == restored
        assert abs(doubled - first) > 0.1 * first
        assert one["norm"] == one["norm of a fresh engine"]
        assert set(one["steps"]) == {6.0}


def test_dropping_weights_after_the_forward_would_lose_gradients_of_a_split_backward(folder):
    lost = 0
    for one in found(folder, "dropped_weights"):
        for name, parts in one["kept"].items():
            pairs = zip(parts, one["dropped"][name], strict=True)
            lost += any(bool(kept.any()) and not torch.equal(kept, dropped) for (_, kept), (_, dropped) in pairs)
    assert lost > 0
    assert Fsdp2Engine.reshard_with_pipeline is False


@pytest.mark.parametrize("layout", ["shards", "replicas of one shard"])
def test_matrices_whose_rows_do_not_divide_give_the_gradients_and_weights_of_one_process_in_float64(folder, layout):
    ranks = [one[layout] for one in found(folder, "uneven_shards")]
    shape = model_shape(replace(case.MODEL, ffn_hidden_size=50))
    weights = {
        name: rows(name, spec, case.SEED, 0, spec.shape[0]).double().requires_grad_()
        for name, spec in parameter_table(shape).items()
    }
    batches = [worker.microbatches(1, seed=rank, samples=2)[0] for rank in range(RANKS)]
    losses = [reference_model.loss(weights, shape, batch, worker.NORMALIZER) for batch in batches]
    gradients = reference_model.gradients(weights, torch.stack(losses).sum())
    norm = reference_model.AdamW(weights, case.BETAS, case.EPS, case.DECAY, case.CLIP).step(gradients, case.LR)
    assert norm > case.CLIP
    shapes = {f"gradient/{name}": tuple(w.shape) for name, w in weights.items()}
    for name, value in assembled([one["gradients"] for one in ranks], shapes).items():
        assert off(value, gradients[name.removeprefix("gradient/")]) < 1e-5, name
    shapes = {
        f"{kind}/{name}": tuple(w.shape) for kind in ("weight", "exp_avg", "exp_avg_sq") for name, w in weights.items()
    }
    for name, value in assembled([one["state"] for one in ranks], shapes).items():
        assert not value.isnan().any(), f"{name} is not wholly held"
        if name.startswith("weight/"):
            assert off(value, weights[name.removeprefix("weight/")].detach()) < 1e-5, name
    for one in ranks:
        assert one["applied"]
        assert one["norm"] == pytest.approx(norm, rel=1e-6)


def check_compiled(ranks: list[dict[str, Any]]) -> None:
    for one in ranks:
        plain, compiled = one["plain"], one["compiled"]
        assert plain["graphs"] == 0
        assert compiled["graphs"] > 0
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        for name, parts in plain["gradients"].items():
            for (_, expected), (_, value) in zip(parts, compiled["gradients"][name], strict=True):
                assert off(value, expected.double()) < 1e-5, name


def test_compiled_blocks_compute_what_plain_ones_do_on_shards_of_four_ranks(folder):
    check_compiled(found(folder, "compiled_blocks"))


def test_compiled_blocks_compute_what_plain_ones_do_on_one_rank(tmp_path):
    run("tests.distributed.fsdp2_worker", [str(tmp_path), "compiled_blocks"], 1)
    check_compiled(found(tmp_path, "compiled_blocks"))


@pytest.mark.parametrize("layout", ["dp4", "dp4 replicated", "dp4 shard 2", "dp2 tp2", "pp2 tp2", "pp2 dp2"])
def test_the_global_norm_counts_every_element_once_and_has_the_same_bits_on_all_ranks(folder, layout):
    # 1e25: the squares overflow in float32.
    truth = math.sqrt(sum(float((g * 1e25).double().square().sum()) for g in worker.whole_gradients().values()))
    ranks = [one[layout] for one in found(folder, "norms")]
    assert len(ranks) == RANKS
    assert {one["norm"].item() for one in ranks} == {ranks[0]["norm"].item()}
    assert ranks[0]["norm"].item() == pytest.approx(truth, rel=1e-9)
    assert all(one["spoiled"].isnan() for one in ranks)
    assert all(one["none"] == 0 for one in ranks)


@pytest.mark.parametrize("norm, limit, expected", [(4.0, 1.0, 0.5), (4.0, 0.0, 2.0), (1.0, 1.0, 2.0), (0.5, 1.0, 2.0)])
def test_clipping_scales_to_the_limit_and_only_what_is_above_it(norm, limit, expected):
    gradients = [torch.full((3,), 2.0), torch.full((2, 2), 2.0)]
    clip_(gradients, norm, limit)
    assert all(bool((g == expected).all()) for g in gradients)


def test_apex_adam_is_refused_by_name():
    with pytest.raises(ValueError, match="optimizer.impl apex .*optimizer.impl=torch"):
        Fsdp2Engine(
            [],
            model_shape(case.MODEL),
            single_process_mesh(),
            Layout(engine="fsdp2"),
            optimizer=AdamWOptions("apex"),
            micro_batch_size=1,
            accumulation=1,
            sequence_length=case.LENGTH,
            grad_clip=1.0,
            bf16=False,
        )
