"""Which tokens of an answer are masked in each draw of a likelihood estimate, and how far their mean may be off.

The bound of an answer x of L tokens given a prompt (Nie et al., "Large Language Diffusion Models", arXiv 2502.09992, appendix A.2);
c(M) is the sum of -log p over the tokens of the mask M, each seen from the prompt and what M leaves:

    bernoulli    -log p(x) <= E over t uniform in (0, 1], M by chance t     of c(M) / t         (its training loss, eq. 3)
    fixed_count  -log p(x) <= E over l uniform in 1..L, M of l tokens       of c(M) L / l       (eq. 6)

Both expectations are the same number; the second estimator never varies more. Uniform t has infinite variance (the one-token masks
alone contribute the integral of 1/t), so t is drawn as u^2, which is denser near 0, and 1/t is divided by its density: the
expectation stays, and the variance is finite.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import numpy as np

from data import randomness

Estimator = Literal["fixed_count", "bernoulli"]
ESTIMATORS: tuple[Estimator, ...] = ("fixed_count", "bernoulli")


def content_key(*parts: np.ndarray) -> str:
    """A name for token ids that lie in several parts: what a request's draws follow from."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(np.int64(len(part)).tobytes() + np.ascontiguousarray(part, np.int64).tobytes())
    return digest.hexdigest()


def noise_of(estimator: Estimator, u: float, count: int) -> tuple[float, float]:
    """(how many of `count` tokens are masked, or with which probability each is; the weight of their loss), from u in (0, 1]."""
    if estimator == "fixed_count":
        masked = min(math.ceil(u * count), count)
        return masked, count / masked
    return u * u, 2 / u  # density of t = u^2 is 1 / (2 u), and (1 / t) / (1 / (2 u)) = 2 / u


def draw_mask(estimator: Estimator, seed: int, key: str, draw: int, draws: int, count: int) -> tuple[np.ndarray, float]:
    """(mask [count] bool, weight) of one of `draws` draws: a function of these arguments alone.

    The noise levels are stratified: draw d takes u from ((d, d + 1] / draws).
    """
    u = (draw + float(randomness.uniform(seed, f"likelihood/{key}/level", draw, 1)[0])) / draws
    noise, weight = noise_of(estimator, u, count)
    purpose = f"likelihood/{key}/mask"
    if estimator == "bernoulli":
        return randomness.bernoulli(seed, purpose, draw, count, noise), weight
    mask = np.zeros(count, bool)
    mask[np.argpartition(randomness.words(seed, purpose, draw, count), int(noise) - 1)[: int(noise)]] = True
    return mask, weight


def variance_of_mean(values: np.ndarray) -> np.ndarray:
    """Variance of the means of `values` [..., n], n draws of which each is from one of n strata in order: [...]; nan for n = 1.

    Neighbouring strata are collapsed to pairs (the last to a triple if n is odd), whose differences are taken for noise
    (Cochran, Sampling Techniques, section 5A.12): never too small in expectation, and much closer than to take all draws for
    one sample, since neighbours have nearly the same mean.
    """
    n = values.shape[-1]
    if n < 2:
        return np.full(values.shape[:-1], math.nan)
    paired = values[..., : n - 3 if n % 2 else n]
    total = ((paired[..., ::2] - paired[..., 1::2]) ** 2).sum(-1)
    if n % 2:
        total = total + 3 * values[..., -3:].var(-1, ddof=1)
    return total / n**2


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of `values` [n], one draw from each of n strata in order; nan for one alone."""
    return math.sqrt(float(variance_of_mean(values)))
