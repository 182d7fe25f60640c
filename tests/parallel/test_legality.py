"""Laws of the legality table: every rule is hit, every way out works, nothing raises, torch's own checks agree."""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.layout import SCHEDULES, Layout
from parallel.layout_rules import ENGINES, RECOMPUTE, RULES, Case
from parallel.legality import check_layout, first_broken, judge
from parallel.shape import ModelShape

SHAPE = ModelShape(4, 64, 8, 8, 96, 300)
LLADA_1B = ModelShape(22, 2048, 32, 4, 5634, 126464)
CASE = Case(SHAPE, 8, Layout(), 64, 2, 32)


def case(shape: dict | None = None, layout: dict | None = None, **changes) -> Case:
    """CASE with fields of the shape, the layout and itself replaced."""
    return replace(CASE, shape=replace(SHAPE, **(shape or {})), layout=replace(Layout(), **(layout or {})), **changes)


# rule name -> (illegal case, what the reason names, the nearest alternative)
EXAMPLES: dict[str, tuple[Case, tuple[str, ...], str]] = {
    "model.num_layers is positive": (case({"num_layers": 0}), ("model.num_layers 0",), "model.num_layers 1"),
    "model.hidden_size is positive": (case({"hidden_size": 0}), ("hidden_size 0",), "model.hidden_size 1"),
    "model.num_heads is positive": (case({"num_heads": 0}), ("num_heads 0",), "model.num_heads 1"),
    "model.num_kv_heads is positive": (case({"num_kv_heads": -1}), ("num_kv_heads -1",), "model.num_kv_heads 1"),
    "model.ffn_hidden_size is positive": (case({"ffn_hidden_size": 0}), ("ffn_hid",), "model.ffn_hidden_size 1"),
    "model.vocab_size is positive": (case({"vocab_size": 0}), ("vocab_size 0",), "model.vocab_size 1"),
    "data.sequence_length is positive": (case(sequence=0), ("sequence_length 0",), "data.sequence_length 1"),
    "parallel.tensor is positive": (case(layout={"tensor": 0}), ("parallel.tensor 0",), "parallel.tensor 1"),
    "parallel.pipeline is positive": (case(layout={"pipeline": -2}), ("pipeline -2",), "parallel.pipeline 1"),
    "train.global_batch_size is positive": (case(global_batch=0), ("batch_size 0",), "train.global_batch_size 1"),
    "train.micro_batch_size is positive": (case(micro_batch=0), ("batch_size 0",), "train.micro_batch_size 1"),
    "parallel.engine is known": (case(layout={"engine": "megatron"}), ("megatron",), "parallel.engine deepspeed"),
    "parallel.zero_stage is known": (case(layout={"zero_stage": 4}), ("zero_stage 4",), "parallel.zero_stage 3"),
    "parallel.schedule is known": (case(layout={"schedule": "dapple"}), ("dapple",), "parallel.schedule gpipe"),
    "parallel.activation_checkpointing is known": (
        case(layout={"activation_checkpointing": "some"}),
        ("some", "selective"),
        "parallel.activation_checkpointing none",
    ),
    "heads divide the hidden size": (case({"num_heads": 6}), ("hidden_size 64", "num_heads 6"), "model.num_heads 8"),
    "heads are even": (case({"hidden_size": 72}), ("even head size", "9"), "model.hidden_size 80"),
    "heads share key/value heads evenly": (
        case({"num_kv_heads": 3}),
        ("num_heads 8", "num_kv_heads 3"),
        "model.num_kv_heads 2",
    ),
    "model.num_heads splits over tensor": (
        case(layout={"tensor": 3}, world=3, global_batch=6),
        ("num_heads 8", "tensor 3"),
        "parallel.tensor 1",
    ),
    "model.num_kv_heads splits over tensor": (
        case({"num_kv_heads": 4}, {"tensor": 8}),
        ("num_kv_heads 4", "tensor 8"),
        "parallel.tensor 4",
    ),
    "model.ffn_hidden_size splits over tensor": (
        replace(CASE, shape=LLADA_1B, layout=Layout(tensor=4)),
        ("ffn_hidden_size 5634", "parallel.tensor 4"),
        "parallel.tensor 2",
    ),
    "sequence parallelism needs tensor parallelism": (
        case(layout={"sequence_parallel": True}),
        ("sequence_parallel true", "tensor 1"),
        "parallel.sequence_parallel false",
    ),
    "the sequence splits over tensor": (
        case(layout={"sequence_parallel": True, "tensor": 4}, sequence=30),
        ("sequence_length 30", "tensor 4"),
        "parallel.tensor 2",
    ),
    "tied embeddings stay on one stage": (
        case({"tie_embeddings": True}, {"pipeline": 2}),
        ("tie_embeddings true", "pipeline 2"),
        "parallel.pipeline 1",
    ),
    "every chunk has a layer": (
        case(layout={"pipeline": 4, "schedule": "interleaved"}),
        ("num_layers 4", "pipeline 4", "8 chunks"),
        "parallel.schedule 1f1b",
    ),
    "layers_per_stage has one entry a chunk": (
        case(layout={"pipeline": 2, "layers_per_stage": (2, 1, 1)}),
        ("[2, 1, 1]", "2 chunks"),
        "parallel.layers_per_stage []",
    ),
    "layers_per_stage entries are positive": (
        case(layout={"pipeline": 2, "layers_per_stage": (4, 0)}),
        ("[4, 0]",),
        "parallel.layers_per_stage []",
    ),
    "layers_per_stage adds up": (
        case(layout={"pipeline": 2, "layers_per_stage": (2, 3)}),
        ("[2, 3]", "num_layers 4"),
        "parallel.layers_per_stage []",
    ),
    "the world divides": (
        case(layout={"tensor": 4}, world=6, global_batch=48),
        ("6 ranks", "tensor 4"),
        "parallel.tensor 2",
    ),
    "shard groups divide the data-parallel ranks": (
        case(layout={"shard_group": 3}),
        ("shard_group 3", "8 data-parallel"),
        "parallel.shard_group 2",
    ),
    "fsdp2 is ZeRO-3": (
        case(layout={"engine": "fsdp2", "zero_stage": 1}),
        ("engine fsdp2", "zero_stage 1"),
        "parallel.zero_stage 3",
    ),
    "ZeRO-0 is fp32": (
        case(layout={"zero_stage": 0}, bf16=True),
        ("zero_stage 0", "precision bf16"),
        "parallel.zero_stage 1",
    ),
    "hybrid sharding is ZeRO-3": (
        case(layout={"zero_stage": 2, "shard_group": 4}),
        ("shard_group 4", "zero_stage 2"),
        "parallel.zero_stage 3",
    ),
    "zero bubble needs fsdp2": (
        case(layout={"pipeline": 2, "schedule": "zbv"}),
        ("engine deepspeed", "schedule zbv", "split in two"),
        "parallel.schedule interleaved",
    ),
    "zero bubble is not compiled": (
        case(layout={"pipeline": 2, "schedule": "zbv", "engine": "fsdp2"}, compile=True),
        ("schedule zbv", "compile true"),
        "train.compile false",
    ),
    "zero bubble recomputes nothing": (
        case(
            layout={
                "pipeline": 2,
                "schedule": "interleaved_zb",
                "engine": "fsdp2",
                "activation_checkpointing": "selective",
            }
        ),
        ("schedule interleaved_zb", "activation_checkpointing selective"),
        "parallel.schedule interleaved",
    ),
    "the batch divides": (
        case(world=3),
        ("global_batch_size 64", "3 data-parallel"),
        "train.global_batch_size 66",
    ),
    "1f1b fills the pipeline": (
        case(layout={"pipeline": 4}, micro_batch=16),
        ("micro_batch_size 16", "2 microbatches", "pipeline 4"),
        "train.micro_batch_size 8",
    ),
    "interleaved rounds are equal": (
        case(layout={"pipeline": 2, "schedule": "interleaved"}, micro_batch=1, global_batch=20),
        ("global_batch_size 20", "5 microbatches"),
        "train.global_batch_size 24",
    ),
}


