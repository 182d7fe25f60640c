"""A run before it is run: sizes, memory, FLOPs, traffic, time and cost of one config on one cluster, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Optional

from data.errors import InputError
from parallel.layout_rules import RECOMPUTE, Case
from parallel.legality import judge
from parallel.shape import parameter_counts
from pretrain.config import Config
from pretrain.flops import CONVENTIONS, flops_per_token_in, recomputed_flops_per_token
from pretrain.memory import GIB, Memory, cure, held_by, memory_per_gpu, shard_size
from pretrain.planning.case import case_of, change_in_words, check_layout, copies, masked_fraction, tokens_seen
from pretrain.planning.cluster import Cluster
from pretrain.planning.step_time import StepTime, Work, idle_microbatches, step_time

Plan = dict[str, Any]
DAY = 86400


@dataclass(frozen=True)
class Question:
    """What a plan is asked for, beside the config.

    world: GPUs. mfu: share of the peak that compute reaches. tokens: of the whole run; None: train.steps x batch x length.
    price: of a GPU-hour; None: the cluster's, if it has one.
    """

    cluster: Cluster
    world: int
    mfu: float = 0.4
    tokens: Optional[float] = None
    price: Optional[float] = None


def plan_of(config: Config, question: Question) -> Plan:
    """Sizes in bytes, FLOPs and seconds. InputError for a layout that is not legal, with the nearest that is."""
    check_objective(config)
    case = case_of(config, question.world)
    check_layout(case)
    memory = memory_per_gpu(case)
    time = step_time(case, question.cluster, work_of(config, question))
    return {
        "config": config.run.name,
        "cluster": asdict(question.cluster),
        "world": _world(case, question.cluster),
        "legal": verdict_of_layout(config, question),
        "parameters": _parameters(case),
        "memory": _memory(case, memory, question.cluster.memory * GIB),
        "flops": flops_of(config),
        "communication": _communication(time),
        "bubble": _bubble(case, time),
        "time": _time(config, question, time),
        "notes": _notes(config),
    }


def verdict_of_layout(config: Config, question: Question) -> Plan:
    """{"legal": true, "nearest": null}, or why not and the change of the config that makes it so."""
    problem = judge(case_of(config, question.world))
    if problem is None:
        return {"legal": True, "nearest": None}
    return {"legal": False, "reason": problem.reason, "nearest": problem.change}


def check_objective(config: Config) -> None:
    """InputError for the settings of the objective and the loop that a plan reads."""
    length, size = config.data.sequence_length, config.objective.block_size
    if config.objective.kind == "block" and (size < 1 or length % size):
        raise InputError(
            f"config: objective.block_size is {size}, it must be a divisor of data.sequence_length ({length})"
        )
    if config.train.steps < 1:
        raise InputError(f"config: train.steps is {config.train.steps}, it must be at least 1")
    ratio = config.objective.mask_ratio
    if ratio is not None and not 0 <= ratio[0] < ratio[1] <= 1:
        raise InputError(
            f"config: objective.mask_ratio is {list(ratio)}, it must be [low, high] with 0 <= low < high <= 1"
        )
    if config.objective.power <= 0:
        raise InputError(f"config: objective.power is {config.objective.power:g}, it must be positive")


def work_of(config: Config, question: Question) -> Work:
    masked = masked_fraction(config.objective) / copies(config.objective)
    return Work(tokens_seen(config), masked, question.mfu * question.cluster.flops)


def _world(case: Case, cluster: Cluster) -> Plan:
    return {
        "gpus": case.world,
        "nodes": -(-case.world // cluster.gpus_per_node),
        "tensor": case.layout.tensor,
        "pipeline": case.layout.pipeline,
        "data": case.dp,
        "shard_group": shard_size(case),
        "engine": case.layout.engine,
        "zero_stage": case.layout.zero_stage,
        "schedule": case.layout.schedule if case.pipelined else None,
        "sequence_parallel": case.layout.sequence_parallel,
        "activation_checkpointing": case.layout.activation_checkpointing,
        "micro_batch_size": case.micro_batch,
        "microbatches": case.accumulation,
        "global_batch_size": case.global_batch,
        "sequence_length": case.sequence,
    }


def _parameters(case: Case) -> Plan:
    """per_rank: a rank's tensor-parallel share of its stages, padding included; of the rank that has most."""
    held = max(held_by(case, rank).total for rank in range(case.layout.pipeline))
    stored = held if case.layout.zero_stage < 3 else -(-held // shard_size(case))
    return {**parameter_counts(case.shape), "per_rank": held, "per_rank_stored": stored}


def _memory(case: Case, memory: Memory, limit: float) -> Plan:
    """Bytes of the fullest pipeline rank's GPUs."""
    change = None if memory.total <= limit else cure(case, limit)
    modes = {}
    for mode in RECOMPUTE:
        other = replace(case, layout=replace(case.layout, activation_checkpointing=mode))
        working = memory_per_gpu(other).working
        modes[mode] = {name: working[name] for name in ("activations", "one block's work", "loss buffers")}
    return {
        "parts": memory.parts,
        "total": memory.total,
        "available": int(limit),
        "fits": memory.total <= limit,
        "pipeline_rank": memory.pp_rank,
        "activations_by_checkpointing": modes,
        "cure": change_in_words(change) if change else None,
    }


def flops_of(config: Config) -> Plan:
    """Forward + backward FLOPs of one token of text, in every convention; `hardware`: exact, and what checkpointing does again."""
    case, columns = case_of(config, 1), copies(config.objective)
    seen, masked = tokens_seen(config), masked_fraction(config.objective) / columns
    found = {name: columns * flops_per_token_in(name, case.shape, seen, masked) for name in CONVENTIONS}
    again = columns * recomputed_flops_per_token(case.shape, seen, case.layout)
    return {**found, "hardware": found["exact"] + again, "masked_fraction": masked_fraction(config.objective)}


def _communication(time: StepTime) -> Plan:
    """Of one step, on the pipeline rank that takes longest. bytes: what a rank sends; buffer_bytes: of the full buffers."""
    axes = {
        axis: {
            "bytes": found.wire,
            "buffer_bytes": found.buffer,
            "collectives": found.calls,
            "link": found.link,
            "seconds": found.seconds,
            "exposed_seconds": found.exposed,
            "hidden": found.hidden,
        }
        for axis, found in time.axes.items()
    }
    parts = [
        {
            "axis": one.axis,
            "kind": one.kind,
            "what": one.what,
            "ranks": one.ranks,
            "collectives": one.calls,
            "bytes": one.wire,
            "buffer_bytes": one.buffer,
            "beside": one.beside,
        }
        for one in time.traffic
    ]
    return {"pipeline_rank": time.pp_rank, "axes": axes, "parts": parts, "exposed_seconds": time.exposed}


def _bubble(case: Case, time: StepTime) -> Plan:
    """fraction: of the step in which a pipeline rank waits for others' microbatches."""
    return {
        "fraction": time.bubble / time.total,
        "idle_microbatches": idle_microbatches(case),
        "seconds": time.bubble,
        "schedule": case.layout.schedule if case.pipelined else None,
    }


def _time(config: Config, question: Question, time: StepTime) -> Plan:
    flops = flops_of(config)
    tokens_a_step = config.train.global_batch_size * config.data.sequence_length
    tokens = question.tokens if question.tokens is not None else float(config.train.steps * tokens_a_step)
    useful = flops["exact"] * tokens_a_step / question.world / question.cluster.flops  # seconds at the peak
    rate = question.price if question.price is not None else question.cluster.price
    return {
        "compute_mfu": question.mfu,
        "tokens": tokens,
        "tokens_per_step": tokens_a_step,
        "steps": tokens / tokens_a_step,
        "compute_seconds": time.compute,
        "exposed_communication_seconds": time.exposed,
        "bubble_seconds": time.bubble,
        **_run(time.total, tokens_a_step, tokens, question.world, rate),
        "mfu": useful / time.total,
        "hfu": useful * flops["hardware"] / flops["exact"] / time.total,
        # What papers mean: the whole step, whatever it spends its time with, at this MFU.
        "if_the_whole_step_ran_at_it": _run(useful / question.mfu, tokens_a_step, tokens, question.world, rate),
    }


def _notes(config: Config) -> list[str]:
    """What the figures take for granted and this config does not keep to."""
    notes = []
    if config.train.precision != "bf16":
        notes.append(
            f"train.precision is {config.train.precision}, and the peak that time and MFU are of is that of bf16"
        )
    if config.data.packing == "isolate":
        notes.append("data.packing is isolate: attention is counted as if each block were one document, an upper bound")
    if config.objective.kind == "autoregressive":
        notes.append("objective.kind is autoregressive: attention is counted in full, as MFU in training is")
    return notes


def _run(step_seconds: float, tokens_a_step: int, tokens: float, world: int, price: Optional[float]) -> Plan:
    seconds = step_seconds * tokens / tokens_a_step
    hours = seconds / 3600 * world
    return {
        "step_seconds": step_seconds,
        "tokens_per_second": tokens_a_step / step_seconds,
        "tokens_per_second_per_gpu": tokens_a_step / step_seconds / world,
        "days": seconds / DAY,
        "gpu_hours": hours,
        "price": None if price is None else hours * price,
    }
