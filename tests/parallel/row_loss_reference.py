"""Row losses written down from their formulas, slowly: in float64 with autograd, and in fifty digits with differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Optional

import mpmath
import torch
from torch import Tensor

from parallel.row_loss_cross_entropy import CrossEntropy
from parallel.row_loss_symmetric_kl import SymmetricKL
from parallel.row_loss_uniform import UniformBound


class Noisy(NamedTuple):
    """One loss call: what goes in, by the names of `diffusion_loss`."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    masked: Tensor
    loss_weight: Tensor
    normalizer: float
    vocab_size: int
    current: Optional[Tensor]
    alpha: Optional[Tensor]


class Dense(NamedTuple):
    loss: Tensor
    value: Tensor
    ce: Tensor
    correct: Tensor
    hidden: Tensor
    weight: Tensor


def made_up(dtype, tokens=192, hidden=24, vocab=251, padded=256, masked_fraction=0.5, seed=0) -> Noisy:
    """Random rows; every second target is the likeliest token, every third token is kept (current = target)."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(padded, hidden, generator=generator, dtype=torch.float64).mul(0.7).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::2] = (states.double() @ weight[:vocab].double().t()).argmax(1)[::2]
    masked = torch.rand(tokens, generator=generator) < masked_fraction
    current = torch.randint(0, vocab, (tokens,), generator=generator)
    current[::3] = targets[::3]
    alpha = torch.rand(tokens, generator=generator).clamp(0.02, 0.98)
    targets, current = (ids.where(masked, -100) for ids in (targets, current))  # never read
    loss_weight = 1 / torch.rand(tokens, generator=generator).clamp_min(0.02)
    return Noisy(states, weight, targets, masked, loss_weight, 2.0 * tokens, vocab, current, alpha)


def uniform_values(p: Tensor, targets: Tensor, current: Tensor, alpha: Tensor, kind: UniformBound) -> Tensor:
    """p [n, N] -> [n]: the formula term by term over y."""
    n, size = p.shape
    rows, signal = torch.arange(n), size * alpha
    clean = torch.nn.functional.one_hot(targets, size).double()
    xbar, pbar = (signal[:, None] * x + (1 - alpha)[:, None] for x in (clean, p))
    xz, pz = xbar[rows, current], pbar[rows, current]
    total = size / pz - size / xz
    for y in range(size):
        a = xbar[:, y] / xz
        term = a * (a.log() - (pbar[:, y] / pz).log())
        total = total + torch.where(current == y, 0.0, term)
    return total / size


def symmetric_values(p: Tensor, targets: Tensor, current: Tensor, alpha: Tensor, kind: SymmetricKL) -> Tensor:
    """p [n, N] -> [n]: half the sum of both divergences."""
    size = p.shape[1]
    q = (1 - kind.smoothing) * torch.nn.functional.one_hot(targets, size).double() + kind.smoothing / size
    there, back = (q * (q / p).log()).sum(1), (p * (p / q).log()).sum(1)
    return (there + back) / 2


def cross_entropies(p: Tensor, targets: Tensor, current: Tensor, alpha: Tensor, kind: CrossEntropy) -> Tensor:
    return -p[torch.arange(len(p)), targets].log()


VALUES: dict[type, Callable[..., Tensor]] = {
    UniformBound: uniform_values,
    SymmetricKL: symmetric_values,
    CrossEntropy: cross_entropies,
}


def dense(case: Noisy, values: Callable[..., Tensor], kind: Any) -> Dense:
    """Full float64 softmax over the real vocab, the formula, autograd."""
    hidden, weight = (x.detach().to(torch.float64, copy=True).requires_grad_() for x in case[:2])
    rows = case.masked.nonzero().squeeze(1)
    logits = hidden @ weight[: case.vocab_size].t()
    p = logits[rows].softmax(1)
    targets, current, alpha = (x[rows] for x in (case.targets, case.current, case.alpha.double()))
    found = values(p, targets, current, alpha, kind)
    loss = (found * case.loss_weight[rows].double()).sum() / case.normalizer
    loss.backward()
    value, ce, correct = torch.zeros(len(hidden)).double(), torch.zeros(len(hidden)).double(), case.masked & False
    value[rows], ce[rows] = found.detach(), -p.detach()[torch.arange(len(rows)), targets].log()
    correct[rows] = p.argmax(1) == targets
    return Dense(loss.detach(), value, ce, correct, hidden.grad, weight.grad)


@cache
def exact_uniform(logits: tuple[float, ...], target: int, current: int, alpha: float) -> tuple[float, list[float]]:
    """Value and its derivatives by the logits."""

    def value(z: list) -> Any:
        size, a = len(z), mpmath.mpf(alpha)
        p = exact_softmax(z)
        xbar = [size * a * (y == target) + 1 - a for y in range(size)]
        pbar = [size * a * p[y] + 1 - a for y in range(size)]
        total = mpmath.mpf(0)
        for y in range(size):
            if y != current:
                to, model = xbar[y] / xbar[current] / size, pbar[y] / pbar[current] / size
                total += to * mpmath.log(to / model) - to + model
        return total

    return exact(value, logits)


@cache
def exact_symmetric_kl(logits: tuple[float, ...], target: int, smoothing: float) -> tuple[float, list[float]]:
    def value(z: list) -> Any:
        size, s = len(z), mpmath.mpf(smoothing)
        p = exact_softmax(z)
        q = [(1 - s) * (y == target) + s / size for y in range(size)]
        return sum((q[y] - p[y]) * (mpmath.log(q[y]) - mpmath.log(p[y])) for y in range(size)) / 2

    return exact(value, logits)


def exact_softmax(z: list) -> list:
    exps = [mpmath.exp(x) for x in z]
    total = sum(exps)
    return [e / total for e in exps]


def exact(value: Callable[[list], Any], logits: tuple[float, ...]) -> tuple[float, list[float]]:
    with mpmath.workdps(120):  # values down to 1e-30, differences of 1e-40
        z, step = [mpmath.mpf(x) for x in logits], mpmath.mpf(10) ** -40
        slopes = []
        for j in range(len(z)):
            up, down = list(z), list(z)
            up[j], down[j] = z[j] + step, z[j] - step
            slopes.append(float((value(up) - value(down)) / (2 * step)))
        return float(value(z)), slopes