def test_every_rule_has_a_name_of_its_own_and_an_example():
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert set(names) == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_illegal_layout_is_refused_with_the_keys_and_values_and_the_nearest_legal_alternative(name):
    illegal, words, alternative = EXAMPLES[name]
    found = judge(illegal)
    assert found is not None and found.rule == name
    for word in words:
        assert word in found.reason
    rule = next(rule for rule in RULES if rule.name == name)
    assert all(key in found.reason for key in rule.keys)
    assert found.alternative == alternative


def test_the_base_of_the_examples_is_legal_and_check_layout_says_the_same_as_judge():
    assert judge(CASE) is None
    for illegal, _, _ in EXAMPLES.values():
        found = check_layout(
            illegal.shape,
            illegal.world,
            illegal.layout,
            global_batch_size=illegal.global_batch,
            micro_batch_size=illegal.micro_batch,
            sequence_length=illegal.sequence,
            bf16=illegal.bf16,
            compile=illegal.compile,
        )
        assert found == judge(illegal)


@pytest.mark.parametrize("name, world", [("llada_1b", 64), ("llada_8b", 64), ("quickstart", 1), ("quickstart", 2)])
def test_the_shipped_configs_are_legal(name, world):
    from pretrain.load_config import load_config
    from pretrain.model import model_shape, parallel_layout

    config = load_config(["--config", f"configs/{name}.yaml"])
    found = check_layout(
        model_shape(config.model),
        world,
        parallel_layout(config.parallel),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        bf16=config.train.precision == "bf16",
        compile=config.train.compile,
    )
    assert found is None


def test_every_key_that_a_rule_names_or_changes_is_a_key_of_the_config():
    from pretrain.config import Config
    from pretrain.load_config import to_dict

    sections = to_dict(Config())
    keys = {key for rule in RULES for key in rule.keys}
    keys |= {key for illegal, _, _ in EXAMPLES.values() for key in judge(illegal).change}
    for key in keys:
        section, name = key.split(".")
        assert name in sections[section], key


