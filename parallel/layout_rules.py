"""The law of layouts, one table: RULES is read top to bottom, and a row only relies on the rows above it.

A row says what is forbidden, how it is said, and what to try instead; parallel.legality asks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from parallel.layout import LOOPED, SCHEDULES, ZERO_BUBBLE, Layout
from parallel.shape import ModelShape

ENGINES = ("deepspeed", "fsdp2")
ZERO_STAGES = (3, 2, 1, 0)
RECOMPUTE = ("none", "selective", "full")
Change = dict[str, Any]  # config key -> value


@dataclass(frozen=True)
class Case:
    """Everything that legality depends on. dp: what tensor and pipeline leave of the world."""

    shape: ModelShape
    world: int
    layout: Layout
    global_batch: int
    micro_batch: int
    sequence: int
    bf16: bool = False
    compile: bool = False

    @property
    def dp(self) -> int:
        return max(1, self.world // (self.layout.tensor * self.layout.pipeline))

    @property
    def accumulation(self) -> int:
        """Microbatches of one rank in one step."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def pipelined(self) -> bool:
        """parallel.schedule is ignored when this is False."""
        return self.layout.pipeline > 1

    def __getitem__(self, key: str) -> Any:
        section, name = key.split(".")
        if name == "precision":
            return "bf16" if self.bf16 else "fp32"
        if section == "train":
            return getattr(self, _TRAIN_FIELDS[name])
        if section == "data":
            return self.sequence
        return getattr(self.shape if section == "model" else self.layout, name)

    def with_change(self, change: Change) -> Case:
        """The same case with config keys set."""
        case = self
        for key, value in change.items():
            section, name = key.split(".")
            if name == "precision":
                case = replace(case, bf16=value == "bf16")
            elif section == "model":
                case = replace(case, shape=replace(case.shape, **{name: value}))
            elif section == "parallel":
                case = replace(case, layout=replace(case.layout, **{name: value}))
            elif section == "data":
                case = replace(case, sequence=value)
            else:
                case = replace(case, **{_TRAIN_FIELDS[name]: value})
        return case


_TRAIN_FIELDS = {"global_batch_size": "global_batch", "micro_batch_size": "micro_batch", "compile": "compile"}


