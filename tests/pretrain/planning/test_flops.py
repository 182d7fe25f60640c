"""FLOPs: what torch counts of the real model, and what papers print."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parallel.engine_deepspeed import import_deepspeed
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.shape import ModelShape, parameter_counts
from pretrain import objective
from pretrain.config import ModelConfig, ObjectiveConfig
from pretrain.flops import CONVENTIONS, flops_per_token, flops_per_token_in, recomputed_flops_per_token
from pretrain.model import DiffusionTransformer, build_chunks, model_shape
from pretrain.planning.case import masked_fraction

LLADA_8B = ModelShape(32, 4096, 32, 32, 12288, 126464)
SHAPES = {
    "plain": ModelConfig(2, 32, 4, 4, 48, 256),
    "grouped queries": ModelConfig(3, 48, 6, 2, 80, 128),
    "one key head, wide": ModelConfig(1, 64, 4, 1, 200, 384),
}
SAMPLES = 2
NONE, SELECTIVE, FULL = (Layout("fsdp2", activation_checkpointing=mode) for mode in ("none", "selective", "full"))


def counted(config: ModelConfig, length: int, masked: int, layout: Layout = NONE, backend=SDPBackend.MATH) -> float:
    """FLOPs that torch sees in one forward and backward of the model with its loss, a token. masked: tokens a sample."""
    (model,) = build_chunks(config, build_mesh(timeout_seconds=60), layout, seed=0)
    assert isinstance(model, DiffusionTransformer)
    ids = torch.arange(SAMPLES * length).view(SAMPLES, length) % config.vocab_size
    where = (torch.arange(length) < masked).expand(SAMPLES, length)
    positions = torch.arange(length).expand(SAMPLES, length)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(backend):
        output = model(ids, positions, None, ids, where, where.float(), torch.tensor(8.0))
        output.loss.backward()
    return counter.get_total_flops() / (SAMPLES * length)


@pytest.mark.parametrize(
    "name, length, masked",
    [
        ("plain", 8, 8),
        ("plain", 24, 0),
        ("grouped queries", 24, 6),
        ("grouped queries", 8, 8),
        ("one key head, wide", 8, 4),
    ],
)
def test_exact_flops_are_to_the_last_one_what_torch_counts_loss_included(name, length, masked):
    config = SHAPES[name]
    assert counted(config, length, masked) == flops_per_token(model_shape(config), length, masked / length)


def test_padding_of_the_vocabulary_is_computed_and_not_counted():
    config = dataclasses.replace(SHAPES["plain"], vocab_size=200)  # 256 rows
    more = counted(config, 8, 8) - flops_per_token(model_shape(config), 8)
    assert more == 6 * 56 * config.hidden_size


@pytest.mark.parametrize("name", ["plain", "grouped queries"])
def test_full_checkpointing_does_again_what_the_formula_says(name):
    config, length = SHAPES[name], 24
    shape = model_shape(config)
    again = recomputed_flops_per_token(shape, length, FULL)
    assert again > 0
    assert counted(config, length, 12, FULL) == flops_per_token(shape, length, 0.5) + again


def test_selective_checkpointing_does_again_all_but_attention_and_the_last_matmul():
    """torch does not count the fused kernel, whose output `selective` keeps: both sides are without attention."""
    config, length = SHAPES["plain"], 24
    shape = model_shape(config)
    without_attention = flops_per_token(shape, 0, 0.5) + recomputed_flops_per_token(shape, 0, SELECTIVE)
    assert counted(config, length, 12, SELECTIVE, SDPBackend.FLASH_ATTENTION) == without_attention
    assert recomputed_flops_per_token(shape, length, SELECTIVE) == recomputed_flops_per_token(shape, 0, SELECTIVE)


def test_with_the_linear_of_zero_3_the_last_matmul_is_done_again_too():
    """tests/pretrain/planning/test_communication.py counts the steps of whole engines."""
    config, length = SHAPES["plain"], 24
    shape = model_shape(config)
    import_deepspeed()
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    with patch.object(torch.nn.functional, "linear", zero3_linear_wrap):
        found = counted(config, length, 12, FULL)
    zero_3 = Layout("deepspeed", 3, activation_checkpointing="full")
    assert found == flops_per_token(shape, length, 0.5) + recomputed_flops_per_token(shape, length, zero_3)
    assert found > counted(config, length, 12, FULL)


def test_nothing_is_recomputed_without_checkpointing():
    assert recomputed_flops_per_token(LLADA_8B, 4096, Layout()) == 0


def test_the_published_conventions_by_hand():
    """H = 8, 2 heads of 4, 1 key head, inner size 12, 3 layers, 100 words, 16 tokens; norms are 2 H a layer and H at the end."""
    shape, length = ModelShape(3, 8, 2, 1, 12, 100), 16
    block = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12  # q, k and v, o; gate, up, down
    norms = 3 * 16 + 8
    by_hand = {
        "exact": 6 * (3 * block + 0.25 * 800) + 3 * 12 * 8 * 16,
        "6n": 6 * (3 * block + norms),
        "6n_total": 6 * (3 * block + norms + 1600),
        "palm": 6 * (3 * block + norms + 800) + 12 * 3 * 2 * 4 * 16,
        "chinchilla": 3 * (2 * 800 + 2 * 800 + 3 * (2 * block + 2 * 8 * 16 + 3 * 2 * 16 + 2 * 8 * 16)),
    }
    assert {name: flops_per_token_in(name, shape, length, 0.25) for name in CONVENTIONS} == by_hand


def test_an_unknown_convention_is_refused_by_name():
    with pytest.raises(ValueError, match="'7n'.*exact, 6n, 6n_total, palm, chinchilla"):
        flops_per_token_in("7n", LLADA_8B, 4096)


def test_lladas_hours_are_its_tokens_a_second_and_its_mfu():
    """0.13 M H800 hours for 2.3 T tokens (Nie et al., arXiv 2502.09992) at 989 TFLOP/s, the head for every token; by 6 N 23.9%."""
    rate = 2.3e12 / (0.13e6 * 3600)
    assert rate == pytest.approx(4915, rel=0.01)
    assert rate * flops_per_token(LLADA_8B, 4096) / 989e12 == pytest.approx(0.256, rel=0.01)
    assert rate * flops_per_token_in("6n_total", LLADA_8B, 4096) / 989e12 == pytest.approx(0.239, rel=0.01)
    assert parameter_counts(LLADA_8B)["total"] == 8_015_581_184


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kind": "bert"},
        {"kind": "block"},
        {"schedule": "cosine"},
        {"schedule": "polynomial", "power": 3.0},
        {"mask_ratio": (0.3, 0.8)},
    ],
)
def test_the_expected_masked_fraction_is_the_mean_over_noise_levels_of_trainings_own_schedule(changes):
    settings = ObjectiveConfig(**changes)
    schedule = objective.schedule(settings)
    levels = torch.linspace(0, 1, 20001, dtype=torch.float64).tolist()
    mean = sum(schedule.probability(t) for t in levels) / len(levels)
    assert masked_fraction(settings) == pytest.approx(mean, abs=2e-4)
    if not changes:
        assert masked_fraction(settings) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("kind", ["autoregressive", "uniform", "flow"])
def test_objectives_without_masks_count_every_token(kind):
    assert masked_fraction(ObjectiveConfig(kind=kind)) == 1.0
