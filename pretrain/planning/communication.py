"""What one rank communicates in one optimizer step: collectives, their bytes, and what runs beside them.

Written from what the engines, the block, the pipeline and the loss here really do, and checked against the collectives that
two real ranks enter (tests/pretrain/planning/test_communication.py). Left out: the two numbers of the gradient norm, and counts of
tokens, a few hundred bytes a step. Bytes of a ring (Patarasu & Yuan, JPDC 2009): a rank sends (n - 1) / n of the full
buffer for an all-gather or a reduce-scatter, twice that for an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.layout_rules import Case
from pretrain.memory import Held, held_by, shard_size
from pretrain.memory_activations import element_bytes, hidden_bytes, layers_in, tokens_of

AXES = ("data", "replica", "tensor", "loss", "pipeline")

# What runs at the same time and can hide it. EXPOSED: nothing, the rank waits.
FORWARD, BACKWARD, LAST_BACKWARD, WEIGHT_GRADIENT, EXPOSED = "forward", "backward", "last backward", "head", "nothing"

_WIRE = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0, "broadcast": 1.0, "point-to-point": 1.0}
STATISTICS = 4  # float32 numbers a row that the cross entropy exchanges (parallel.row_loss_cross_entropy)


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step.

    buffer: bytes of the full, unsharded buffers of all calls. ranks: of the group; neighbours in it are `stride` ranks apart.
    alone: share of it that nothing can run beside, the first unit to be gathered or the last to be reduced.
    """

    axis: str
    kind: str
    what: str
    calls: float
    buffer: float
    ranks: int
    stride: int
    beside: str = EXPOSED
    alone: float = 0.0

    @property
    def wire(self) -> float:
        """Bytes that one rank sends."""
        share = 1.0 if self.kind == "point-to-point" else (self.ranks - 1) / self.ranks
        return _WIRE[self.kind] * share * self.buffer


def traffic_of(case: Case, pp_rank: int, masked_fraction: float) -> list[Traffic]:
    """Of one pipeline rank. masked_fraction: of its columns whose logits are computed. `case` must be legal."""
    held = held_by(case, pp_rank)
    found = [*_data(case, pp_rank, held), *_tensor(case, pp_rank), *_loss(case, pp_rank, masked_fraction)]
    return [one for one in [*found, *_pipeline(case, pp_rank)] if one.ranks > 1 and one.buffer > 0]


def blocks_of(case: Case, pp_rank: int) -> int:
    """Blocks that a pipeline rank holds."""
    layers = layers_in(case.layout, case.shape.num_layers)
    return sum(layers[chunk] for chunk in case.layout.chunks_of(pp_rank))


def _data(case: Case, pp_rank: int, held: Held) -> Iterator[Traffic]:
    """Weights and gradients over the ranks that share shards, and gradients over replicas of the shards."""
    e, stage, m = element_bytes(case), case.layout.zero_stage, 1 if case.pipelined else case.accumulation
    ranks, stride = shard_size(case), case.layout.tensor
    blocks = blocks_of(case, pp_rank)
    units = blocks + 2
    alone = held.largest_unit / held.total
    weights, gradients = e * held.total, 4 * held.total
    if stage == 3:
        # With a pipeline all is gathered before the first forward and reduced behind the last backward.
        fore, back = (EXPOSED, EXPOSED) if case.pipelined else (FORWARD, BACKWARD)
        yield Traffic("data", "all-gather", "weights", m * units, m * weights, ranks, stride, fore, alone)
        if not case.pipelined:
            again = gathered_again(case, held, blocks)
            yield Traffic(
                "data", "all-gather", "weights again", m * blocks, m * e * again, ranks, stride, BACKWARD, 0.0
            )
        yield Traffic("data", "reduce-scatter", "gradients", m * units, m * gradients, ranks, stride, back, alone)
        shards = case.dp // ranks
        yield Traffic("replica", "all-reduce", "gradients", 1, gradients / ranks, shards, stride * ranks)
        return
    if (
        stage == 2 and not case.pipelined
    ):  # its buckets are all-reduced in every microbatch, and each rank keeps its part
        yield Traffic("data", "all-reduce", "gradients", m * units, m * gradients, ranks, stride, BACKWARD, alone)
    else:
        # ZeRO-1 reduces in the backward of the last microbatch; its bf16 optimizer, and ZeRO-0, behind it.
        beside = LAST_BACKWARD if stage == 1 and not case.bf16 and not case.pipelined else EXPOSED
        yield Traffic("data", "all-reduce", "gradients", units, gradients, ranks, stride, beside, alone)
    if stage:
        yield Traffic("data", "all-gather", "updated weights", 2, weights, ranks, stride)