def in_words(value: Any) -> str:
    """A config value as it is written in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Rule:
    """One row: what is forbidden, how it is said, and the changes to try, nearest first.

    keys: the config keys it speaks of; `reason` prints them with their values. changes: not all of them need to be legal;
    `check_layout` takes the first after which the whole layout is, else the first after which this rule holds.
    """

    name: str
    keys: tuple[str, ...]
    broken: Callable[[Case], bool]
    why: str  # completes "KEY VALUE, KEY VALUE: ..."; {c} is the case
    changes: Callable[[Case], Iterator[Change]]

    def reason(self, case: Case) -> str:
        values = ", ".join(f"{key} {in_words(case[key])}" for key in self.keys)
        return f"{values}: {self.why.format(c=case)}"


def _to(*changes: Change) -> Callable[[Case], Iterator[Change]]:
    return lambda case: iter(changes)


def _nearest(key: str, values: Callable[[Case], Iterable[int]]) -> Callable[[Case], Iterator[Change]]:
    """Values of one key, nearest to the present one first, the smaller of two first."""

    def changes(case: Case) -> Iterator[Change]:
        for value in sorted(values(case), key=lambda v: (abs(v - case[key]), v)):
            yield {key: value}

    return changes


def _divisors(*numbers: int) -> set[int]:
    """Of all the numbers, which are positive."""
    common = math.gcd(*numbers)
    small = [d for d in range(1, math.isqrt(common) + 1) if common % d == 0]
    return {*small, *(common // d for d in small)}


def _either(*sources: Callable[[Case], Iterator[Change]]) -> Callable[[Case], Iterator[Change]]:
    return lambda case: (change for source in sources for change in source(case))


def _batches(case: Case) -> Iterator[Change]:
    """Global batches that divide, the nearest first, the larger of two first."""
    unit = case.dp * case.micro_batch
    near = range(max(1, case.accumulation - case.layout.pipeline), case.accumulation + case.layout.pipeline + 1)
    for count in sorted(near, key=lambda k: (abs(k * unit - case.global_batch), -k)):
        yield {"train.global_batch_size": count * unit}


def _even_heads(case: Case) -> Iterator[Change]:
    yield {"model.hidden_size": case.shape.num_heads * (case.shape.head_dim + 1)}


def _interleaves(case: Case) -> bool:
    """torch's interleaved schedules take the microbatches in rounds of at least `pipeline`, all of one size."""
    rounds = max(1, case.accumulation // case.layout.pipeline)
    return case.accumulation % rounds == 0


_TENSOR = _nearest(
    "parallel.tensor", lambda c: _divisors(c.shape.num_heads, c.shape.num_kv_heads, c.shape.ffn_hidden_size)
)
_PIPELINE = _nearest("parallel.pipeline", lambda c: range(1, min(c.world, c.shape.num_layers) + 1))
_MICRO = _nearest("train.micro_batch_size", lambda c: range(1, min(c.micro_batch, c.global_batch) + 1))
_FSDP2 = {"parallel.engine": "fsdp2", "parallel.zero_stage": 3}


def _positive(key: str) -> Rule:
    return Rule(f"{key} is positive", (key,), lambda c: c[key] < 1, "must be at least 1", _to({key: 1}))


def _one_of(key: str, allowed: tuple) -> Rule:
    words = "must be one of " + ", ".join(map(str, allowed))
    return Rule(f"{key} is known", (key,), lambda c: c[key] not in allowed, words, _to(*({key: v} for v in allowed)))


def _splits(key: str) -> Rule:
    return Rule(
        f"{key} splits over tensor",
        (key, "parallel.tensor"),
        lambda c: c[key] % c.layout.tensor != 0,
        "{c.layout.tensor} tensor-parallel ranks cannot have equal shares",
        _TENSOR,
    )


RULES: tuple[Rule, ...] = (
    # What is a number or a name at all.
    *map(_positive, ("model.num_layers", "model.hidden_size", "model.num_heads", "model.num_kv_heads")),
    *map(_positive, ("model.ffn_hidden_size", "model.vocab_size", "data.sequence_length")),
    *map(_positive, ("parallel.tensor", "parallel.pipeline", "train.global_batch_size", "train.micro_batch_size")),
    _one_of("parallel.engine", ENGINES),
    _one_of("parallel.zero_stage", ZERO_STAGES),
    _one_of("parallel.schedule", SCHEDULES),
    _one_of("parallel.activation_checkpointing", RECOMPUTE),
    # The model by itself.
    Rule(
        "heads divide the hidden size",
        ("model.hidden_size", "model.num_heads"),
        lambda c: c.shape.hidden_size % c.shape.num_heads != 0,
        "the hidden size must be a multiple of the heads",
        _nearest("model.num_heads", lambda c: _divisors(c.shape.hidden_size)),
    ),
    Rule(
        "heads are even",
        ("model.hidden_size", "model.num_heads"),
        lambda c: c.shape.head_dim % 2 != 0,
        "rotary positions need an even head size, and this is {c.shape.head_dim}",
        _even_heads,
    ),
    Rule(
        "heads share key/value heads evenly",
        ("model.num_heads", "model.num_kv_heads"),
        lambda c: c.shape.num_heads % c.shape.num_kv_heads != 0,
        "the heads must be a multiple of the key/value heads",
        _nearest("model.num_kv_heads", lambda c: _divisors(c.shape.num_heads)),
    ),
    # The model over tensor-parallel ranks.
    _splits("model.num_heads"),
    _splits("model.num_kv_heads"),
    _splits("model.ffn_hidden_size"),
    Rule(
        "sequence parallelism needs tensor parallelism",
        ("parallel.sequence_parallel", "parallel.tensor"),
        lambda c: c.layout.sequence_parallel and c.layout.tensor == 1,
        "the sequence is cut over tensor-parallel ranks, and there is one",
        _to({"parallel.sequence_parallel": False}),
    ),
    Rule(
        "the sequence splits over tensor",
        ("parallel.sequence_parallel", "data.sequence_length", "parallel.tensor"),
        lambda c: c.layout.sequence_parallel and c.sequence % c.layout.tensor != 0,
        "{c.layout.tensor} tensor-parallel ranks cannot have equal shares of the sequence",
        _either(_TENSOR, _to({"parallel.sequence_parallel": False})),
    ),
    # The model over pipeline ranks.
    Rule(
        "tied embeddings stay on one stage",
        ("model.tie_embeddings", "parallel.pipeline"),
        lambda c: c.shape.tie_embeddings and c.pipelined,
        "the embedding and the head would be one matrix on two stages",
        _to({"parallel.pipeline": 1}, {"model.tie_embeddings": False}),
    ),
    Rule(
        "every chunk has a layer",
        ("model.num_layers", "parallel.pipeline", "parallel.schedule"),
        lambda c: c.shape.num_layers < c.layout.chunks,
        "the schedule cuts the model into {c.layout.chunks} chunks, and each needs at least one layer",
        _either(_to({"parallel.schedule": "1f1b"}), _PIPELINE),
    ),
    Rule(
        "layers_per_stage has one entry a chunk",
        ("parallel.layers_per_stage", "parallel.pipeline", "parallel.schedule"),
        lambda c: bool(c.layout.layers_per_stage) and len(c.layout.layers_per_stage) != c.layout.chunks,
        "the schedule cuts the model into {c.layout.chunks} chunks, one entry each, in model order",
        _to({"parallel.layers_per_stage": ()}),
    ),
    Rule(
        "layers_per_stage entries are positive",
        ("parallel.layers_per_stage",),
        lambda c: any(count < 1 for count in c.layout.layers_per_stage),
        "every chunk needs at least one layer",
        _to({"parallel.layers_per_stage": ()}),
    ),
    Rule(
        "layers_per_stage adds up",
        ("parallel.layers_per_stage", "model.num_layers"),
        lambda c: bool(c.layout.layers_per_stage) and sum(c.layout.layers_per_stage) != c.shape.num_layers,
        "the entries must add up to the layers of the model",
        _to({"parallel.layers_per_stage": ()}),
    ),
    # The ranks.
    Rule(
        "the world divides",
        ("parallel.tensor", "parallel.pipeline"),
        lambda c: c.world % (c.layout.tensor * c.layout.pipeline) != 0,
        "{c.world} ranks are not a multiple of tensor x pipeline",
        _either(_TENSOR, _PIPELINE, _to({"parallel.tensor": 1, "parallel.pipeline": 1})),
    ),
    Rule(
        "shard groups divide the data-parallel ranks",
        ("parallel.shard_group",),
        lambda c: c.layout.shard_group < 0 or c.layout.shard_group > 0 and c.dp % c.layout.shard_group != 0,
        "{c.dp} data-parallel ranks cannot be cut into such groups (0 is one group of all)",
        _nearest("parallel.shard_group", lambda c: _divisors(c.dp)),
    ),
    # The engines.
    Rule(
        "fsdp2 is ZeRO-3",
        ("parallel.engine", "parallel.zero_stage"),
        lambda c: c.layout.engine == "fsdp2" and c.layout.zero_stage != 3,
        "fsdp2 shards parameters, gradients and optimizer states alike; only deepspeed has other stages",
        _to({"parallel.zero_stage": 3}),
    ),
    Rule(
        "ZeRO-0 is fp32",
        ("parallel.zero_stage", "train.precision"),
        lambda c: c.layout.zero_stage == 0 and c.bf16,
        "DeepSpeed has no such optimizer that adds up gradients in fp32",
        _to({"parallel.zero_stage": 1}),
    ),
    Rule(
        "hybrid sharding is ZeRO-3",
        ("parallel.shard_group", "parallel.zero_stage"),
        lambda c: c.layout.zero_stage != 3 and c.layout.shard_group not in (0, c.dp),
        "only ZeRO-3 is proven with replicas of the shards",
        _to({"parallel.zero_stage": 3}),
    ),
    Rule(
        "zero bubble needs fsdp2",
        ("parallel.engine", "parallel.schedule"),
        lambda c: c.layout.engine == "deepspeed" and c.pipelined and c.layout.schedule in ZERO_BUBBLE,
        "DeepSpeed's gradient hooks do not see a backward that is split in two; engine fsdp2 runs it",
        _either(_to({"parallel.schedule": "interleaved"}), _to(_FSDP2)),
    ),
    Rule(
        "zero bubble is not compiled",
        ("parallel.schedule", "train.compile"),
        lambda c: c.pipelined and c.layout.schedule in ZERO_BUBBLE and c.compile,
        "a compiled block is one node of the backward graph, which cannot be split in two",
        _to({"train.compile": False}),
    ),
    Rule(
        "zero bubble recomputes nothing",
        ("parallel.schedule", "parallel.activation_checkpointing"),
        lambda c: c.pipelined and c.layout.schedule in ZERO_BUBBLE and c.layout.activation_checkpointing != "none",
        "a split backward would recompute a block for each of its weights, three times the work that the schedule saves",
        _to({"parallel.schedule": "interleaved"}, {"parallel.activation_checkpointing": "none"}),
    ),
    # The batch.
    Rule(
        "the batch divides",
        ("train.global_batch_size", "train.micro_batch_size"),
        lambda c: c.global_batch % (c.dp * c.micro_batch) != 0,
        "the global batch must be a multiple of {c.dp} data-parallel ranks x the microbatch",
        _either(_batches, _MICRO),
    ),
    Rule(
        "1f1b fills the pipeline",
        ("train.global_batch_size", "train.micro_batch_size", "parallel.pipeline", "parallel.schedule"),
        lambda c: c.pipelined and c.layout.schedule == "1f1b" and c.accumulation < c.layout.pipeline,
        "{c.accumulation} microbatches a rank; the schedule needs at least one for each of its {c.layout.pipeline} stages",
        _either(_MICRO, _batches, _to({"parallel.schedule": "gpipe"})),
    ),
    Rule(
        "interleaved rounds are equal",
        ("train.global_batch_size", "train.micro_batch_size", "parallel.pipeline", "parallel.schedule"),
        lambda c: c.pipelined and c.layout.schedule in LOOPED and not _interleaves(c),
        "{c.accumulation} microbatches a rank do not make equal rounds of at least {c.layout.pipeline}",
        _either(_MICRO, _batches),
    ),
)
