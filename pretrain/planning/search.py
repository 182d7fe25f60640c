"""Every legal layout of a config on N GPUs, the fastest that fit first, and what kept the faster ones out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from data.errors import InputError
from parallel.layout import SCHEDULES, Layout
from parallel.layout_rules import ENGINES, RECOMPUTE, ZERO_STAGES, Case, in_words
from parallel.legality import first_broken, judge
from pretrain.config import Config
from pretrain.memory import GIB, held_by, memory_per_gpu, model_states
from pretrain.planning.case import case_of
from pretrain.planning.cluster import Cluster
from pretrain.planning.plan import Plan, Question, check_objective, flops_of, work_of
from pretrain.planning.step_time import StepTime, step_time

SHOWN = 10
MICRO_BATCHES = 16  # largest that is tried
SHARD_GROUPS = (8, 32, 128)
PIPELINES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Candidate:
    case: Case
    time: StepTime


def search(config: Config, question: Question) -> Plan:
    """The fastest layouts that fit, by the estimate of pretrain.planning.step_time, SHOWN at most; each as overrides of the config.

    One row for each engine, ZeRO stage, tensor and pipeline size and schedule: its fastest microbatch, checkpointing, shard group.

    Tried: both engines, ZeRO stages, shard groups, tensor-parallel ranks within a node with and without sequence parallelism,
    pipelines and their schedules, microbatches that divide, checkpointing. InputError if none is legal.
    """
    check_objective(config)
    base, limit = case_of(config, question.world), question.cluster.memory * GIB
    work = work_of(config, question)
    illegal: Counter[str] = Counter()
    legal: list[Candidate] = []
    for case in _cases(base, question.cluster):
        if broken := first_broken(case):
            illegal[broken.name] += 1
        else:
            legal.append(Candidate(case, step_time(case, question.cluster, work)))
    if not legal:
        problem = judge(base)
        reason = problem.reason if problem else f"most break the rule {illegal.most_common(1)[0][0]!r}"
        raise InputError(f"plan search: no layout of {question.world} GPUs is legal: {reason}")
    legal.sort(key=lambda one: one.time.total)
    fitting, too_large = _that_fit(legal, limit)
    return {
        "config": config.run.name,
        "gpus": question.world,
        "cluster": question.cluster.name,
        "tried": len(legal) + sum(illegal.values()),
        "legal": len(legal),
        "illegal": dict(illegal.most_common()),
        "compute_mfu": question.mfu,
        "layouts": [_row(config, question, one) for one in fitting],
        # Of those that would be faster than the last one shown.
        "do_not_fit": len(too_large),
        "fastest_that_do_not_fit": [_row(config, question, one) for one in _one_of_each(too_large)[:SHOWN]],
    }


def _cases(base: Case, cluster: Cluster) -> Iterator[Case]:
    """Every layout that is worth a look; legality is asked elsewhere."""
    tensors = [n for n in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % n == 0]
    for tensor, pipeline in itertools.product(tensors, PIPELINES):
        if base.world % (tensor * pipeline) or pipeline > base.shape.num_layers:
            continue
        dp = base.world // (tensor * pipeline)
        for micro, schedule, mode, by_sequence, (engine, stage, group) in itertools.product(
            _micro_batches(base, dp),
            SCHEDULES if pipeline > 1 else ("1f1b",),
            RECOMPUTE,
            (False, True) if tensor > 1 else (False,),
            _states(dp),
        ):
            if schedule == "gpipe" and base.global_batch >= dp * micro * pipeline:
                continue  # 1f1b takes as long and holds less
            layout = Layout(engine, stage, group, tensor, pipeline, (), schedule, by_sequence, mode)
            yield replace(base, layout=layout, micro_batch=micro)


def _micro_batches(base: Case, dp: int) -> list[int]:
    """Those that divide a rank's share of the batch; 1 where there is no equal share."""
    share = base.global_batch // dp
    return [n for n in range(1, MICRO_BATCHES + 1) if base.global_batch % dp == 0 and share % n == 0] or [1]


def _states(dp: int) -> list[tuple[str, int, int]]:
    """Engine, ZeRO stage and shard group."""
    groups = [0, *(size for size in SHARD_GROUPS if size < dp and dp % size == 0)]
    return [
        (engine, stage, group)
        for engine, stage in itertools.product(ENGINES, ZERO_STAGES)
        if engine == "deepspeed" or stage == 3
        for group in (groups if stage == 3 else [0])
    ]


def _kind(case: Case) -> tuple:
    """Layouts of one kind are rows of their own; of what else differs the fastest is shown."""
    layout = case.layout
    return layout.engine, layout.zero_stage, layout.tensor, layout.pipeline, layout.schedule


def _that_fit(legal: list[Candidate], limit: float) -> tuple[list[Candidate], list[Candidate]]:
    """(the fastest that fits of each kind, SHOWN at most; what is faster than the last of them and does not fit)."""
    fitting: dict[tuple, Candidate] = {}
    too_large: list[Candidate] = []
    for one in legal:
        if _kind(one.case) in fitting:
            continue
        # What the first stage holds of the model alone is often too much already.
        states = sum(model_states(one.case, held_by(one.case, 0)).values())
        if states > limit or memory_per_gpu(one.case).total > limit:
            too_large.append(one)
            continue
        fitting[_kind(one.case)] = one
        if len(fitting) == SHOWN:
            break
    return list(fitting.values()), too_large


def _one_of_each(candidates: list[Candidate]) -> list[Candidate]:
    """The first of each kind."""
    found: dict[tuple, Candidate] = {}
    for one in candidates:
        found.setdefault(_kind(one.case), one)
    return list(found.values())


def _row(config: Config, question: Question, one: Candidate) -> Plan:
    memory = memory_per_gpu(one.case).total
    tokens = config.train.global_batch_size * config.data.sequence_length
    seconds = one.time.total
    useful = flops_of(config)["exact"] * tokens / question.world / question.cluster.flops
    return {
        "overrides": " ".join(overrides(one.case, case_of(config, question.world))),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_gpu": tokens / seconds / question.world,
        "mfu": useful / seconds,
        "exposed_fraction": one.time.exposed / seconds,
        "bubble_fraction": one.time.bubble / seconds,
        "memory_bytes": memory,
        "over_bytes": max(0, memory - int(question.cluster.memory * GIB)),
        "microbatches": one.case.accumulation,
        "data": one.case.dp,
    }


def overrides(case: Case, base: Case) -> list[str]:
    """What to put behind `--config X`, of which `base` is the case: what differs, and that the layout reads."""
    layout, unread = case.layout, {"layers_per_stage"}
    if layout.tensor == 1 and not base.layout.sequence_parallel:
        unread.add("sequence_parallel")
    if not case.pipelined:
        unread.add("schedule")
    found = []
    for field in fields(layout):
        value = getattr(layout, field.name)
        if field.name not in unread and value != getattr(base.layout, field.name):
            found.append(f"--parallel.{field.name} {in_words(value)}")
    if base.layout.layers_per_stage:
        found.append("--parallel.layers_per_stage '[]'")
    if case.micro_batch != base.micro_batch:
        found.append(f"--train.micro_batch_size {case.micro_batch}")
    return found
