"""From a predictor's logits to tokens: guidance, forbidden tokens, and exact draws in float64.

Shapes: B rows, L positions, V vocabulary; n positions of any rows that are looked at, in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from data import randomness
from data.corruption import random_tokens

LogitsFn = Callable[[Tensor], Tensor]
_CHUNK_VALUES = 1 << 24  # float64 values worked on at once (128 MiB), so that L * V never exists in float64


class BrokenLogits(ValueError):
    """The logits of a position of row `row` have no best one that is a number."""

    def __init__(self, row: int):
        super().__init__("the best logit of a position is not finite: the model's output is broken")
        self.row = row


class Guided:
    """The float64 logits of a predictor with classifier-free guidance, without the tokens that must never come out.

    Args:
        predict: ids [B, L] int64 -> logits [B, L, V] of any float type.
        prompt_mask: [B, L] bool, what guidance hides behind mask tokens in its unconditional input.
        never: ids that get probability 0.
        scale: w of u + (1 + w)(c - u) (Ho & Salimans, arXiv 2207.12598); 0 = one forward instead of two.
    """

    def __init__(self, predict: LogitsFn, prompt_mask: Tensor, mask_id: int, never: Iterable[int], scale: float):
        self.predict, self.prompt_mask, self.mask_id, self.scale = predict, prompt_mask, mask_id, scale
        self.never = sorted({mask_id, *never})

    def at(self, ids: Tensor, rows: np.ndarray, positions: np.ndarray) -> Iterator[Tensor]:
        """Chunks [<= n, V] of the logits at (rows, positions), both [n].

        Raises ValueError when the logits have another shape, BrokenLogits when the best one of a position is no number.
        """
        conditional = self._forward(ids)
        unconditional = self._forward(ids.masked_fill(self.prompt_mask, self.mask_id)) if self.scale else None
        yield from guided_logits(conditional, unconditional, self.scale, rows, positions, self.never)

    def _forward(self, ids: Tensor) -> Tensor:
        logits, never = self.predict(ids), self.never
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise ValueError(f"logits have shape {tuple(logits.shape)}: expected {(*ids.shape, 'V')}")
        vocabulary = logits.shape[2]
        if not 0 <= never[0] <= never[-1] < vocabulary or len(never) == vocabulary:
            raise ValueError(
                f"the mask and forbidden ids must lie in 0..{vocabulary - 1} and leave a token to choose, got {never}"
            )
        return logits


def guided_logits(
    conditional: Tensor,
    unconditional: Optional[Tensor],
    scale: float,
    rows: np.ndarray,
    positions: np.ndarray,
    never: Sequence[int] = (),
) -> Iterator[Tensor]:
    """float64 chunks [<= n, V] of u + (1 + scale)(c - u) at (rows, positions), both [n], of logits c and u [B, L, V]; u None: of c.

    A token that either side rules out stays ruled out (-inf minus -inf would be no number), and so are the ids in `never`.

    Raises BrokenLogits when the best logit of a position is no number.
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
        fine = torch.isfinite(logits.amax(dim=-1))
        if not bool(fine.all()):  # nan, +inf, or nothing left to choose
            raise BrokenLogits(int(rows[start + int((~fine).int().argmax())]))
        yield logits


def gumbel_choice(
    logit_chunks: Iterable[Tensor], rows: np.ndarray, temperature: float, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The token of each position [n] int64, and its softmax probability [n] float64 under the clean logits.

    Gumbel-max in float64: argmax(logits + T g) with g = -log(-log u) is an exact draw from softmax(logits / T), equal
    to LLaDA's argmax(exp(logits) / (-log u)^T) but without its overflow. In float32 the tail of g is cut and the
    samples are colder than asked (Zheng et al., arXiv 2409.02908). The noise moves the choice, never the confidence.
    """
    tokens, confidence, start = [], [], 0
    sources: dict[int, np.random.Philox] = {}  # one per row, read on from chunk to chunk
    for logits in logit_chunks:
        noisy = logits
        if temperature:
            words = np.empty(logits.shape, np.uint64)
            here = np.unique(rows[start : start + len(logits)], return_index=True, return_counts=True)
            for row, first, count in zip(*here, strict=True):
                if row not in sources:
                    sources[row] = randomness.generator(seed, "sample_token", int(row), epoch=step)
                words[first : first + count] = sources[row].random_raw(count * logits.shape[1]).reshape(count, -1)
            uniform = ((words >> np.uint64(12)) + 0.5) * 2.0**-52  # strictly inside (0, 1): both logarithms are finite
            exponential = -torch.from_numpy(uniform).to(logits.device).log()
            noisy = logits - temperature * exponential.log()
        choice = noisy.argmax(dim=-1)  # the lowest id wins a tie
        probability = torch.softmax(logits, dim=-1).gather(1, choice[:, None])[:, 0]
        tokens.append(choice.cpu().numpy())
        confidence.append(probability.cpu().numpy())
        start += len(logits)
    return np.concatenate(tokens), np.concatenate(confidence)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) [n, V] of float64 logits; at temperature 0 all of it on the most likely token (lowest id)."""
    if not temperature:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=-1, keepdim=True), 1.0)
    below_best = logits - logits.amax(
        dim=-1, keepdim=True
    )  # before the division, so that a tiny temperature is no overflow
    return torch.softmax(below_best / temperature, dim=-1)


def draw(weights: Tensor, uniforms: np.ndarray) -> np.ndarray:
    """One id a row of `weights` [n, V] float64, with probability in proportion to them, by inversion: int64 [n].

    uniforms: [n] in [0, 1). An id of weight 0 never comes.
    """
    cumulative = weights.cumsum(dim=-1)
    point = cumulative[:, -1:] * torch.from_numpy(uniforms).to(weights.device)[:, None]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].cpu().numpy()


def put(ids: Tensor, rows: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> None:
    """ids[rows, positions] = tokens, all three [n], wherever `ids` [B, L] lives."""
    where = torch.from_numpy(rows).to(ids.device), torch.from_numpy(positions).to(ids.device)
    ids[where] = torch.from_numpy(tokens).to(ids.device)


def uniform_grid(seed: int, purpose: str, first_row: int, shape: Sequence[int], step: int = 0) -> np.ndarray:
    """[B, L] float64 uniforms in [0, 1), each a function of (seed, purpose, row, step, position) alone."""
    rows, length = shape
    return np.stack([1.0 - randomness.uniform(seed, purpose, first_row + i, length, step) for i in range(rows)])


def noise_grid(seed: int, first_row: int, shape: Sequence[int], vocab_size: int, step: int) -> np.ndarray:
    """[B, L] int64 ids, uniform over the vocabulary, each a function of (seed, row, step, position) alone."""
    rows, length = shape
    purpose = f"sample_noise/{step}"
    return np.stack([random_tokens(seed, purpose, first_row + i, length, vocab_size) for i in range(rows)])
