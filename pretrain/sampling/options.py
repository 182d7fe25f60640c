"""How text is sampled, and which of the options mean something for which kind of model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data.batch import Kind
from data.errors import InputError
from pretrain.predictor import Objective


@dataclass(frozen=True)
class SamplingOptions:
    """How open positions are filled.

    Args:
        steps: forwards over the whole length (twice as many with guidance). Of mask tokens: a block takes at least one, a step that
            reveals nothing is free. A left-to-right model takes one a token, whatever is said here.
        block_length: positions filled before the next ones are begun (semi-autoregressive); 0 = all at once. Kind `block` has
            its own.
        remasking: which open positions are revealed first: `low_confidence` (the surest) or `random`.
        temperature: tokens are drawn from softmax(logits / temperature); 0 = always the most likely token.
        cfg_scale: classifier-free guidance w: logits = u + (1 + w)(c - u); 0 = off, half the forwards.
        seed: of every draw.
        top_p: left to right only: drawn from the fewest tokens that together have this probability (Holtzman et al.,
            arXiv 1904.09751), measured after the temperature; 1 = from all.
    """

    steps: int = 64
    block_length: int = 0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    temperature: float = 0.0
    cfg_scale: float = 0.0
    seed: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("block_length", 0), ("temperature", 0), ("cfg_scale", 0)):
            value = getattr(self, name)
            if not (value >= least and math.isfinite(value)):
                raise InputError(f"sampling option `{name}` is {value}: it must be finite and at least {least}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling option `top_p` is {self.top_p}: it must be above 0 and at most 1")
        if self.remasking not in ("low_confidence", "random"):
            raise InputError(f"sampling option `remasking` is {self.remasking!r}: it must be low_confidence or random")


_ANY = ("temperature", "cfg_scale", "seed")
MEANINGFUL: dict[Kind, tuple[str, ...]] = {
    "masked": ("steps", "block_length", "remasking", *_ANY),
    "bert": ("steps", "block_length", "remasking", *_ANY),
    "block": ("steps", "block_length", "remasking", *_ANY),
    "uniform": ("steps", *_ANY),
    "flow": ("steps", *_ANY),
    "autoregressive": (*_ANY, "top_p"),
}


def options_for(objective: Objective, given: Mapping[str, Any]) -> SamplingOptions:
    """The options of a user, those that are None left to their defaults. Temperature is by default 0, but 1 where noise is undone
    token by token (uniform, flow): there greedy choices end in repetitions.

    Raises InputError with one line for an option that this kind has no use for, or a value that is not allowed.
    """
    kind = objective.kind
    values = {name: value for name, value in given.items() if value is not None}
    for name in values:
        if name not in MEANINGFUL[kind]:
            allowed = ", ".join(MEANINGFUL[kind])
            raise InputError(f"sampling option `{name}` means nothing to a model of kind {kind}; it takes {allowed}")
    if kind in ("uniform", "flow"):
        values.setdefault("temperature", 1.0)
    options = SamplingOptions(**values)
    check_blocks(objective, options)
    return options


def check_blocks(objective: Objective, options: SamplingOptions) -> None:
    """InputError if a block model is to be sampled in blocks other than those it was trained on."""
    if objective.kind == "block" and options.block_length not in (0, objective.block_size):
        raise InputError(
            f"sampling option `block_length` is {options.block_length}, but the model was trained on blocks of "
            f"{objective.block_size} tokens: leave it out"
        )
