"""The model class `palimpsest` of the lm-evaluation-harness. Importing this file needs lm_eval (requirements-eval.txt):

import lm_eval, pretrain.evaluation.harness_model
lm_eval.simple_evaluate(model="palimpsest", model_args="run=runs/quickstart,draws=128", tasks=["arc_easy"])
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data.errors import InputError
from pretrain.evaluation.evaluated_run import EvaluatedRun, gathered, score_together
from pretrain.evaluation.likelihood import LikelihoodOptions, Request, Score
from pretrain.evaluation.likelihood_draws import Estimator, content_key
from pretrain.evaluation.text_pairs import described, encode_pair, text_start
from pretrain.sampling.logits import BrokenLogits
from pretrain.sampling.options import MEANINGFUL, options_for
from pretrain.sampling.sampler import SamplingOptions, generate

BATCH_SIZE = 8  # rows at once, where the harness does not say
_USED = ("do_sample", "temperature", "top_p", "until", "max_gen_toks")


def _rows(batch_size: int | str) -> int:
    """What a batch size that may be text says; `auto`, or `auto:N`, is the default."""
    if str(batch_size).partition(":")[0] == "auto":
        return BATCH_SIZE
    try:
        return int(str(batch_size))
    except ValueError:
        raise InputError(f"palimpsest: batch_size is {batch_size!r}: it must be a whole number or `auto`") from None


def _names(requests: Sequence[Any]) -> list[str]:
    """What messages call each request: its number in the list, and where it is from if the harness says so."""
    return [
        f"{request.request_type} request {number}"
        + (f" (task {request.task_name}, document {request.doc_id})" if request.task_name else "")
        for number, request in enumerate(requests)
    ]


class _Job(NamedTuple):
    """A text to generate. Jobs that are equal but for number, prompt and stop words may share a batch."""

    number: int
    prompt: np.ndarray
    length: int
    options: SamplingOptions
    until: list[str]


@register_model("palimpsest")
class PalimpsestLM(LM):
    """A checkpoint of any objective that has the likelihood of an answer; for generation, of any objective.

    Ranks share each list of requests among themselves, so towards the harness every rank is the only one.

    Args:
        run: run folder, checkpoint folder, or a run that is open already.
        estimator, draws, cfg_scale, seed, batch_size, greedy: pretrain.evaluation.likelihood.LikelihoodOptions.
        length: most tokens of a generated answer, where the task does not say.
        steps: forwards for a generated answer; None: one a token.
        device, max_batch_size: what the harness says of itself; without effect. So is a batch_size of `auto`: it is the default.
    """

    def __init__(
        self,
        run: str | EvaluatedRun,
        estimator: Estimator = "fixed_count",
        draws: int = 128,
        cfg_scale: float = 0.0,
        seed: int = 0,
        batch_size: int | str = BATCH_SIZE,
        greedy: bool = True,
        length: int = 256,
        steps: Optional[int] = None,
        device: Optional[str] = None,
        max_batch_size: Optional[int] = None,
    ):
        super().__init__()
        rows = _rows(batch_size)
        self.options = LikelihoodOptions(estimator, draws, float(cfg_scale), seed, rows, greedy)
        self.run = run if isinstance(run, EvaluatedRun) else EvaluatedRun.open(run)
        if str(batch_size).startswith("auto") and self.run.mesh.rank == 0:
            print(f"palimpsest: batch_size {batch_size} is not searched for, {rows} is taken", file=sys.stderr)
        self.length, self.steps = length, steps
        self.asked = 0  # requests seen
        self.errors: list[float] = []  # standard error of each estimate
        self.cut = 0  # prompts that lost their beginning
        self.shortened = 0  # generated texts that were given fewer tokens than the task allows

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood or its estimated bound in nats, whether the answer is greedy) of each (context, continuation)."""
        scores = self._score([encode_pair(self.run, *request.args) for request in requests], _names(requests))
        self.errors += [found.standard_error for found in scores]
        answers = [(found.log_likelihood, found.greedy) for found in scores]
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole (text,): the sum over the harness's disjoint windows, each token scored once.

        A window is as long as the model's texts: one token of context and the others scored; the last has as much more context as
        it has fewer tokens to score; the first has what stands before a text (pretrain.evaluation.text_pairs.text_start).
        """
        windows = [list(self._windows(*request.args)) for request in requests]
        names = [f"{name}, window {at}" for name, text in zip(_names(requests), windows) for at in range(len(text))]
        scores = iter(self._score([window for text in windows for window in text], names))
        found = []
        for request, text in zip(requests, windows):
            parts = [next(scores) for _ in text]
            self.errors.append(math.sqrt(sum(part.standard_error**2 for part in parts)))
            found.append(math.fsum(part.log_likelihood for part in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A text behind each context, up to the first of its stop words or end-of-text; see pretrain.sampling.sampler."""
        self.asked += len(requests)
        jobs = [self._job(number, *request.args) for number, request in enumerate(requests)]
        mine: dict[int, str] = {}
        names = _names(requests)
        for batch in self._alike(jobs[self.run.mesh.dp_rank :: self.run.mesh.dp]):
            try:
                texts = self._generate(batch)
            except BrokenLogits as error:
                others = f" or one of the {len(batch) - 1} beside it" if len(batch) > 1 else ""
                raise InputError(f"{names[batch[0].number]}{others}: {error} (take another checkpoint)") from error
            mine |= {job.number: text for job, text in zip(batch, texts)}
        texts = gathered(self.run, mine, len(jobs))
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What the harness stores with its results."""
        known = [error for error in self.errors if not math.isnan(error)]
        return {
            **self.run.described(),
            **described(self.run, self.options),
            "mean_standard_error": math.fsum(known) / len(known) if known else math.nan,
            "cut_prompts": self.cut,
            "shortened_generations": self.shortened,
        }

    def _score(self, requests: list[Request], names: list[str]) -> list[Score]:
        self.asked += len(requests)
        scores = score_together(self.run, self.run.scored(), requests, self.options, names)
        self.cut += sum(found.cut > 0 for found in scores)
        return scores

    def _windows(self, text: str) -> Iterable[Request]:
        tokens = self.run.tokenizer.encode_batch([text])[0].astype(np.int64).tolist()
        room = self.run.context - 1
        if room < 1:
            raise InputError("rolling likelihoods need a model of texts of at least 2 tokens, one for the context")
        pairs = get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=room, context_len=1)
        for number, (context, answer) in enumerate(map(make_disjoint_window, pairs)):
            yield Request(np.array(context) if number else text_start(self.run), np.array(answer))

    def _job(self, number: int, context: str, gen_kwargs: dict[str, Any]) -> _Job:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.length))
        kind = self.run.objective.kind
        if kwargs.get("do_sample"):
            useless = [key for key in kwargs if key not in _USED or (key == "top_p" and kind != "autoregressive")]
            if useless:
                raise InputError(
                    f"generation option `{useless[0]}` means nothing to a model of kind {kind}: leave it out of the task"
                )
        length = min(int(kwargs["max_gen_toks"]), self.run.context - 1)
        self.shortened += length < int(kwargs["max_gen_toks"])
        prompt = self.run.tokenizer.encode_batch([context])[0].astype(np.int64) if context else text_start(self.run)
        room = self.run.context - length
        self.cut += len(prompt) > room
        given = {
            "steps": self.steps or length,
            "cfg_scale": self.options.cfg_scale,
            "seed": self.options.seed,
            "top_p": kwargs.get("top_p") if kwargs.get("do_sample") else None,
            "temperature": kwargs.get("temperature")
            if kwargs.get("do_sample") or kind not in ("uniform", "flow")
            else None,
        }
        given = {name: value for name, value in given.items() if name in MEANINGFUL[kind]}
        until = handle_stop_sequences(kwargs.get("until"), eos=None)
        return _Job(number, prompt[max(0, len(prompt) - room) :], length, options_for(self.run.objective, given), until)

    def _alike(self, jobs: Sequence[_Job]) -> Iterable[list[_Job]]:
        """Batches of jobs of one shape; where tokens are drawn each job is alone, so that its draws follow from its prompt."""
        groups: dict[Any, list[_Job]] = {}
        for job in jobs:
            drawn = job.options.temperature > 0 or job.options.remasking == "random"
            groups.setdefault((len(job.prompt), job.length, job.options, drawn and job.number), []).append(job)
        for group in groups.values():
            for start in range(0, len(group), self.options.batch_size):
                yield group[start : start + self.options.batch_size]

    def _generate(self, batch: list[_Job]) -> list[str]:
        run, special, options = self.run, self.run.tokenizer.special, batch[0].options
        prompts = np.stack([job.prompt for job in batch])
        ids = torch.from_numpy(np.pad(prompts, ((0, 0), (0, batch[0].length)), constant_values=special.mask))
        predictor = run.predictor()
        filled = generate(
            predictor,
            ids,
            torch.arange(ids.shape[1]).expand(ids.shape) < prompts.shape[1],
            mask_id=special.mask,
            options=options,
            objective=run.objective,
            vocab_size=predictor.vocab_size,
            forbidden_ids=run.never,
            eos_id=special.eos,
            first_row=int(content_key(batch[0].prompt)[:15], 16),
        )[:, prompts.shape[1] :].tolist()
        return [self._text(row, job.until) for row, job in zip(filled, batch)]

    def _text(self, ids: list[int], until: list[str]) -> str:
        eos = self.run.tokenizer.special.eos
        text = self.run.tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids)
        return postprocess_generated_text(text, until, None)
