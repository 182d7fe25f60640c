"""Gaussian flow over one-hot vectors, seen through argmax: w = clean * onehot(x) + noise * gaussian, token = argmax w.

The argmax of the Gaussian path is uniform-state discrete diffusion (Sahoo et al., "The Diffusion Duality", arXiv 2506.10892), and
a softmax of w / temperature in place of the argmax gives the model soft inputs, which lower the variance of training while
the temperature is annealed to zero.

The schedule says what argmax leaves: alpha(t) is the share of clean tokens, as of `uniform`, and the Gaussian path, clean = 1 - g
and noise = g, is followed at the g that leaves it. (Even steps of g itself would be all noise or all clean for most of the way: of
63 with 126,464 ids only 11 keep between 2 and 98 in a hundred.)

A dense Gaussian over the vocabulary is never drawn. Of the V - 1 coordinates without signal only the `candidates` largest matter
to a softmax this cold (Deschenaux et al., arXiv 2602.21185); their values are drawn by order statistics (the spacings of
exponentials: Devroye, Non-Uniform Random Variate Generation, V.3), their ids uniformly without repetition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from data import noise, randomness
from data.corruption import eligible_tokens, id_dtype
from data.masking import MaskingOptions

MOST_CANDIDATES = 64


@dataclass(frozen=True)
class FlowOptions:
    """The soft inputs of the flow objective.

    Args:
        vocab_size: V, ids that corruption may give.
        temperature: of the softmax over w, at the first step and from step `temperature_steps` on; between them its
            logarithm falls linearly.
        temperature_steps: optimizer steps over which it falls.
        candidates: ids beside the clean one that an input mixes.
        start: (step, sample) at which the stream begins, where it was begun anew.
    """

    vocab_size: int
    temperature: tuple[float, float] = (1e-3, 1e-8)
    temperature_steps: int = 500_000
    candidates: int = 7
    start: tuple[int, int] = (0, 0)

    def of_sample(self, sample: int, global_batch: int) -> float:
        """The temperature of the optimizer step that reads a sample."""
        return self.at_step(self.start[0] + (sample - self.start[1]) // global_batch)

    def at_step(self, step: int) -> float:
        """The temperature of an optimizer step."""
        first, last = (math.log(value) for value in self.temperature)
        return math.exp(first + (last - first) * min(max(step, 0) / self.temperature_steps, 1.0))


def largest_gaussians(uniforms: np.ndarray, among: int) -> np.ndarray:
    """The k largest of `among` independent standard Gaussians, falling, float64 [n, k]. uniforms: [n, k] in (0, 1].

    The i-th largest uniform of N is exp(-(E_1 / N + E_2 / (N - 1) + ... + E_i / (N - i + 1))) with independent exponentials E; the
    Gaussian comes from its upper tail probability, so that nothing is lost near 1.
    """
    k = uniforms.shape[1]
    spacings = -np.log(uniforms) / (among - np.arange(k))
    upper_tail = -np.expm1(-np.cumsum(spacings, axis=1))
    return -torch.special.ndtri(torch.from_numpy(upper_tail)).numpy()


def keep_probability(noise_share: float | np.ndarray, vocab_size: int) -> np.ndarray:
    """P(argmax w is the clean token) = E[Phi((clean + noise g) / noise)^(V - 1)], g a standard Gaussian; shape of noise_share."""
    share = np.asarray(noise_share, np.float64).reshape(-1)
    g = np.linspace(-10.0, 10.0, 2001)
    density = np.exp(-0.5 * g * g)
    density /= density.sum()
    with np.errstate(divide="ignore"):
        threshold = np.where(share > 0, (1 - share) / share, np.inf)[:, None] + g
    below = torch.special.log_ndtr(torch.from_numpy(threshold)).numpy()
    kept = np.exp((vocab_size - 1) * below) @ density
    return kept.reshape(np.shape(noise_share))


def gaussian_noise(alpha: float, vocab_size: int) -> float:
    """g at which argmax ((1 - g) onehot + g gaussian) is the clean token with probability alpha + (1 - alpha) / V."""
    shares, kept = _kept(vocab_size)
    return float(np.interp(-(alpha + (1 - alpha) / vocab_size), -kept, shares))


@lru_cache(maxsize=4)
def _kept(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """g from 0 to 1, and the probability that each leaves the clean token (falling)."""
    shares = np.linspace(0.0, 1.0, 4001)
    return shares, np.minimum.accumulate(keep_probability(shares, vocab_size))


def _distinct_others(words: np.ndarray, clean: np.ndarray, vocab_size: int) -> np.ndarray:
    """[n, k] distinct ids, none of them the clean one of its row, int64. words: uint64 [n, k]; clean: [n].

    Sequential sampling without repetition: the i-th draw is among the ids that are left, numbered in ascending order.
    """
    n, k = words.shape
    taken = np.empty((n, k + 1), np.int64)
    taken[:, 0] = clean
    for i in range(k):
        left = vocab_size - 1 - i
        fresh = ((words[:, i] >> np.uint64(32)) * np.uint64(left) >> np.uint64(32)).astype(np.int64)
        for before in np.sort(taken[:, : i + 1], axis=1).T:  # the number of the draw -> the id, skipping what is taken
            fresh += fresh >= before
        taken[:, i + 1] = fresh
    return taken[:, 1:]


def flow_corruption(samples: Iterable[dict], options: MaskingOptions, flow: FlowOptions) -> Iterator[dict]:
    """Adds `noisy` [L], `soft_ids` [L, 1 + candidates] (the clean id first), `soft_weights` (their shares), `mask` and `weight`.

    Every eligible token counts, with weight (1 - alpha) / (V alpha + 1 - alpha): the probability that a token that looks clean is
    noise, so the less is left the more it counts.
    """
    schedule = options.schedule.inside(options.eps)
    k = min(flow.candidates, flow.vocab_size - 1)
    for sample in samples:
        tokens, index = sample["tokens"], sample["sample_id"]
        size = len(tokens)
        length = sample.get("length", size)
        counted = eligible_tokens(size, length, sample.get("prompt"))
        t = noise.noise_level(options.seed, options.stream, index, options.global_batch, options.t_sampling)
        noisy = schedule.probability(t)  # 1 - alpha
        share = gaussian_noise(1 - noisy, flow.vocab_size)
        words = randomness.words(options.seed, f"{options.stream}/flow", index, size * (k + 1)).reshape(size, k + 1)
        uniforms = ((words >> np.uint64(11)) + 0.5) * 2.0**-53  # strictly inside (0, 1)
        ids = np.empty((size, k + 1), np.int64)
        ids[:, 0] = tokens
        again = randomness.words(options.seed, f"{options.stream}/flow_ids", index, size * k).reshape(size, k)
        ids[:, 1:] = _distinct_others(again, ids[:, 0], flow.vocab_size)
        values = np.empty((size, k + 1))
        values[:, 0] = (1 - share) + share * torch.special.ndtri(torch.from_numpy(uniforms[:, 0])).numpy()
        values[:, 1:] = share * largest_gaussians(uniforms[:, 1:], flow.vocab_size - 1)
        values -= values.max(axis=1, keepdims=True)
        soft = np.exp(values / flow.of_sample(index, options.global_batch))
        soft /= soft.sum(axis=1, keepdims=True)
        soft[~counted] = np.eye(1, k + 1)  # what carries no loss is shown clean
        yield {
            **sample,
            "length": length,
            "mask": counted,
            "noisy": ids[np.arange(size), soft.argmax(axis=1)].astype(id_dtype(flow.vocab_size)),
            "soft_ids": ids.astype(id_dtype(flow.vocab_size)),
            "soft_weights": soft.astype(np.float32),
            "t": t,
            "p_mask": noisy,
            "weight": noisy / (flow.vocab_size * (1 - noisy) + noisy),
        }
