"""Autoregressive sampling: one token a forward, from left to right.

Every forward reads the whole row anew: no keys and values are kept, so a row of L tokens costs L forwards of length L. That is the
price of one model for all objectives; for long texts from a left-to-right model alone, other programs are faster.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pretrain.sampling.logits import Guided, draw, probabilities, put, uniform_grid
from pretrain.sampling.options import SamplingOptions


def write_left_to_right(
    guided: Guided,
    ids: Tensor,
    still_open: np.ndarray,
    options: SamplingOptions,
    *,
    eos_id: int | None,
    on_step: Callable[[int, Tensor], None] | None,
    first_row: int,
) -> Tensor:
    """Fills the open positions ([B, L] bool) of `ids`, which is changed; see pretrain.sampling.sampler.generate.

    What stands to the right of an open position does not influence it. Where `eos_id` is given, a row that produced it is done:
    its other open positions get it too, without a forward if no other row needs one.
    """
    uniforms = uniform_grid(options.seed, "sample_token", first_row, ids.shape)
    ended = np.zeros(len(ids), bool)
    for step, position in enumerate(np.flatnonzero(still_open.any(axis=0))):
        rows = np.flatnonzero(still_open[:, position] & ~ended)
        if not len(rows):
            continue
        here = np.full(len(rows), position)
        logits = torch.cat(list(guided.at(ids, rows, here)))
        weights = nucleus(probabilities(logits, options.temperature), options.top_p)
        tokens = draw(weights, uniforms[rows, position])
        put(ids, rows, here, tokens)
        if eos_id is not None:
            ended[rows] = tokens == eos_id
            closed, behind = np.nonzero(still_open & ended[:, None] & (np.arange(ids.shape[1]) > position))
            put(ids, closed, behind, np.full(len(closed), eos_id))
        if on_step is not None:
            on_step(step, ids.clone())
    return ids


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """`weights` [n, V] (probabilities) with 0 outside of the fewest tokens whose probabilities sum to at least `top_p`.

    Of equally likely tokens the lowest id stays first.
    """
    if top_p == 1:
        return weights
    falling, order = weights.sort(dim=-1, descending=True, stable=True)
    before = falling.cumsum(dim=-1).roll(1, dims=-1)  # what the likelier tokens have together
    before[:, 0] = 0.0
    return torch.zeros_like(weights).scatter_(1, order, falling.masked_fill(before >= top_p, 0.0))
