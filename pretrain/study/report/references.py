"""Published optima that a study's own are drawn beside. A law holds for its data, its tokenizer and its way of counting."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """N_opt and D_opt as power laws of C = 6 N D.

    counts: which parameters N is (`total`, `non_embedding`; "" where the source leaves it open). low, high: its budgets in FLOPs.
    """

    name: str
    counts: str
    N_coefficient: float
    N_exponent: float
    D_coefficient: float
    D_exponent: float
    low: float
    high: float
    source: str

    def N(self, C: float) -> float:
        return self.N_coefficient * C**self.N_exponent

    def D(self, C: float) -> float:
        return self.D_coefficient * C**self.D_exponent


REFERENCES = (
    Reference(
        "Quokka (masked diffusion)",
        "",
        0.0216,
        0.514,
        7.7,
        0.486,
        3e18,
        1e21,
        "Ni et al., arXiv 2510.03280, IsoFLOP fit",
    ),
    Reference(
        # Exponents 0.50 and 0.50 of table 2, approach 1; the coefficient is that of table 3's row 10 B, 205.1 B tokens.
        "Chinchilla (autoregressive)",
        "total",
        1e10 / math.sqrt(1.23e22),
        0.50,
        205.1e9 / math.sqrt(1.23e22),
        0.50,
        6e18,
        3e21,
        "Hoffmann et al., arXiv 2203.15556, approach 1",
    ),
)


def comparable(count: str, low: float, high: float) -> tuple[list[Reference], list[str]]:
    """(references whose N counts what this study's does, or leaves it open; why the others are not drawn).

    low, high: budgets in view. A reference more than a factor of 1000 away from them says nothing about them.
    """
    kept, left = [], []
    for reference in REFERENCES:
        if reference.counts and count in ("total", "non_embedding") and reference.counts != count:
            left.append(
                f"{reference.name} is not drawn: it counts {in_words(reference.counts)} parameters, this study "
                f"{in_words(count)} ones"
            )
        elif low > reference.high * 1000 or high < reference.low / 1000:
            left.append(
                f"{reference.name} is not drawn: its budgets, {reference.low:.0e} to {reference.high:.0e} FLOPs, are more than a "
                "factor of 1000 away"
            )
        else:
            kept.append(reference)
    return kept, left


def in_words(count: str) -> str:
    return {"total": "all", "non_embedding": "non-embedding"}.get(count, count)


def parameters(count: str) -> str:
    """What N counts, for an axis: "non-embedding parameters"."""
    return f"{in_words(count)} parameters" if count in ("total", "non_embedding") else "parameters as given"
