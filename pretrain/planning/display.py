"""A plan, and a ranking of layouts, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

from pretrain.memory import GIB
from pretrain.planning.case import NOTHING_FITS
from pretrain.planning.plan import Plan
from pretrain.quantities import count, duration, size
from pretrain.terminal import paint

_CONVENTIONS = {
    "exact": "what torch counts: every matmul, full attention, the head where there is a loss",
    "6n": "6 x parameters without embeddings (Kaplan et al.)",
    "6n_total": "6 x all parameters",
    "palm": "6 x parameters with the head, and attention (Chowdhery et al., appendix B)",
    "chinchilla": "embedding, logits and softmax as well (Hoffmann et al., appendix F)",
    "hardware": "exact, and what activation checkpointing does again",
}


def plan_lines(plan: Plan, colours: bool = False) -> Iterator[str]:
    """The verdict first."""

    def head(text: str) -> str:
        return paint(text, "bold", colours)

    memory = plan["memory"]
    verdict = paint("fits", "green", colours) if memory["fits"] else paint("does not fit", "red", colours)
    yield f"{head(_where(plan))}: {verdict}, about {_gib(memory['total'])} of {_gib(memory['available'])} GiB a GPU"
    if not memory["fits"]:
        cure = f"this fits: {memory['cure']}" if memory["cure"] else NOTHING_FITS
        yield f"  {cure}"
    yield f"layout      {_layout(plan['world'])}"
    parameters = plan["parameters"]
    yield f"parameters  {parameters['total']:,} in all, {parameters['non_embedding']:,} without embeddings"
    yield f"            a rank computes with {parameters['per_rank']:,} and keeps {parameters['per_rank_stored']:,} of them"
    yield from ("", head("memory of a GPU, GiB"), *_memory(memory, plan["world"]["activation_checkpointing"]))
    masked = plan["flops"]["masked_fraction"]
    yield from (
        "",
        head(f"FLOPs of a token, forward and backward ({masked:.0%} of the tokens count in the loss)"),
    )
    yield from (f"  {name:<11} {plan['flops'][name]:>17,.0f}   {what}" for name, what in _CONVENTIONS.items())
    yield from ("", head("communication of a step, of one rank"), *_communication(plan["communication"]))
    yield from ("", head(f"time: a model, with compute at {plan['time']['compute_mfu']:.4g} of the peak"))
    yield from _time(plan)
    yield from (f"  note: {note}" for note in plan["notes"])


def _where(plan: Plan) -> str:
    world, cluster = plan["world"], plan["cluster"]
    nodes = f"{world['nodes']} node{'s' * (world['nodes'] > 1)}"
    return f"{plan['config']} on {world['gpus']} x {cluster['gpu']} ({nodes})"


def _layout(world: dict[str, Any]) -> str:
    shards = f" in shard groups of {world['shard_group']}" if world["shard_group"] < world["data"] else ""
    parts = [
        f"{world['engine']} ZeRO-{world['zero_stage']}",
        f"data {world['data']}{shards}",
        f"tensor {world['tensor']}{', sequence parallel' if world['sequence_parallel'] else ''}",
        f"pipeline {world['pipeline']}{' ' + world['schedule'] if world['schedule'] else ''}",
        f"checkpointing {world['activation_checkpointing']}",
        f"{world['microbatches']} microbatch{'es' * (world['microbatches'] > 1)} of {world['micro_batch_size']} x "
        f"{world['sequence_length']:,} tokens",
    ]
    return ", ".join(parts)


def _memory(memory: dict[str, Any], mode: str) -> Iterator[str]:
    parts = sorted(memory["parts"].items(), key=lambda part: -part[1])
    yield from (f"  {name:<29}{_gib(amount):>7}" for name, amount in parts)
    yield f"  {'total':<29}{_gib(memory['total']):>7}"
    for other, found in memory["activations_by_checkpointing"].items():
        amounts = ", ".join(f"{name} {_gib(amount)}" for name, amount in found.items())
        yield f"  checkpointing {other:<10} {amounts}{'   <- this run' if other == mode else ''}"


def _communication(communication: dict[str, Any]) -> Iterator[str]:
    if not communication["axes"]:
        yield "  none"
        return
    yield f"  {'axis':<9} {'link':<8} {'sent':>9} {'calls':>7} {'takes':>9} {'waited for':>11}"
    for axis, found in communication["axes"].items():
        hides = "hides under compute" if found["hidden"] else ""
        if not hides and found["exposed_seconds"] < 0.5 * found["seconds"]:
            hides = f"{1 - found['exposed_seconds'] / found['seconds']:.0%} hides under compute"
        yield (
            f"  {axis:<9} {found['link']:<8} {size(found['bytes']):>9} {found['collectives']:>7,.0f} "
            f"{_seconds(found['seconds']):>9} {_seconds(found['exposed_seconds']):>11}   {hides}".rstrip()
        )


def _time(plan: Plan) -> Iterator[str]:
    time, bubble = plan["time"], plan["bubble"]
    yield (
        f"  step   {_seconds(time['step_seconds'])} = {_seconds(time['compute_seconds'])} compute + "
        f"{_seconds(time['exposed_communication_seconds'])} communication + {_seconds(time['bubble_seconds'])} bubble "
        f"({bubble['fraction']:.1%})"
    )
    yield (
        f"  speed  {time['tokens_per_second']:,.0f} tokens/s, {time['tokens_per_second_per_gpu']:,.0f} a GPU; MFU "
        f"{time['mfu']:.1%}, with recomputation {time['hfu']:.1%}"
    )
    yield f"  run    {count(time['tokens'])} tokens in {time['steps']:,.0f} steps: {_run(time)}"
    whole = time["if_the_whole_step_ran_at_it"]
    yield (
        f"  if the whole step ran at {time['compute_mfu']:.1%} MFU: {whole['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU, "
        f"{_run(whole)}"
    )


def _run(time: dict[str, Any]) -> str:
    text = f"{duration(time['days'] * 86400)}, {_hours(time['gpu_hours'])} GPU-hours"
    return text if time["price"] is None else f"{text}, price {_hours(time['price'])}"


def search_lines(found: Plan, colours: bool = False) -> Iterator[str]:
    rows = found["layouts"]
    title = f"{found['config']} on {found['gpus']} GPU{'s' * (found['gpus'] > 1)} of {found['cluster']}"
    if not rows:
        yield f"{paint(title, 'bold', colours)}: none of {found['legal']:,} legal layouts fits"
    else:
        yield (
            f"{paint(title, 'bold', colours)}: the {len(rows)} fastest that fit, of {found['legal']:,} legal layouts "
            f"(compute at {found['compute_mfu']:.4g} of the peak)"
        )
        yield f"{'':>3} {'tokens/s':>11} {'a GPU':>7} {'MFU':>6} {'waits':>6} {'bubble':>6} {'GiB':>6}   overrides"
        yield from (_row(number, row) for number, row in enumerate(rows, 1))
    if found["do_not_fit"]:
        faster = "would be faster, and do not fit" if rows else "do not fit"
        yield f"{found['do_not_fit']:,} {faster}; the fastest of them, and by how much:"
        yield from (_row(None, row) for row in found["fastest_that_do_not_fit"][:5])
    if found["illegal"]:
        rules = ", ".join(f"{name} {number:,}" for name, number in found["illegal"].items())
        yield f"{sum(found['illegal'].values()):,} more are not legal: {rules}"


def _row(number: Optional[int], row: dict[str, Any]) -> str:
    over = f" (+{_gib(row['over_bytes'])})" if row["over_bytes"] else ""
    changes = row["overrides"] or "as the config has it"
    return (
        f"{number or '-':>3} {row['tokens_per_second']:>11,.0f} {row['tokens_per_second_per_gpu']:>7,.0f} {row['mfu']:>6.1%} "
        f"{row['exposed_fraction']:>6.1%} {row['bubble_fraction']:>6.1%} {_gib(row['memory_bytes']):>6}{over}   {changes}"
    )


def _hours(amount: float) -> str:
    """Also of prices: three digits of small ones."""
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"


def _gib(amount: float) -> str:
    return f"{amount / GIB:.1f}" if amount >= 0.05 * GIB else f"{amount / GIB:.2g}"


def _seconds(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e6:.0f} us" if seconds else "0 s"
