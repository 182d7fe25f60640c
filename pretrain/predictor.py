"""What a trained network says about each token of a row, whatever it was trained for: ids in, aligned logits out.

Objectives differ in what the network reads and in which of its outputs speaks of which token:

    masked, bert, uniform, flow    reads the row, every token sees every other; output i speaks of token i
    block                          the same, but a token sees its own block of `block_size` positions and those before it
    shift (weights of a left-to-right model)   output i - 1 speaks of token i, so nothing speaks of token 0
    autoregressive                 reads end-of-text and then the row without its last token, each place sees only what is
                                   before it; output i speaks of token i

Shapes: B rows, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional, get_args

import torch
from torch import Tensor

from data.batch import PADDING_DOCUMENT, Kind
from data.errors import InputError
from data.noise import Schedule
from parallel.engine import Engine, Microbatch, model_inputs
from pretrain.config import Config
from pretrain.model import DiffusionTransformer
from pretrain.objective import lookahead, schedule


@dataclass(frozen=True)
class Objective:
    """What a network was trained for, as far as prediction and sampling depend on it.

    Args:
        kind: of the objective.
        block_size: positions of a block of kind `block`, else 0.
        shift: the hidden state at i - 1 predicts token i.
        ahead: tokens to its right that a token sees, while attention still grows from causal to full; None: all.
        schedule: of the noise levels that `uniform` steps through.
    """

    kind: Kind = "masked"
    block_size: int = 0
    shift: bool = False
    ahead: Optional[int] = None
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"objective.kind is {self.kind!r}: this version knows {', '.join(get_args(Kind))}")
        if (self.block_size > 0) != (self.kind == "block"):
            raise InputError(
                f"objective.block_size is {self.block_size} with objective.kind {self.kind}: "
                "kind block needs one of at least 1, any other kind needs 0"
            )
        for name, used in (("shift", self.shift), ("anneal_attention", self.ahead is not None)):
            if used and self.kind not in ("masked", "bert"):
                raise InputError(f"objective.{name} goes with the kinds masked and bert, not with {self.kind}")

    def signal(self, t: float) -> float:
        """alpha(t), what is left of a clean token at level t (of `flow`: what argmax leaves), as in training."""
        return 1.0 - self.schedule.probability(t)


MASKED = Objective()


def objective_of(config: Config, step: int) -> Objective:
    """The Objective of a run after `step` optimizer steps."""
    section = config.objective
    return Objective(section.kind, section.block_size, section.shift, lookahead(config, step), schedule(section))


class Predictor:
    """Aligned logits of one network: `predictor(ids)[b, i]` is about token i of row b.

    `forward` takes a microbatch (parallel.engine) and returns logits [B, L, V]. Over an engine every call is collective.
    """

    def __init__(
        self,
        forward: Callable[[Microbatch], Tensor],
        vocab_size: int,
        objective: Objective = MASKED,
        *,
        eos_id: int,
    ):
        self.forward = forward
        self.vocab_size = vocab_size
        self.objective = objective
        self.eos_id = eos_id

    @classmethod
    def of_model(cls, model: DiffusionTransformer, objective: Objective, *, eos_id: int) -> Predictor:
        """Over a whole model in this process, such as pretrain.load_model gives."""
        device = next(model.parameters()).device

        def forward(microbatch: Microbatch) -> Tensor:
            logits = model(**model_inputs(microbatch, device, torch.ones((), device=device)))
            assert isinstance(logits, Tensor), "no targets were given"
            return logits

        return cls(forward, model.shape.vocab_size, objective, eos_id=eos_id)

    @classmethod
    def of_engine(cls, engine: Engine, objective: Objective, *, eos_id: int) -> Predictor:
        """Over a model in training, of any layout; all ranks call it alike."""
        return cls(engine.forward, engine.vocab_size, objective, eos_id=eos_id)

    @torch.no_grad()
    def __call__(self, ids: Tensor, lengths: Optional[Tensor] = None) -> Tensor:
        """Logits [B, L, V] float32, on the network's device. ids: [B, L] int64, mask tokens where a masked network shall guess.

        lengths: [B], tokens of each row that are not padding on its right (None: all); the rows of padding mean nothing. With
        `shift` row 0 is NaN, so that whoever reads it notices.
        """
        logits = self.forward(self.microbatch(ids, lengths)).float()
        if self.objective.shift:
            nothing = torch.full_like(logits[:, :1], torch.nan)
            logits = torch.cat((nothing, logits[:, :-1]), dim=1)
        return logits

    def microbatch(self, ids: Tensor, lengths: Optional[Tensor] = None) -> Microbatch:
        """What the network is given for `ids`: one text a row."""
        column = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device).expand(ids.shape)
        if self.objective.kind == "autoregressive":
            first = torch.full_like(ids[:, :1], self.eos_id)
            ids = torch.cat((first, ids[:, :-1]), dim=1)
        microbatch = {"noisy_ids": ids, "position_ids": column.contiguous()}
        if self.objective.kind in ("autoregressive", "block") or self.objective.ahead is not None:
            rank = column // (self.objective.block_size or 1)
            group = torch.full_like(rank, -1)
            microbatch["visibility"] = torch.stack((rank, rank + (self.objective.ahead or 0), group), dim=-1)
        if lengths is not None and bool((lengths < ids.shape[1]).any()):
            inside = column < lengths.to(ids.device)[:, None]
            microbatch["document_ids"] = torch.where(inside, 0, PADDING_DOCUMENT).to(torch.int32)
        return microbatch
