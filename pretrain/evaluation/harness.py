"""Benchmark tasks of the lm-evaluation-harness (EleutherAI's lm_eval) with a checkpoint of ours."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, Optional

from data.errors import InputError
from pretrain.evaluation.evaluated_run import EvaluatedRun
from pretrain.evaluation.likelihood import LikelihoodOptions
from pretrain.evaluation.text_pairs import described, method

BOOTSTRAPS = 1000  # resamples for the standard error of metrics that are no means


def require_harness() -> None:
    """InputError if lm_eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("evaluate: --harness needs the package lm_eval: pip install -r requirements-eval.txt")


def run_tasks(
    run: EvaluatedRun,
    tasks: Sequence[str],
    options: LikelihoodOptions,
    *,
    include_path: Optional[str] = None,
    num_fewshot: Optional[int] = None,
    limit: Optional[int] = None,
    length: int = 256,
    steps: Optional[int] = None,
) -> dict[str, Any]:
    """Plain values: how answers were scored, and what lm_eval.simple_evaluate says of each task. Collective.

    On ranks that are not the first of their host `results` is empty. InputError for a task that does not exist or cannot be
    loaded, such as one whose data is neither here nor to be downloaded.
    """
    require_harness()
    # A metric's standard error may be taken by a pool of forked processes; a fork of one with a process group can hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from pretrain.evaluation.harness_model import PalimpsestLM

    if include_path is not None and not os.path.isdir(include_path):
        raise InputError(f"evaluate: --include_path {include_path}: no such folder")
    # Reading the thousands of task files that come with the harness takes seconds.
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, 3, 0.6)
            meant = f": did you mean {', '.join(close)}?" if close else "; `lm_eval ls tasks` lists all of them"
            raise InputError(f"evaluate: --harness: there is no task {task}{meant}")
    model = PalimpsestLM(
        run,
        options.estimator,
        options.draws,
        options.cfg_scale,
        options.seed,
        options.batch_size,
        options.greedy,
        length,
        steps,
    )
    try:
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    except InputError:
        raise
    except Exception as error:
        if model.asked:
            raise
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise InputError(f"evaluate: --harness {','.join(tasks)}: the tasks cannot be loaded ({why})") from error
    names = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "config", "lm_eval_version")
    return {
        **run.described(),
        **described(run, options),
        "tasks": list(tasks),
        **{name: found[name] for name in names if found and name in found},
    }


def shown(found: dict[str, Any]) -> list[str]:
    """The lines that a person reads."""
    config = found.get("config", {})
    lines = [
        f"{found['checkpoint']} (step {found['step']}, objective {found['objective']})",
        method(found),
    ]
    if config.get("cut_prompts") or config.get("shortened_generations"):
        lines.append(
            f"  {config['cut_prompts']} prompts lost their beginning, {config['shortened_generations']} generated texts were cut "
            "short: the model's context is shorter than these tasks want"
        )
    for task, metrics in found.get("results", {}).items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if not isinstance(value, (int, float)) or name.endswith("_stderr") or name in ("alias", "sample_len"):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            se = f" +- {error:.4f}" if isinstance(error, float) else ""
            lines.append(f"  {task:24} {name:16} {value:.4f}{se}" + (f"  ({kind})" if kind not in ("", "none") else ""))
    return lines
