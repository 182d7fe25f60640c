"""A model that answers are scored with: its guided logits where they are wanted, and what it would say greedily.

Shapes: B rows, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError
from pretrain.predictor import Objective
from pretrain.sampling.logits import BrokenLogits, Guided, LogitsFn, guided_logits

SCORED_KINDS = ("masked", "bert", "block", "autoregressive")


@dataclass(frozen=True)
class Scored:
    """The model that answers are scored with.

    predict: ids [B, L] int64 -> logits [B, L, V] of any float type, row i about token i, such as pretrain.predictor.Predictor;
    mask tokens stand where a token is unknown. context: most positions of a row. never: ids that greedy unmasking leaves
    out, beside the mask.
    """

    predict: LogitsFn
    objective: Objective
    mask_id: int
    context: int
    never: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.objective.kind not in SCORED_KINDS:
            raise InputError(
                f"objective.kind {self.objective.kind}: the likelihood of an answer given a prompt is not available for it, only "
                f"for {', '.join(SCORED_KINDS)}"
            )

    @property
    def exact(self) -> bool:
        """Whether the chain rule gives the likelihood itself."""
        return self.objective.kind == "autoregressive"


def wanted_logits(
    scored: Scored, ids: np.ndarray, prompts: Sequence[int], rows: np.ndarray, positions: np.ndarray, cfg_scale: float
) -> Iterator[tuple[Tensor, int]]:
    """(float64 logits [k, V] of some of the wanted (row, position) pairs, the first one's number), in order, in chunks.

    Over the whole vocabulary, the mask token included, as in the loss that the model was trained by. Raises BrokenLogits.
    """
    given = torch.from_numpy(ids)
    conditional, unconditional = scored.predict(given), None
    if cfg_scale:
        unconditional = scored.predict(given.masked_fill(_given(prompts, ids.shape[1]), scored.mask_id))
    start = 0
    for logits in guided_logits(conditional, unconditional, cfg_scale, rows, positions):
        yield logits, start
        start += len(logits)


def _given(prompts: Sequence[int], length: int) -> Tensor:
    """[B, L] bool: the positions of the prompts."""
    return torch.arange(length) < torch.tensor(prompts)[:, None]


def greedy_matches(scored: Scored, rows: np.ndarray, prompts: Sequence[int], cfg_scale: float) -> list[bool]:
    """Whether greedy unmasking gives each of `rows` [B, L] back, from its first prompts[b] tokens.

    LLaDA's suffix_greedy_prediction (eval_llada.py): the answer is all masks; each step the model says the likeliest token of each,
    and the surest one alone is kept, until none is left; greedy is an answer that comes out token for token. Here the mask
    token is never said, blocks are filled in order, and a row ends at its first wrong token: what is kept never changes.

    Raises BrokenLogits with the number of a row whose logits are no numbers.
    """
    column = np.arange(rows.shape[1])
    still_open = column >= np.asarray(prompts)[:, None]
    ids = np.where(still_open, scored.mask_id, rows)
    alive, matches = np.arange(len(rows)), np.ones(len(rows), bool)
    while len(alive := alive[still_open[alive].any(1)]):
        candidates = still_open[alive]
        if scored.objective.kind == "block":
            block = column // scored.objective.block_size
            candidates &= block == block[candidates.argmax(1)][:, None]
        at, positions = np.nonzero(candidates)
        given = _given([prompts[i] for i in alive.tolist()], rows.shape[1])
        guided = Guided(scored.predict, given, scored.mask_id, scored.never, cfg_scale)
        chunks = guided.at(torch.from_numpy(ids[alive]), at, positions)
        try:
            best = [torch.softmax(logits, -1).max(-1) for logits in chunks]
        except BrokenLogits as error:
            raise BrokenLogits(int(alive[error.row])) from None
        sure = torch.cat([confidence.cpu() for confidence, _ in best]).numpy()
        said = torch.cat([token.cpu() for _, token in best]).numpy()
        first = np.unique(at, return_index=True)[1]
        surest = first + np.array([part.argmax() for part in np.split(sure, first[1:])])
        where = positions[surest]
        fine = said[surest] == rows[alive, where]
        matches[alive[~fine]] = False
        alive, where = alive[fine], where[fine]
        ids[alive, where] = rows[alive, where]
        still_open[alive, where] = False
    return matches.tolist()
