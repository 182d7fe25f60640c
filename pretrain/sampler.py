"""Masked-diffusion sampling: mask tokens are revealed step by step, the model sees the whole sequence every time.

The reverse process of LLaDA (Nie et al., "Large Language Diffusion Models", arXiv 2502.09992, Algorithms 4 and 5):

    fill positions of a row -> blocks, in order -> steps of a block -> every step: one forward, a token chosen for each
    open position of the block, and exactly the scheduled number of them revealed for good

Shapes: B rows, L positions, V vocabulary; n open positions of one row. Every draw is a pure function of
(seed, purpose, row, step), so ranks agree without talking and a row does not depend on the batch that it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from rich.text import Text
from torch import Tensor

from data import randomness
from data.errors import InputError

LogitsFn = Callable[[Tensor], Tensor]
_CHUNK_VALUES = 1 << 24  # float64 values worked on at once (128 MiB), so that L * V never exists in float64


@dataclass(frozen=True)
class SamplingOptions:
    """How masked positions are filled.

    Args:
        steps: reveal steps over the whole length; a block takes at least one, a step that reveals nothing is free.
        block_length: positions filled before the next ones are begun (semi-autoregressive); 0 = all at once.
        remasking: which open positions are revealed first: `low_confidence` (the surest) or `random`.
        temperature: tokens are drawn from softmax(logits / temperature); 0 = always the most likely token.
        cfg_scale: classifier-free guidance w: logits = u + (1 + w)(c - u); 0 = off, half the forwards.
        seed: of every draw.
    """

    steps: int = 64
    block_length: int = 0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    temperature: float = 0.0
    cfg_scale: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("block_length", 0), ("temperature", 0), ("cfg_scale", 0)):
            value = getattr(self, name)
            if not (value >= least and math.isfinite(value)):
                raise InputError(f"sampling option `{name}` is {value}: it must be finite and at least {least}")
        if self.remasking not in ("low_confidence", "random"):
            raise InputError(f"sampling option `remasking` is {self.remasking!r}: it must be low_confidence or random")


def reveal_schedule(count: int, steps: int, block_length: int) -> list[tuple[int, int]]:
    """One (block, number to reveal) per step of a row with `count` positions to fill; the numbers sum to `count`.

    Steps are shared among blocks in proportion to their sizes (at least one each); inside a block the numbers are as
    even as they can be, the larger ones first (LLaDA, generate.py: get_num_transfer_tokens).
    """
    size = block_length or max(count, 1)
    schedule = []
    for block, start in enumerate(range(0, count, size)):
        stop = min(start + size, count)
        block_steps = max(1, steps * stop // count - steps * start // count)
        base, remainder = divmod(stop - start, block_steps)
        schedule += [(block, base + (step < remainder)) for step in range(block_steps)]
    return schedule


@torch.no_grad()
def generate(
    logits_fn: LogitsFn,
    ids: Tensor,
    prompt_mask: Tensor,
    *,
    mask_id: int,
    options: SamplingOptions,
    forbidden_ids: Iterable[int] = (),
    eos_id: int | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    first_row: int = 0,
) -> Tensor:
    """Fills every position of `ids` that holds `mask_id` and is not in the prompt; returns new ids [B, L].

    Args:
        logits_fn: ids [B, L] int64 -> logits [B, L, V] of any float type; called once a step, twice with guidance,
            always with the same shape.
        ids: [B, L] int64; mask tokens may stand anywhere (continuation or in-filling).
        prompt_mask: [B, L] bool, the given positions that guidance hides in its unconditional input. They never
            change, and neither does any other position without a mask token.
        mask_id: never produced.
        forbidden_ids: never produced either; the probability goes to the other tokens.
        eos_id: where given, positions that chose it are revealed last in their block (only with `low_confidence`):
            end-of-text is easy to predict, and revealed first it cuts answers short.
        on_step: called as (step, ids [B, L]) after each step that revealed something.
        first_row: the row index of ids[0] in the draws: row i generated alone with first_row=i equals row i of a batch.

    Raises:
        ValueError: shapes do not match, or the logits are not numbers.
    """
    if ids.ndim != 2 or ids.dtype != torch.int64 or prompt_mask.shape != ids.shape or prompt_mask.dtype != torch.bool:
        raise ValueError(
            f"generate needs ids [B, L] int64 and prompt_mask [B, L] bool, got {tuple(ids.shape)} {ids.dtype} and "
            f"{tuple(prompt_mask.shape)} {prompt_mask.dtype}"
        )
    ids = ids.clone()
    never = sorted({mask_id, *forbidden_ids})
    # What is still open is tracked here and not read back from the ids.
    still_open = ((ids == mask_id) & ~prompt_mask).cpu().numpy()
    block_of = (np.cumsum(still_open, axis=1) - 1) // (options.block_length or ids.shape[1] or 1)
    schedules = [reveal_schedule(int(row.sum()), options.steps, options.block_length) for row in still_open]
    if options.remasking == "random":  # one random order of all positions per row
        words = [randomness.words(options.seed, "sample_reveal", first_row + i, ids.shape[1]) for i in range(len(ids))]
        scores = np.stack(words)

    for step in range(max(map(len, schedules), default=0)):
        plan = [schedule[step] if step < len(schedule) else (0, 0) for schedule in schedules]
        block, reveal = np.array(plan, np.int64).T  # [B] each
        if not reveal.any():
            continue
        rows, positions = np.nonzero(still_open & (block_of == block[:, None]) & (reveal[:, None] > 0))
        conditional = _checked(logits_fn(ids), ids, never)
        unconditional = None
        if options.cfg_scale:
            unconditional = _checked(logits_fn(ids.masked_fill(prompt_mask, mask_id)), ids, never)
        logits = _clean_logits(conditional, unconditional, rows, positions, options.cfg_scale, never)
        tokens, confidence = _choose_tokens(logits, rows + first_row, options, step)
        if options.remasking == "random":
            priority = scores[rows, positions]
            last = np.zeros(len(rows), bool)
        else:
            priority, last = -confidence, tokens == (-1 if eos_id is None else eos_id)
        order = np.lexsort((positions, priority, last, rows))  # by row, then last, then priority; ties: lowest position
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)  # of each place in `order`, counted within its row
        chosen = order[rank < reveal[rows]]
        still_open[rows[chosen], positions[chosen]] = False
        where = torch.from_numpy(rows[chosen]).to(ids.device), torch.from_numpy(positions[chosen]).to(ids.device)
        ids[where] = torch.from_numpy(tokens[chosen]).to(ids.device)
        if on_step is not None:
            on_step(step, ids.clone())
    return ids


def _checked(logits: Tensor, ids: Tensor, never: Sequence[int]) -> Tensor:
    """`logits` [B, L, V] if they fit the ids and leave at least one token to choose."""
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: expected {(*ids.shape, 'V')}")
    vocabulary = logits.shape[2]
    if not 0 <= never[0] <= never[-1] < vocabulary or len(never) == vocabulary:
        raise ValueError(
            f"the mask and forbidden ids must lie in 0..{vocabulary - 1} and leave a token to choose, got {list(never)}"
        )
    return logits


def _clean_logits(
    conditional: Tensor,
    unconditional: Tensor | None,
    rows: np.ndarray,
    positions: np.ndarray,
    scale: float,
    never: Sequence[int],
) -> Iterator[Tensor]:
    """Chunks [<= n, V] of the float64 logits at (rows, positions): guided, without noise, forbidden tokens at -inf.

    Guidance (Ho & Salimans, arXiv 2207.12598): u + (1 + w)(c - u). A token that either side rules out stays ruled out
    (-inf minus -inf would be no number).
    """
    size = max(1, _CHUNK_VALUES // conditional.shape[2])
    for start in range(0, len(rows), size):
        where = tuple(torch.from_numpy(i[start : start + size]).to(conditional.device) for i in (rows, positions))
        logits = conditional[where].double()
        if unconditional is not None:
            u = unconditional[where].double()
            ruled_out = torch.isneginf(logits) | torch.isneginf(u)
            logits = (u + (1.0 + scale) * (logits - u)).masked_fill_(ruled_out, -torch.inf)
        logits[:, list(never)] = -torch.inf
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):  # nan, +inf, or nothing left to choose
            raise ValueError("the best logit of a position is not finite: the model's output is broken")
        yield logits


def _choose_tokens(
    logit_chunks: Iterable[Tensor], rows: np.ndarray, options: SamplingOptions, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The token of each open position [n] int64, and its softmax probability [n] float64 under the clean logits.

    Gumbel-max in float64: argmax(logits + T g) with g = -log(-log u) is an exact draw from softmax(logits / T), equal
    to LLaDA's argmax(exp(logits) / (-log u)^T) but without its overflow. In float32 the tail of g is cut and the
    samples are colder than asked (Zheng et al., arXiv 2409.02908). The noise moves the choice, never the confidence.
    """
    tokens, confidence, start = [], [], 0
    sources: dict[int, np.random.Philox] = {}  # one per row, read on from chunk to chunk
    for logits in logit_chunks:
        noisy = logits
        if options.temperature:
            words = np.empty(logits.shape, np.uint64)
            here = np.unique(rows[start : start + len(logits)], return_index=True, return_counts=True)
            for row, first, count in zip(*here, strict=True):
                if row not in sources:
                    sources[row] = randomness.generator(options.seed, "sample_token", int(row), epoch=step)
                words[first : first + count] = sources[row].random_raw(count * logits.shape[1]).reshape(count, -1)
            uniform = ((words >> np.uint64(12)) + 0.5) * 2.0**-52  # strictly inside (0, 1): both logarithms are finite
            exponential = -torch.from_numpy(uniform).to(logits.device).log()
            noisy = logits - options.temperature * exponential.log()
        choice = noisy.argmax(dim=-1)  # the lowest id wins a tie
        probability = torch.softmax(logits, dim=-1).gather(1, choice[:, None])[:, 0]
        tokens.append(choice.cpu().numpy())
        confidence.append(probability.cpu().numpy())
        start += len(logits)
    return np.concatenate(tokens), np.concatenate(confidence)


def render_unmasking(
    ids: Sequence[int], previous: Sequence[int] | None, mask_id: int, decode: Callable[[list[int]], str]
) -> Text:
    """One row for a live display: masked tokens as dim blocks, tokens revealed since `previous` highlighted.

    Neighbours of one kind are decoded together, since one token may be only part of a character. Control characters
    (a model can write terminal escapes) are shown as the replacement character.
    """
    text = Text()
    before = previous if previous is not None else ids
    pairs = zip(ids, before, strict=True)
    kinds = ["masked" if new == mask_id else "new" if old == mask_id else "known" for new, old in pairs]
    start = 0
    for stop in range(1, len(kinds) + 1):
        if stop < len(kinds) and kinds[stop] == kinds[start]:
            continue
        if kinds[start] == "masked":
            text.append("░" * (stop - start), style="dim")
        else:
            shown = _printable(decode([int(i) for i in ids[start:stop]]))
            text.append(shown, style="bold green" if kinds[start] == "new" else None)
        start = stop
    return text


def _printable(text: str) -> str:
    """`text` with control characters other than newline and tab replaced."""
    return "".join("\ufffd" if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 else c for c in text)
