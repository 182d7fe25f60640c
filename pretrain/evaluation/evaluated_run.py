"""A trained model ready to be evaluated: on every rank a whole copy, which shares the work with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from data.tokenizer import TextTokenizer
from parallel.engine import LossOutput, Microbatch, model_inputs
from parallel.mesh import Mesh, build_mesh
from pretrain.config import Config
from pretrain.evaluation.likelihood import LikelihoodOptions, Request, Score, score
from pretrain.evaluation.likelihood_model import Scored
from pretrain.load_model import find_checkpoint, load_model, load_run_tokenizer
from pretrain.metrics import sum_over_ranks
from pretrain.model import DiffusionTransformer
from pretrain.predictor import Objective, Predictor, objective_of

_FIELDS = len(Score._fields)


@dataclass
class EvaluatedRun:
    """One checkpoint, read on this rank; `mesh` and `forward` are those of an engine without a training side."""

    folder: Path
    model: DiffusionTransformer
    config: Config
    trainer: dict[str, Any]
    tokenizer: TextTokenizer
    mesh: Mesh

    @classmethod
    def open(cls, path: str) -> EvaluatedRun:
        """The newest checkpoint of a run folder, or the checkpoint that `path` is. InputError if there is none."""
        folder = find_checkpoint(path)
        model, config, trainer = load_model(folder)
        tokenizer = load_run_tokenizer(folder, trainer)
        return cls(folder, model, config, trainer, tokenizer, build_mesh())

    @property
    def chunks(self) -> list[DiffusionTransformer]:
        return [self.model]

    @property
    def objective(self) -> Objective:
        return objective_of(self.config, self.trainer["step"])

    @property
    def context(self) -> int:
        """Tokens of the texts that it was trained on."""
        return self.config.data.sequence_length

    @property
    def never(self) -> range:
        """Ids of the model that the tokenizer does not have."""
        return range(self.tokenizer.vocab_size, self.config.model.vocab_size)

    @torch.no_grad()
    def forward(self, microbatch: Microbatch) -> LossOutput:
        """As parallel.engine.Engine.forward; not collective."""
        device = self.mesh.device
        return self.model(**model_inputs(microbatch, device, torch.ones((), device=device)))

    def predictor(self) -> Predictor:
        return Predictor.of_model(self.model, self.objective, eos_id=self.tokenizer.special.eos)

    def scored(self) -> Scored:
        """InputError where its objective has no answer likelihood."""
        return Scored(self.predictor(), self.objective, self.tokenizer.special.mask, self.context, self.never)

    def described(self) -> dict[str, Any]:
        """What every report says of it."""
        return {
            "checkpoint": str(self.folder),
            "step": self.trainer.get("step"),
            "objective": self.config.objective.kind,
        }


def score_together(
    run: EvaluatedRun,
    scored: Scored,
    requests: Sequence[Request],
    options: LikelihoodOptions,
    names: Optional[Sequence[str]] = None,
) -> list[Score]:
    """pretrain.evaluation.likelihood.score with the requests dealt out over the ranks; all of them get all scores. Collective.

    names: what messages call each request; by default `request i`, i its number among all of them.
    """
    names = names or [f"request {number}" for number in range(len(requests))]
    mine = range(run.mesh.dp_rank, len(requests), run.mesh.dp)
    table = torch.zeros(len(requests), _FIELDS, dtype=torch.float64)
    scores = score(scored, [requests[i] for i in mine], options, names=[names[i] for i in mine])
    for at, found in zip(mine, scores):
        table[at] = torch.tensor(found, dtype=torch.float64)
    return [
        Score(value, error, int(tokens), bool(greedy), int(cut))
        for value, error, tokens, greedy, cut in sum_over_ranks(table, run.mesh).tolist()
    ]


def gathered(run: EvaluatedRun, mine: dict[int, str], count: int) -> list[str]:
    """Texts 0 .. count - 1, each of which one rank has made. Collective."""
    everyone: list[Any] = [mine]
    if run.mesh.dp > 1:
        everyone = [None] * run.mesh.dp
        dist.all_gather_object(everyone, mine, group=run.mesh.dp_group)
    found = {at: text for part in everyone for at, text in part.items()}
    return [found[at] for at in range(count)]
