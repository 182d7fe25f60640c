"""Prompts and answers as text: read from JSONL, made tokens, scored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data.errors import InputError
from pretrain.evaluation.evaluated_run import EvaluatedRun, score_together
from pretrain.evaluation.likelihood import LikelihoodOptions, Request
from pretrain.evaluation.likelihood_model import SCORED_KINDS
from pretrain.evaluation.ratio import Estimate, ratio


class Pair(NamedTuple):
    """A prompt, perhaps empty, and the answer that is scored."""

    prompt: str
    answer: str


def read_pairs(path: str) -> list[Pair]:
    """The pairs of a JSONL file, one object {"prompt": text, "answer": text} a line; InputError names the line that is none."""
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise InputError(f"--pairs {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--pairs {path}: not UTF-8 (byte {error.start})") from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            pair = Pair(record["prompt"], record["answer"])
            _ = [part.encode() for part in pair]  # half of a surrogate pair is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(
                f'--pairs {path}, line {number}: not an object {{"prompt": text, "answer": text}} with both keys'
            ) from None
        found.append(pair)
    if not found:
        raise InputError(f"--pairs {path}: no pairs in it")
    return found


def split_pair(prompt: str, answer: str) -> Pair:
    """Spaces at the end of a prompt belong to the answer, as in the lm-evaluation-harness (TemplateLM._encode_pair)."""
    given = prompt.rstrip()
    return Pair(given, prompt[len(given) :] + answer)


def encode_pair(run: EvaluatedRun, prompt: str, answer: str) -> Request:
    """Tokens as the harness has them: prompt and answer are encoded together and cut behind the prompt's tokens.

    Where a token would reach over the border the two are encoded one by one: else a part of the answer, or all of it, would
    count as given. Before an answer without a prompt stands `text_start`.
    """
    prompt, answer = split_pair(prompt, answer)
    whole, given, alone = run.tokenizer.encode_batch([prompt + answer, prompt, answer])
    if not prompt:
        return Request(text_start(run), alone)
    clean = np.array_equal(whole[: len(given)], given)
    return Request(given, whole[len(given) :] if clean else alone)


def text_start(run: EvaluatedRun) -> np.ndarray:
    """What a model was shown before the first token of a text: the end of another, but nothing (ids [0]) if texts were isolated.

    An autoregressive model's predictor sets end-of-text before every row by itself; with objective.shift nothing predicts
    the first token, so something has to stand there.
    """
    isolated = run.config.data.packing == "isolate" and not run.objective.shift
    none = run.objective.kind == "autoregressive" or isolated
    return np.array([] if none else [run.tokenizer.special.eos], np.int64)


def evaluate_pairs(run: EvaluatedRun, path: str, options: LikelihoodOptions) -> dict[str, Any]:
    """Plain values: the log-likelihood of each answer given its prompt (nats), and means per pair, token and byte. Collective.

    The standard error of a pair is that of its draws; those of the means are over pairs.
    """
    scored, pairs = run.scored(), read_pairs(path)
    names = [f"--pairs {path}, pair {number} of {len(pairs)}" for number in range(1, len(pairs) + 1)]
    scores = score_together(run, scored, [encode_pair(run, *pair) for pair in pairs], options, names)
    values = torch.tensor([found.log_likelihood for found in scores], dtype=torch.float64)
    sizes = [len(split_pair(*pair).answer.encode()) for pair in pairs]
    tokens = torch.tensor([found.tokens for found in scores], dtype=torch.float64)
    return {
        **run.described(),
        "pairs": path,
        **described(run, options),
        "count": len(pairs),
        "tokens": int(tokens.sum()),
        "bytes": sum(sizes),
        "cut_prompts": sum(found.cut > 0 for found in scores),
        "per_pair": ratio(values, torch.ones_like(values))._asdict(),
        "per_token": ratio(values, tokens)._asdict(),
        "per_byte": ratio(values, torch.tensor(sizes, dtype=torch.float64))._asdict(),
        "greedy": sum(found.greedy for found in scores) / len(scores) if options.greedy else None,
        "answers": [
            {
                "log_likelihood": found.log_likelihood,
                "se": found.standard_error,
                "tokens": found.tokens,
                "bytes": size,
                "greedy": found.greedy if options.greedy else None,
                "cut": found.cut,
            }
            for found, size in zip(scores, sizes)
        ],
    }


def described(run: EvaluatedRun, options: LikelihoodOptions) -> dict[str, Any]:
    """How answers are scored, in words and numbers; of an objective without answer likelihoods only what its texts follow from."""
    chosen = {"seed": options.seed, "cfg_scale": options.cfg_scale}
    if run.objective.kind not in SCORED_KINDS:
        return chosen
    exact = run.objective.kind == "autoregressive"
    return {
        "measure": "log-likelihood of an answer given its prompt",
        "bound": "exact" if exact else "lower bound",
        "estimator": "chain rule" if exact else options.estimator,
        "draws": 1 if exact else options.draws,
        **chosen,
    }


def method(found: dict[str, Any]) -> str:
    """The line about `described`."""
    measured = ""
    if "measure" in found:
        measured = f"{found['measure']}: {found['bound']}; {found['estimator']}, draws an answer {found['draws']}, "
    return f"  {measured}seed {found['seed']}, CFG scale {found['cfg_scale']:g}"


def shown(found: dict[str, Any]) -> list[str]:
    """The lines that a person reads."""
    lines = [
        f"{found['checkpoint']} (step {found['step']}, objective {found['objective']}) on {found['pairs']}",
        f"  {found['count']:,} answers, {found['tokens']:,} tokens, {found['bytes']:,} bytes"
        + (f"; {found['cut_prompts']} prompts lost their beginning, being too long" if found["cut_prompts"] else ""),
        method(found),
    ]
    for name in ("pair", "token", "byte"):
        e = Estimate(**found[f"per_{name}"])
        lines.append(f"  nats per {name:6}  {e.value:.4f}" + ("" if math.isnan(e.se) else f" +- {e.se:.4f}"))
    if found["greedy"] is not None:
        lines.append(f"  greedy          {100 * found['greedy']:.1f}% of the answers come out token for token")
    return lines
