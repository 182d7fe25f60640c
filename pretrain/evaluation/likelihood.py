"""The log-likelihood of an answer given a prompt: a lower bound by random masks, or exact where the model is autoregressive.

    requests -> masks of each one (likelihood_draws.py) -> rows of equal length, in batches -> -log p of what is masked
             -> the mean over the draws, and its standard error

Shapes: B rows, L positions, V vocabulary; n tokens of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, Optional

import numpy as np
import torch

from data.errors import InputError
from pretrain.evaluation.likelihood_draws import ESTIMATORS, Estimator, content_key, draw_mask, standard_error
from pretrain.evaluation.likelihood_model import Scored, greedy_matches, wanted_logits
from pretrain.sampling.logits import BrokenLogits

_TOGETHER = 256  # requests whose masks are kept at once


@dataclass(frozen=True)
class LikelihoodOptions:
    """How likelihoods are estimated.

    Args:
        estimator: `fixed_count` (l of L tokens masked, l uniform, weight L / l) or `bernoulli` (each with probability t, weight
            1 / t).
        draws: masks for each answer (for each of its blocks, where the objective has blocks).
        cfg_scale: classifier-free guidance w: logits = u + (1 + w)(c - u), u with the prompt hidden; 0 = off. What is scored
            is then the guided model.
        seed: of the masks.
        batch_size: rows computed at once; the result does not depend on it.
        greedy: also say whether the answer is what greedy unmasking gives.
    """

    estimator: Estimator = "fixed_count"
    draws: int = 128
    cfg_scale: float = 0.0
    seed: int = 0
    batch_size: int = 16
    greedy: bool = True

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise InputError(f"estimator is {self.estimator!r}: it must be {' or '.join(ESTIMATORS)}")
        for name, least in (("draws", 1), ("batch_size", 1), ("cfg_scale", 0)):
            value = getattr(self, name)
            if not (value >= least and math.isfinite(value)):
                raise InputError(f"{name} is {value}: it must be finite and at least {least}")


class Request(NamedTuple):
    """Token ids, 1-D: what is given, and what is scored."""

    prompt: np.ndarray
    answer: np.ndarray


class Score(NamedTuple):
    """What is known of one answer."""

    log_likelihood: float  # nats; of masked objectives the estimate of a lower bound
    standard_error: float  # of the estimate, from the masks; 0 where it is exact, nan for a single draw
    tokens: int
    greedy: bool  # False where it was not asked for
    cut: int  # tokens of the prompt, from its beginning, that did not fit


@dataclass
class _Plan:
    """A request on its way: its row of ids, which of them each draw scores, and what came out."""

    name: str
    ids: np.ndarray  # [L] int64
    prompt: int  # tokens of it that are given
    cut: int
    draws: list[list[tuple[bytes, float]]] = field(default_factory=list)  # of each block: (mask, weight)
    exact: list[bool] = field(default_factory=list)  # of each block: whether one mask is all there is
    losses: dict[tuple[int, bytes], float] = field(default_factory=dict)  # (block, mask) -> sum of -log p
    greedy: bool = True


class _Row(NamedTuple):
    """One input of the model: positions that are masked, of a plan's row up to `stop`."""

    plan: _Plan
    block: int
    mask: bytes
    positions: np.ndarray
    stop: int


DrawMask = Callable[[Estimator, int, str, int, int, int], tuple[np.ndarray, float]]


def score(
    scored: Scored,
    requests: Sequence[Request],
    options: LikelihoodOptions,
    draw: DrawMask = draw_mask,
    names: Optional[Sequence[str]] = None,
) -> list[Score]:
    """The score of every request, in order.

    Every draw is a function of (options.seed, the request's ids, its number), so a score depends neither on the other requests
    nor on their order, nor on the batch size. Masked objectives: the bound of pretrain.evaluation.likelihood_draws over the whole
    answer, or, with blocks, over each block given the clean ones before it. Autoregressive: the chain rule, exact, one row
    for each request. An empty answer has log-likelihood 0 (the empty product) and is greedy; the model is not asked.

    A prompt that is too long loses its beginning. Raises InputError for an answer that alone is longer than the context, and for a
    model whose output is no number; it names the request by its entry of `names` (`request i` without them).
    """
    names = names or [f"request {number}" for number in range(len(requests))]
    plans = [_plan(scored, name, request) for name, request in zip(names, requests, strict=True)]
    found: dict[int, Score] = {}
    order = sorted(range(len(plans)), key=lambda at: len(plans[at].ids))
    for start in range(0, len(order), _TOGETHER):
        part = [plans[at] for at in order[start : start + _TOGETHER]]
        rows = (row for plan in part for row in _rows(scored, plan, options, draw))
        for batch in _batches(rows, options.batch_size):
            with _naming([row.plan for row in batch]):
                _compute(scored, batch, options.cfg_scale)
        if options.greedy and not scored.exact:
            for group in _equal_lengths(part, options.batch_size):
                ids, prompts = np.stack([plan.ids for plan in group]), [plan.prompt for plan in group]
                with _naming(group):
                    matches = greedy_matches(scored, ids, prompts, options.cfg_scale)
                for plan, fine in zip(group, matches):
                    plan.greedy = fine
        for at, plan in zip(order[start:], part):
            found[at] = _score(plan, options)
            plan.draws, plan.losses = [], {}
    return [found[at] for at in range(len(plans))]


