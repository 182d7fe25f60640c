"""Bytes that one microbatch leaves behind for its backward pass, and how many microbatches a pipeline rank has in flight.

A block's list follows parallel.block line by line: what each operation saves is in its derivative (a linear its input, SiLU its
input, a product both factors, attention q, k, v, its output and one float32 a head and token). Norms and attention are taken as
fused, as they are on GPUs. After Korthikanti et al. (arXiv 2205.05198), section 4, with this block's operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from parallel.layout import LOOPED, SINGLE, V_SHAPED, Layout
from parallel.layout_rules import Case

CHUNK_ROWS = 1024  # of parallel.loss.diffusion_loss: rows whose logits exist at once


def element_bytes(case: Case) -> int:
    """Of an activation, and of the weights that a forward reads."""
    return 2 if case.bf16 else 4


@lru_cache(maxsize=256)
def layers_in(layout: Layout, num_layers: int) -> tuple[int, ...]:
    """How many layers each chunk of the model has."""
    return tuple(len(layers) for layers in layout.layers(num_layers))


@dataclass(frozen=True)
class Tokens:
    """Numbers of one microbatch on one rank. inside: of tensor-parallel regions; between: of the residual stream."""

    inside: int
    between: int


def tokens_of(case: Case) -> Tokens:
    inside = case.micro_batch * case.sequence
    return Tokens(inside, inside // case.layout.tensor if case.layout.sequence_parallel else inside)


def hidden_bytes(case: Case) -> int:
    """One microbatch's hidden states between two blocks."""
    return tokens_of(case).between * case.shape.hidden_size * element_bytes(case)


def block_saves(case: Case, mode: str) -> int:
    """What one block keeps of one microbatch from its forward to its backward, its input included."""
    shape, tensor, tokens, e = case.shape, case.layout.tensor, tokens_of(case), element_bytes(case)
    query = shape.num_heads * shape.head_dim // tensor
    key = shape.num_kv_heads * shape.head_dim // tensor
    statistics = 4 * tokens.inside * shape.num_heads // tensor  # log-sum-exp of attention
    attended = tokens.inside * query * e + statistics
    if mode == "full":
        return hidden_bytes(case)
    if mode == "selective":
        return hidden_bytes(case) + attended
    norms = 2 * (hidden_bytes(case) + 4 * tokens.between)  # their inputs; 1 / rms a token
    linear_inputs = 2 * tokens.inside * shape.hidden_size * e  # q, k, v share one; gate and up another
    rotated = tokens.inside * (query + 2 * key) * e  # q and k, and v
    # SiLU's input, both factors of the product, and the product, which the down projection reads.
    gated = 4 * tokens.inside * (shape.ffn_hidden_size // tensor) * e
    return norms + linear_inputs + rotated + attended + gated


def block_work(case: Case) -> int:
    """What exists beside that while one block runs: gradients on their way, float32 rotations, a recomputed block."""
    shape, tensor, tokens, e = case.shape, case.layout.tensor, tokens_of(case).inside, element_bytes(case)
    gradients = tokens * (3 * shape.ffn_hidden_size // tensor + 2 * shape.hidden_size) * e
    rotation = 3 * tokens * (shape.num_heads * shape.head_dim // tensor) * 4
    mode = case.layout.activation_checkpointing
    again = block_saves(case, "none") - hidden_bytes(case) if mode != "none" else 0
    return max(gradients, rotation) + again


def loss_saves(case: Case) -> int:
    """What final norm, head and loss keep of one microbatch: parallel.loss makes both gradients in its forward pass."""
    shape, tokens, e = case.shape, tokens_of(case), element_bytes(case)
    rows = shape.padded_vocab(case.layout.tensor) // case.layout.tensor
    norm = hidden_bytes(case) + 4 * tokens.between
    hidden = 2 * tokens.inside * shape.hidden_size * e  # the norm's output, and the gradient by it
    numbers = tokens.inside * (4 + 4 + 1)  # value, cross entropy, correct
    return norm + hidden + numbers + 4 * rows * shape.hidden_size


def loss_work(case: Case) -> int:
    """What exists beside that while the loss runs: logits of a chunk of rows, their gradient, the scaled gradient of the matrix."""
    shape, e = case.shape, element_bytes(case)
    rows = shape.padded_vocab(case.layout.tensor) // case.layout.tensor
    logits = min(CHUNK_ROWS, tokens_of(case).inside) * rows * (4 + e)
    return logits + rows * shape.hidden_size * e


def chunk_saves(case: Case, chunk: int) -> int:
    """What one chunk of the model keeps of one microbatch."""
    layers = layers_in(case.layout, case.shape.num_layers)[chunk]
    saved = layers * block_saves(case, case.layout.activation_checkpointing)
    saved += 2 * 4 * tokens_of(case).inside * case.shape.head_dim  # rotary cos and sin, for all its blocks
    if chunk == case.layout.chunks - 1:
        saved += loss_saves(case)
    elif case.pipelined:
        saved += hidden_bytes(case)  # what it sent on; the schedule holds it for the backward
    if chunk and case.pipelined:
        saved -= hidden_bytes(case)  # its first block's input lies in a receive buffer
    return saved


def most_in_flight(case: Case, pp_rank: int, saves: Mapping[int, int]) -> int:
    """The most bytes that a pipeline rank holds at once, if each chunk keeps saves[chunk] of each microbatch."""
    held, most = 0, 0
    for chunk, sign in _order(case, pp_rank):
        held += sign * saves[chunk]
        most = max(most, held)
    return most


def _order(case: Case, rank: int) -> Iterator[tuple[int, int]]:
    """(chunk, +1 forward or -1 the end of its backward) in the order in which torch.distributed.pipelining runs them."""
    layout, count, ranks = case.layout, case.accumulation, case.layout.pipeline
    chunks = layout.chunks_of(rank)
    if layout.schedule == "gpipe":
        yield from ((chunks[0], +1) for _ in range(count))
    elif layout.schedule in V_SHAPED:
        # ScheduleZBVZeroBubble: up to 2 P - r microbatches of the way down and r + 1 of the way back up.
        yield from ((chunks[0], +1) for _ in range(min(count, 2 * ranks - rank)))
        yield from ((chunks[1], +1) for _ in range(min(count, rank + 1)))
    elif layout.schedule in LOOPED:
        yield from _interleaved(chunks, count, ranks, rank, split=layout.schedule == "interleaved_zb")
    else:
        assert layout.schedule in SINGLE
        yield from ((chunks[0], +1) for _ in range(min(count, ranks - rank)))


def _interleaved(chunks: list[int], count: int, ranks: int, rank: int, split: bool) -> Iterator[tuple[int, int]]:
    """Narayanan et al. (arXiv 2104.04473), section 2.2, in rounds as torch runs them. split: weight gradients come `rank` later."""
    rounds = max(1, count // ranks)
    size = count // rounds
    ahead = (len(chunks) - 1) * size + (1 if split else 2) * (ranks - 1 - rank)
    # Once it is filled every round holds what the one before held: of many the first ones are enough.
    total = len(chunks) * size * min(rounds, ahead // (len(chunks) * size) + 3)
    warm = min(ahead, total)
    behind = rank if split else 0
    for step in range(total + warm + behind):
        if step < total:
            yield chunks[step // size % len(chunks)], +1
        done = step - warm - behind
        if 0 <= done < total:
            yield chunks[len(chunks) - 1 - done // size % len(chunks)], -1
