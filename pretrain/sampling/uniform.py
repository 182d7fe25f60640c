"""Sampling from models of uniform-state noise: a row of random tokens, each of which may change again and again.

`denoise`: ancestral sampling (Schiff et al., "Simple Guidance Mechanisms for Discrete Diffusion Models", arXiv 2412.10193,
section 4; Austin et al., "D3PM", arXiv 2107.03006, eq. 3), for kind `uniform`.
`renoise`: predict all tokens, corrupt the prediction to the next lower level, for kind `flow`: the argmax of a Gaussian flow is
uniform-state noise (Sahoo et al., "The Diffusion Duality", arXiv 2506.10892, section 3).

Shapes: B rows, L positions, N ids of the vocabulary; n open positions of all rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pretrain.sampling.logits import Guided, draw, noise_grid, probabilities, put, uniform_grid
from pretrain.sampling.options import SamplingOptions

Signal = Callable[[float], float]  # noise level t in (0, 1) -> alpha(t), what is left of the clean token


def levels(signal: Signal, steps: int) -> list[float]:
    """What is left before the first step, after it, ..., after the last: rising from 0 (nothing but noise) to 1, [steps + 1].

    The ends are exact whatever `signal` says there, since sampling starts from pure noise and ends with clean tokens.

    Raises ValueError where `signal` leaves [0, 1] or rises with t, by more than rounding.
    """
    values = np.array([0.0, *(signal(1 - k / steps) for k in range(1, steps)), 1.0])
    rising = np.maximum.accumulate(values.clip(0, 1))
    if not np.abs(rising - values).max() < 1e-9:
        raise ValueError(f"what is left of a clean token must fall from 1 to 0 as t rises, got {values[::-1].tolist()}")
    return rising.tolist()


def denoise(
    guided: Guided,
    ids: Tensor,
    still_open: np.ndarray,
    options: SamplingOptions,
    *,
    vocab_size: int,
    signal: Signal,
    on_step: Callable[[int, Tensor], None] | None,
    first_row: int,
) -> Tensor:
    """Fills the open positions ([B, L] bool) of `ids`, which is changed; see pretrain.sampling.sampler.generate.

    The step from level t to s < t draws each token from

        q(y | z, x) = [a onehot(z) + (1 - a) / N]_y [alpha_s x + (1 - alpha_s) / N]_y / (alpha_t x_z + (1 - alpha_t) / N),

    a = alpha_t / alpha_s, z the token now, x = softmax(logits / temperature). Multiplied out it is a choice of three: z stays, a
    token of x comes, a random one comes.

    The bound that trains kind `uniform` compares the probabilities of y and z, and is lowest where x is the law of the clean
    token given all OTHER tokens: with that x the step is exact for each token. Hence the last step (alpha_s = 1) weighs x
    with z once more, and is x itself only where all was noise before it. (Cross-entropy teaches the law given all tokens, z
    included, which is not this formula's x.)
    """
    rows, positions = np.nonzero(still_open)
    now = noise_grid(options.seed, first_row, ids.shape, vocab_size, 0)[rows, positions]
    put(ids, rows, positions, now)
    grid = levels(signal, options.steps)
    for step, (alpha_t, alpha_s) in enumerate(zip(grid, grid[1:])):
        a = alpha_t / alpha_s if alpha_s else 0.0
        branch = uniform_grid(options.seed, "sample_change", first_row, ids.shape, step)[rows, positions]
        uniforms = uniform_grid(options.seed, "sample_token", first_row, ids.shape, step)[rows, positions]
        random = noise_grid(options.seed, first_row, ids.shape, vocab_size, step + 1)[rows, positions]
        new = np.empty_like(now)
        for part, x in _chunks(guided, ids, rows, positions, options.temperature):
            z = torch.from_numpy(now[part]).to(x.device)[:, None]
            x_z = x.gather(1, z)[:, 0].cpu().numpy()
            stays = a * (alpha_s * x_z + (1 - alpha_s) / vocab_size)
            noise = (1 - a) * (1 - alpha_s) / vocab_size
            predicted = (1 - a) * alpha_s / vocab_size
            point = branch[part] * (stays + noise + predicted)
            drawn = draw(x, uniforms[part])
            new[part] = np.where(point < stays, now[part], np.where(point < stays + noise, random[part], drawn))
        now = new
        put(ids, rows, positions, now)
        if on_step is not None:
            on_step(step, ids.clone())
    return ids


def renoise(
    guided: Guided,
    ids: Tensor,
    still_open: np.ndarray,
    options: SamplingOptions,
    *,
    vocab_size: int,
    signal: Signal,
    on_step: Callable[[int, Tensor], None] | None,
    first_row: int,
) -> Tensor:
    """Fills the open positions ([B, L] bool) of `ids`, which is changed; see pretrain.sampling.sampler.generate.

    Every step draws a clean token from softmax(logits / temperature) at each place and shows it on with probability
    alpha_s + (1 - alpha_s) / N, else one of the N - 1 other ids at random: what argmax leaves in training (data.flow). The last
    step keeps all. The network reads tokens, the limit of its soft inputs at temperature 0.
    """
    rows, positions = np.nonzero(still_open)
    put(ids, rows, positions, noise_grid(options.seed, first_row, ids.shape, vocab_size, 0)[rows, positions])
    for step, alpha_s in enumerate(levels(signal, options.steps)[1:]):
        keep = alpha_s + (1 - alpha_s) / vocab_size
        kept = uniform_grid(options.seed, "sample_change", first_row, ids.shape, step)[rows, positions] < keep
        uniforms = uniform_grid(options.seed, "sample_token", first_row, ids.shape, step)[rows, positions]
        away = 1 + noise_grid(options.seed, first_row, ids.shape, vocab_size - 1, step + 1)[rows, positions]
        new = np.empty(len(rows), np.int64)
        for part, x in _chunks(guided, ids, rows, positions, options.temperature):
            clean = draw(x, uniforms[part])
            new[part] = np.where(kept[part], clean, (clean + away[part]) % vocab_size)
        put(ids, rows, positions, new)
        if on_step is not None:
            on_step(step, ids.clone())
    return ids


def _chunks(guided: Guided, ids: Tensor, rows: np.ndarray, positions: np.ndarray, temperature: float):
    """(slice of the n positions, their probabilities [<= n, N] float64), one chunk after the other."""
    start = 0
    for logits in guided.at(ids, rows, positions):
        yield slice(start, start + len(logits)), probabilities(logits, temperature)
        start += len(logits)