def test_the_schedule_is_ignored_without_a_pipeline():
    for schedule in SCHEDULES:
        assert judge(case(layout={"schedule": schedule}, micro_batch=8)) is None


SMALL = st.integers(-1, 9)
CASES = st.builds(
    Case,
    shape=st.builds(
        ModelShape,
        num_layers=SMALL,
        hidden_size=st.sampled_from([0, 16, 24, 64, 72, 2048]),
        num_heads=st.sampled_from([0, 1, 2, 3, 4, 8, 32]),
        num_kv_heads=st.sampled_from([0, 1, 2, 3, 4, 8]),
        ffn_hidden_size=st.sampled_from([-3, 48, 96, 5634, 5632]),
        vocab_size=st.sampled_from([0, 150]),
        tie_embeddings=st.booleans(),
    ),
    world=st.integers(1, 24) | st.sampled_from([32, 64, 1000, 1024]),
    layout=st.builds(
        Layout,
        engine=st.sampled_from([*ENGINES, "horovod"]),
        zero_stage=st.integers(-1, 4),
        shard_group=SMALL,
        tensor=SMALL,
        pipeline=SMALL,
        layers_per_stage=st.just(()) | st.lists(SMALL, max_size=5).map(tuple),
        schedule=st.sampled_from([*SCHEDULES, "none"]),
        sequence_parallel=st.booleans(),
        activation_checkpointing=st.sampled_from([*RECOMPUTE, "all"]),
    ),
    global_batch=st.integers(-1, 70) | st.sampled_from([256, 1280]),
    micro_batch=SMALL,
    sequence=st.integers(-1, 40),
    bf16=st.booleans(),
    compile=st.booleans(),
)


@settings(max_examples=1500, deadline=None)
@given(CASES)
def test_any_layout_is_legal_or_has_an_alternative_that_removes_the_reason_and_the_way_out_ends(wanted):
    seen = 0
    while (found := judge(wanted)) is not None:
        rule = next(rule for rule in RULES if rule.name == found.rule)
        assert found.change and set(found.change) != set()
        changed = wanted.with_change(found.change)
        assert all(changed[key] == value for key, value in found.change.items())
        assert not rule.broken(changed), (found, wanted)
        wanted, seen = changed, seen + 1
        assert seen < 40, "following the alternatives goes in circles"


@settings(max_examples=300, deadline=None)
@given(CASES)
def test_the_alternative_is_legal_as_a_whole_when_any_single_proposed_change_is(wanted):
    found = judge(wanted)
    if found is None:
        return
    rule = next(rule for rule in RULES if rule.name == found.rule)
    cures = [c for c in rule.changes(wanted) if first_broken(wanted.with_change(c)) is None]
    assert not cures or found.change == cures[0]


class _Stage:
    """As much of a pipeline stage as torch's schedules look at when they are built."""

    def __init__(self, index: int, chunks: int, ranks: int):
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, chunks, ranks, 0
        self.is_first, self.is_last, self.submod = index == 0, index == chunks - 1, None


def torch_accepts(layout: Layout, microbatches: int) -> bool:
    """Whether torch builds the schedule, with every chunk's forward and both halves of its backward once a microbatch."""
    from parallel.pipeline import SCHEDULE_CLASSES

    stages = [_Stage(chunk, layout.chunks, layout.pipeline) for chunk in layout.chunks_of(0)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            schedule = SCHEDULE_CLASSES[layout.schedule](
                stages if len(stages) > 1 else stages[0], microbatches, loss_fn=lambda output, target: output
            )
    except ValueError:
        return False
    if len(stages) > 1:
        actions = [a for rank in schedule.pipeline_order.values() for a in rank if a is not None]
        found = collections.defaultdict(list)
        for a in actions:
            found[a.computation_type.name].append((a.stage_index, a.microbatch_index))
        whole = sorted(itertools.product(range(layout.chunks), range(microbatches)))
        assert sorted(found["FORWARD"]) == whole
        assert sorted(found["FULL_BACKWARD"] + found["BACKWARD_INPUT"]) == whole
        assert sorted(found["FULL_BACKWARD"] + found["BACKWARD_WEIGHT"]) == whole
    return True


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_microbatches_that_are_legal_are_exactly_those_that_torch_builds_a_complete_schedule_for(schedule):
    for pipeline, microbatches in itertools.product((2, 3, 4), range(1, 14)):
        layout = Layout(engine="fsdp2", pipeline=pipeline, schedule=schedule)
        wanted = case({"num_layers": 8}, world=pipeline, micro_batch=1, global_batch=microbatches)
        found = judge(replace(wanted, layout=layout))
        assert (found is None) == torch_accepts(layout, microbatches), (pipeline, microbatches, found)


def test_legality_needs_neither_torch_nor_a_process_group():
    code = "import sys, parallel.legality, parallel.equivalence; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