@contextmanager
def _naming(plans: Sequence[_Plan]) -> Iterator[None]:
    """Broken logits of a row become a line that names the request; plans: of each row."""
    try:
        yield
    except BrokenLogits as error:
        raise InputError(f"{plans[error.row].name}: {error} (take another checkpoint)") from error


def _plan(scored: Scored, name: str, request: Request) -> _Plan:
    prompt, answer = (np.asarray(part, np.int64) for part in request)
    least = int(scored.objective.shift)  # the first token of a text has no prediction
    if len(answer) and len(prompt) < least:
        raise InputError(f"{name}: the first token of a text is not predicted (objective.shift): give a prompt")
    room = scored.context - len(answer)
    if len(answer) and room < least:
        raise InputError(
            f"{name}: the answer has {len(answer)} tokens, the model was trained on texts of {scored.context}: score "
            f"at most {scored.context - least} at once"
        )
    cut = max(0, len(prompt) - room)
    return _Plan(name, np.concatenate([prompt[cut:], answer]), len(prompt) - cut, cut)


def _blocks(scored: Scored, plan: _Plan) -> list[np.ndarray]:
    """The positions of the answer, in the parts that are scored on their own."""
    positions = np.arange(plan.prompt, len(plan.ids))
    if not len(positions):
        return []
    if scored.objective.kind != "block":
        return [positions]
    return np.split(positions, np.flatnonzero(np.diff(positions // scored.objective.block_size)) + 1)


def _rows(scored: Scored, plan: _Plan, options: LikelihoodOptions, draw: DrawMask) -> Iterator[_Row]:
    """The rows that a request needs; equal masks share one."""
    key = content_key(plan.ids[: plan.prompt], plan.ids[plan.prompt :])
    for number, positions in enumerate(_blocks(scored, plan)):
        count, stop = len(positions), len(plan.ids)
        if scored.objective.kind == "block":  # what follows the block is not seen
            stop = int(positions[-1]) + 1
        exact = scored.exact or (count == 1 and options.estimator == "fixed_count")
        if exact:
            masks = [(np.ones(count, bool), 1.0)]
        else:
            masks = [
                draw(options.estimator, options.seed, f"{key}/{number}", d, options.draws, count)
                for d in range(options.draws)
            ]
        plan.draws.append([(mask.tobytes(), weight) for mask, weight in masks])
        plan.exact.append(exact)
        for content, mask in {mask.tobytes(): mask for mask, _ in masks}.items():
            plan.losses[number, content] = 0.0
            if mask.any():
                yield _Row(plan, number, content, positions[mask], stop)


def _batches(rows: Iterator[_Row], size: int) -> Iterator[list[_Row]]:
    """Rows of equal length, `size` together: the model sees every position of a row, so none is padded."""
    waiting: dict[int, list[_Row]] = {}
    for row in rows:
        group = waiting.setdefault(row.stop, [])
        group.append(row)
        if len(group) == size:
            yield waiting.pop(row.stop)
    yield from waiting.values()


def _equal_lengths(plans: Sequence[_Plan], size: int) -> Iterator[list[_Plan]]:
    """Plans with something to score, in groups of at most `size` whose rows are equally long; they come in order of length."""
    for _, equal in groupby(plans, key=lambda plan: len(plan.ids)):
        group = [plan for plan in equal if len(plan.ids) > plan.prompt]
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _compute(scored: Scored, batch: Sequence[_Row], cfg_scale: float) -> None:
    """Fills in the losses of rows of equal length."""
    ids = np.stack([row.plan.ids[: row.stop] for row in batch])
    if not scored.exact:
        for number, row in enumerate(batch):
            ids[number, row.positions] = scored.mask_id
    counts = [len(row.positions) for row in batch]
    at = np.repeat(np.arange(len(batch)), counts)
    positions = np.concatenate([row.positions for row in batch])
    targets = np.concatenate([row.plan.ids[row.positions] for row in batch])
    losses, right = [], []
    prompts = [row.plan.prompt for row in batch]
    for logits, start in wanted_logits(scored, ids, prompts, at, positions, cfg_scale):
        target = torch.from_numpy(targets[start : start + len(logits)]).to(logits.device)[:, None]
        losses.append(-torch.log_softmax(logits, -1).gather(1, target)[:, 0].cpu())
        logits[:, [scored.mask_id, *scored.never]] = -torch.inf
        right.append((logits.argmax(-1) == target[:, 0]).cpu())
    loss, correct = torch.cat(losses).numpy(), torch.cat(right).numpy()
    for row, start, count in zip(batch, np.cumsum(counts) - counts, counts):
        row.plan.losses[row.block, row.mask] = math.fsum(loss[start : start + count])
        if scored.exact:
            row.plan.greedy = bool(correct[start : start + count].all())


def _score(plan: _Plan, options: LikelihoodOptions) -> Score:
    total = variance = 0.0
    for number, (draws, exact) in enumerate(zip(plan.draws, plan.exact)):
        values = np.array([weight * plan.losses[number, mask] for mask, weight in draws])
        total += math.fsum(values) / len(values)
        variance += 0.0 if exact else standard_error(values) ** 2
    tokens = len(plan.ids) - plan.prompt
    return Score(-total, math.sqrt(variance), tokens, plan.greedy and (options.greedy or not tokens), plan.cut)
