"""The row losses by name."""

from __future__ import annotations

from parallel.row_loss import RowLoss
from parallel.row_loss_cross_entropy import CrossEntropy
from parallel.row_loss_symmetric_kl import SymmetricKL
from parallel.row_loss_uniform import UniformBound

ROW_LOSSES = ("cross_entropy", "uniform", "symmetric_kl")


def row_loss(name: str, smoothing: float = 0.0) -> RowLoss:
    """The row loss called `name`; smoothing: of symmetric_kl alone.

    Raises ValueError for another name, and for a smoothing outside of (0, 1).
    """
    if name == "symmetric_kl":
        return SymmetricKL(smoothing)
    if name not in ROW_LOSSES:
        raise ValueError(f"row loss {name!r}: allowed are {', '.join(ROW_LOSSES)}")
    return UniformBound() if name == "uniform" else CrossEntropy()