def gathered_again(case: Case, held: Held, blocks: int) -> int:
    """Elements that ZeRO-3 without a pipeline gathers a second time, for the backward pass.

    fsdp2: every block. DeepSpeed keeps a module's weights where less than stage3_max_reuse_distance elements (of
    parallel.engine_deepspeed) lie between its end and the backward pass: those of the last blocks, seldom of all.
    """
    if case.layout.engine == "fsdp2":
        return blocks * held.block
    gain = case.shape.hidden_size  # of the final norm
    embedding = case.shape.padded_vocab(case.layout.tensor) // case.layout.tensor * gain
    head = 0 if case.shape.tie_embeddings else embedding
    reuse = max(2 * held.largest_matrix, held.total // 8)
    again = sum(held.block for behind in range(blocks) if behind * held.block + gain + head >= reuse)
    again += embedding if blocks * held.block + gain + head >= reuse else 0
    return again + (gain if 2 * head >= reuse else 0)  # behind the norm come the head's forward and its backward


def _tensor(case: Case, pp_rank: int) -> Iterator[Traffic]:
    """Into and out of the tensor-parallel regions (Shoeybi et al., arXiv 1909.08053, section 3; with sequence parallelism
    Korthikanti et al., arXiv 2205.05198, section 4.2.2). Nothing of a block runs beside them: they are waited for.

    A block that is computed again does all but its last one again: nobody needs its output.
    """
    layout, m, e = case.layout, case.accumulation, element_bytes(case)
    hidden = tokens_of(case).inside * case.shape.hidden_size * e
    blocks, again = blocks_of(case, pp_rank), layout.activation_checkpointing != "none"
    chunks = layout.chunks_of(pp_rank)
    first, last = 0 in chunks, layout.chunks - 1 in chunks

    def moved(kind: str, what: str, count: float, size: float = hidden) -> Traffic:
        return Traffic("tensor", kind, what, m * count, m * count * size, layout.tensor, 1)

    if not layout.sequence_parallel:
        yield moved("all-reduce", "activations", (4 + again) * blocks)
    else:
        # Two gathers forward (one more for the head's input), and backward what the scatters become.
        yield moved("all-gather", "activations", (4 + 2 * again) * blocks + first + last)
        yield moved("reduce-scatter", "activations", (4 + again) * blocks)
        yield moved("all-reduce", "gradients of norm gains", 2 * blocks + last, case.shape.hidden_size * e)
    if first:
        yield moved("all-reduce", "embedded tokens", 1)


def _loss(case: Case, pp_rank: int, masked_fraction: float) -> Iterator[Traffic]:
    """Statistics of the masked rows, and the gradient by their hidden states, both in float32 (parallel.loss)."""
    layout, m = case.layout, case.accumulation
    if layout.chunks - 1 not in layout.chunks_of(pp_rank):
        return
    rows = tokens_of(case).inside * masked_fraction
    passes = max(1.0, rows / 1024)
    statistics = m * rows * layout.tensor * STATISTICS * 4
    yield Traffic("loss", "all-gather", "statistics", m * passes, statistics, layout.tensor, 1)
    gradient = m * rows * case.shape.hidden_size * 4
    yield Traffic("loss", "all-reduce", "hidden gradient", m * passes, gradient, layout.tensor, 1, WEIGHT_GRADIENT)


def _pipeline(case: Case, pp_rank: int) -> Iterator[Traffic]:
    """Hidden states on and their gradients back, where the neighbouring chunk is another rank's; the losses to all stages."""
    layout, m = case.layout, case.accumulation
    if not case.pipelined:
        return
    stride = case.dp * layout.tensor
    sent = m * messages(case, pp_rank)
    yield Traffic("pipeline", "point-to-point", "activations", sent, sent * hidden_bytes(case), layout.pipeline, stride)
    losses = 4 * m * (1 + 3 * tokens_of(case).inside)
    yield Traffic("pipeline", "broadcast", "losses", 1, losses, layout.pipeline, stride)


def messages(case: Case, pp_rank: int) -> int:
    """What a pipeline rank sends of each microbatch: activations to the chunks behind its own, gradients to those before, where
    another rank has them."""
    layout = case.layout
    mine = layout.chunks_of(pp_rank)
    neighbours = [n for chunk in mine for n in (chunk - 1, chunk + 1) if 0 <= n < layout.chunks]
    return sum(neighbour not in mine for neighbour in neighbours)
