"""The memory estimate against tensors that exist, against torch's own pipeline schedules, and against the sizes of known models."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining import schedules

from parallel.layout import Layout
from parallel.layout_rules import Case
from parallel.legality import first_broken
from parallel.mesh import build_mesh
from parallel.shape import ModelShape, parameter_counts
from pretrain.config import ModelConfig
from pretrain.memory import GIB, cure, held_by, memory_of_rank, memory_per_gpu
from pretrain.memory_activations import chunk_saves, most_in_flight
from pretrain.model import build_chunks, model_shape
from tests.distributed.launch import run
from tests.pretrain.live_storage import StorageLog
from tests.pretrain.memory_worker import LAYOUTS

LLADA_8B = ModelShape(32, 4096, 32, 32, 12288, 126464)
LLADA_1B = ModelShape(22, 2048, 32, 4, 5634, 126464)


def case_8b(**changes) -> Case:
    layout = Layout(**{"activation_checkpointing": "full", **changes.pop("layout", {})})
    return dataclasses.replace(Case(LLADA_8B, 64, layout, 1280, 4, 4096, bf16=True), **changes)


@pytest.mark.parametrize("shape", [LLADA_1B, LLADA_8B], ids=["1b", "8b"])
def test_one_rank_holds_every_parameter_and_the_padding_of_the_vocabulary(shape):
    held = held_by(Case(shape, 1, Layout(), 4, 4, 4096), 0)
    assert held.total == parameter_counts(shape)["total"]  # 126464 is whole tiles: nothing is padded
    odd = dataclasses.replace(shape, vocab_size=126337)
    padding = 2 * (odd.padded_vocab(1) - 126337) * shape.hidden_size
    assert held_by(Case(odd, 1, Layout(), 4, 4, 4096), 0).total == parameter_counts(odd)["total"] + padding


@pytest.mark.parametrize("schedule, ranks", [("1f1b", 4), ("interleaved", 4), ("zbv", 2)])
def test_pipeline_ranks_together_hold_every_parameter_once(schedule, ranks):
    case = case_8b(layout={"engine": "fsdp2", "pipeline": ranks, "schedule": schedule, "tensor": 2}, world=64)
    norms = (2 * LLADA_8B.num_layers + 1) * LLADA_8B.hidden_size  # on both tensor-parallel ranks
    total = sum(held_by(case, rank).total for rank in range(ranks))
    assert 2 * total == parameter_counts(LLADA_8B)["total"] + norms


def test_the_states_of_llada_8b_are_16_to_18_bytes_a_parameter_over_the_ranks_of_zero_3():
    parameters = parameter_counts(LLADA_8B)["total"]
    deepspeed = sum(memory_per_gpu(case_8b()).states.values())
    fsdp2 = sum(memory_per_gpu(case_8b(layout={"engine": "fsdp2"})).states.values())
    assert deepspeed == pytest.approx(18 * parameters / 64, rel=1e-3)
    assert fsdp2 == pytest.approx(16 * parameters / 64, rel=1e-3)


@pytest.fixture(scope="module")
def measured_states(tmp_path_factory) -> dict[str, list[int]]:
    folder = tmp_path_factory.mktemp("memory")
    run("tests.pretrain.memory_worker", [str(folder)], 2)
    return json.loads((folder / "states.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parity
def test_model_states_are_what_an_engine_holds_between_backward_and_step(measured_states, name):
    measured, estimated = measured_states[name]
    assert estimated == pytest.approx(measured, rel=0.05)


CHUNK = ModelConfig(
    num_layers=4, hidden_size=128, num_heads=4, num_kv_heads=4, ffn_hidden_size=320, vocab_size=512, init_std=0.02
)


def kept_of_a_forward(config: ModelConfig, layout: Layout, micro: int, length: int, bf16: bool) -> int:
    """Bytes that exist because a forward with the loss has run."""
    (chunk,) = build_chunks(config, build_mesh(timeout_seconds=60), layout, seed=1)
    chunk = chunk.to(torch.bfloat16 if bf16 else torch.float32)
    ids = torch.arange(micro * length).view(micro, length) % config.vocab_size
    masked, weight = ids % 2 == 0, torch.ones(micro, length)
    positions = torch.arange(length, dtype=torch.int32).expand(micro, length)
    with StorageLog() as log:
        output = chunk(ids, positions, None, ids, masked, weight, torch.tensor(8.0))
    found = log.alive(without=chunk.parameters())
    output.loss.backward()
    return found


class FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps what the fused GPU kernel keeps: its input, the gain, and one float32 a row. On CPUs torch has no such
    kernel and keeps every step of the formula."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None  # only what it keeps is of interest


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_activations_are_what_a_forward_leaves_behind(mode, bf16, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda x, _, weight, eps: FusedNorm.apply(x, weight, eps))
    layout, micro, length = Layout(activation_checkpointing=mode), 2, 256
    case = Case(model_shape(CHUNK), 1, layout, micro, micro, length, bf16)
    measured = kept_of_a_forward(CHUNK, layout, micro, length, bf16)
    assert chunk_saves(case, 0) == pytest.approx(measured, rel=0.15)


def torch_schedule(case: Case, rank: int) -> list:
    """The order in which torch.distributed.pipelining runs microbatches on one rank."""
    layout, ranks = case.layout, case.layout.pipeline
    kind = {
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "interleaved_zb": schedules.ScheduleInterleavedZeroBubble,
        "zbv": schedules.ScheduleZBVZeroBubble,
    }[layout.schedule]
    # What the constructors of schedules read of a stage.
    stages = [
        SimpleNamespace(
            stage_index=chunk, num_stages=layout.chunks, group_rank=rank, group_size=ranks, has_backward=True,
            is_first=chunk == 0, is_last=chunk == layout.chunks - 1, device=torch.device("cpu"), submod=torch.nn.Module(),
            stage_index_to_group_rank={c: layout.rank_of(c) for c in range(layout.chunks)},
        )
        for chunk in layout.chunks_of(rank)
    ]  # fmt: skip
    schedule = kind(stages, case.accumulation, loss_fn=lambda *_: None)
    return [action for action in schedule.pipeline_order[rank] if action is not None]


def most_by_torch(case: Case, rank: int, saves: dict[int, int]) -> int:
    """Peak of what chunks keep, freed where the last part of a backward (the weights' gradients) is done."""
    held = most = 0
    for action in torch_schedule(case, rank):
        kind = action.computation_type.name
        if action.microbatch_index >= case.accumulation:
            continue  # zbv fills up short batches, and drops what it filled in
        held += saves[action.stage_index] * ({"FORWARD": 1, "FULL_BACKWARD": -1, "BACKWARD_WEIGHT": -1}.get(kind, 0))
        most = max(most, held)
    return most


@pytest.mark.parametrize("accumulation", [4, 8, 16, 32])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("schedule", ["interleaved", "interleaved_zb", "zbv"])
def test_microbatches_in_flight_are_at_most_a_little_more_than_torchs_schedules_hold(schedule, ranks, accumulation):
    layout = Layout("fsdp2", pipeline=ranks, schedule=schedule)
    case = Case(LLADA_8B, ranks, layout, accumulation, 1, 4096, bf16=True)
    if first_broken(case):
        pytest.skip("not a legal layout")
    for rank in range(ranks):
        saves = {chunk: chunk_saves(case, chunk) for chunk in layout.chunks_of(rank)}
        true = most_by_torch(case, rank, saves)
        assert true <= most_in_flight(case, rank, saves) <= 1.15 * true + max(saves.values())


def test_gpipe_holds_all_microbatches_and_1f1b_as_many_as_stages_are_ahead():
    saves = dict.fromkeys(range(4), 1)
    case = case_8b(layout={"pipeline": 4, "schedule": "gpipe"}, world=4, global_batch=64)
    assert [most_in_flight(case, rank, saves) for rank in range(4)] == [16] * 4
    case = case_8b(layout={"pipeline": 4, "schedule": "1f1b"}, world=4, global_batch=64)
    assert [most_in_flight(case, rank, saves) for rank in range(4)] == [4, 3, 2, 1]


def test_every_lever_that_should_save_memory_does():
    base = case_8b(layout={"activation_checkpointing": "none"})
    total = memory_per_gpu(base).total
    levers = [
        {"parallel.activation_checkpointing": "selective"},
        {"parallel.activation_checkpointing": "full"},
        {"train.micro_batch_size": 2},
        {"parallel.tensor": 2},
    ]
    for change in levers:
        assert memory_per_gpu(base.with_change(change)).total < total, change
    for stage in (2, 1):
        assert memory_per_gpu(base.with_change({"parallel.zero_stage": stage})).total > total
    alone = dataclasses.replace(base, world=8, global_batch=1280)
    assert memory_per_gpu(alone).total > total


def test_parts_add_up_and_the_worst_pipeline_rank_is_named():
    case = case_8b(layout={"pipeline": 4}, world=32, global_batch=1024)
    memory = memory_per_gpu(case)
    assert sum(memory.parts.values()) == memory.total
    assert memory.total == max(memory_of_rank(case, rank).total for rank in range(4))


def test_the_cure_is_legal_fits_and_none_is_given_where_nothing_does():
    case = case_8b(layout={"activation_checkpointing": "none"}, micro_batch=8, global_batch=1024)
    limit = 60 * GIB
    assert memory_per_gpu(case).total > limit
    change = cure(case, limit)
    assert change
    cured = case.with_change(change)
    assert first_broken(cured) is None and memory_per_gpu(cured).total <= limit
    assert cure(case, 3 * GIB) is None
