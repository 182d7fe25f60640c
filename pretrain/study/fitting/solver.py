"""Least squares with Huber weights for many small problems at once: what makes a thousand refits of a law a matter of a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import numpy as np

Array = Any  # numpy array
Model = Callable[[Array], tuple[Array, Array]]  # x [S, p] -> (prediction [S, n], its Jacobian [S, n, p])


def huber(residual: Array, delta: Optional[float]) -> Array:
    """Sum over the last axis of Huber's function (1964): r^2 / 2 within delta, delta (|r| - delta / 2) beyond it. None: r^2 / 2."""
    if delta is None:
        return 0.5 * np.square(residual).sum(-1)
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta)).sum(-1)


def solve(
    model: Model, y: Array, x: Array, low: Array, high: Array, delta: Optional[float] = None, iterations: int = 60
) -> tuple[Array, Array]:
    """Levenberg-Marquardt inside a box for S problems side by side, Huber's loss by iterated weights min(1, delta / |r|).

    y: [n] or [S, n]; x: [S, p] starts; low, high: [p]. Returns (x [S, p], objective [S]); the objective never rises above that of
    the start. A problem whose step no longer helps waits for the others; all stop when nothing moves any more.
    """
    x = np.clip(np.array(x, dtype=float), low, high)
    parameters = np.arange(x.shape[1])
    prediction, jacobian = model(x)
    residual = prediction - y
    value = huber(residual, delta)
    damping = np.full(len(x), 1e-2)
    for _ in range(iterations):
        weight = 1.0 if delta is None else delta / np.maximum(np.abs(residual), delta)
        transposed = np.swapaxes(jacobian * np.asarray(weight)[..., None], -1, -2)
        gradient = (transposed @ residual[..., None])[..., 0]
        held = ((x <= low) & (gradient > 0)) | (
            (x >= high) & (gradient < 0)
        )  # the box pushes back: not a free direction
        gradient = np.where(held, 0.0, gradient)
        hessian = np.where(held[:, :, None] | held[:, None, :], 0.0, transposed @ jacobian)
        diagonal = hessian[:, parameters, parameters]
        hessian[:, parameters, parameters] = diagonal * (1 + damping[:, None]) + 1e-14 + held
        step = np.clip(np.linalg.solve(hessian, gradient[..., None])[..., 0], -1.0, 1.0)
        trial = np.clip(x - step, low, high)
        new_prediction, new_jacobian = model(trial)
        new_residual = new_prediction - y
        new_value = huber(new_residual, delta)
        better = new_value <= value
        gain = np.where(better, value - new_value, 0.0)
        x = np.where(better[:, None], trial, x)
        jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
        residual = np.where(better[:, None], new_residual, residual)
        damping = np.where(better, np.maximum(damping * 0.3, 1e-10), np.minimum(damping * 5, 1e10))
        if (gain <= 1e-9 * value).all() and (better | (damping > 1e6)).all():
            value = np.where(better, new_value, value)
            break
        value = np.where(better, new_value, value)
    return x, value
