"""`evaluate`: a checkpoint on held-out blocks, on prompts with answers, or on the tasks of the lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Optional

from data.errors import InputError
from data.shard_set import ShardSet
from pretrain.evaluation.evaluated_run import EvaluatedRun
from pretrain.evaluation.likelihood import LikelihoodOptions
from pretrain.json_file import write_json
from pretrain.training_data import open_set
from pretrain.watching.first_failure import failing_together


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluates a checkpoint on one of: a shard set (--shards), prompts with answers (--pairs), benchmark tasks (--harness).

    Ranks of torchrun share the work; the numbers do not depend on how many there are, nor on the batch size.

    Args:
        run: run folder (its newest checkpoint is taken) or a checkpoint folder.
        shards: folder or address of a shard set; its blocks give the likelihood bound per token and per byte.
        pairs: JSONL file, one {"prompt": text, "answer": text} a line; gives the log-likelihood of each answer.
        harness: tasks of the lm-evaluation-harness, comma-separated (needs requirements-eval.txt).
        json: also write the findings to this file.
        draws: masks of each block (default 1) or of each answer (default 128).
        seed: of the draws.
        batch_size: rows that a rank computes at once.
        blocks: only so many blocks, from the start of the set; 0 = all. --shards alone.
        estimator: `fixed_count` masks (default) or `bernoulli`. --pairs and --harness.
        cfg_scale: classifier-free guidance; 0 = off. --pairs and --harness.
        greedy: also whether each answer is what greedy unmasking gives (default true). --pairs and --harness.
        include_path: folder with task files of your own. --harness alone, as all below.
        num_fewshot: examples in each prompt; by default the task's.
        limit: only so many questions of each task.
        length: most tokens of a generated answer, where the task does not say (default 256).
        steps: forwards for a generated answer (default: one a token).
    """

    run: str
    shards: str = ""
    pairs: str = ""
    harness: str = ""
    json: str = ""
    draws: Optional[int] = None
    seed: int = 0
    batch_size: int = 8
    blocks: Optional[int] = None
    estimator: Optional[Literal["fixed_count", "bernoulli"]] = None
    cfg_scale: Optional[float] = None
    greedy: Optional[bool] = None
    include_path: Optional[str] = None
    num_fewshot: Optional[int] = None
    limit: Optional[int] = None
    length: Optional[int] = None
    steps: Optional[int] = None

    @property
    def likelihood(self) -> LikelihoodOptions:
        names = ("estimator", "draws", "cfg_scale", "greedy")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return LikelihoodOptions(**given, seed=self.seed, batch_size=self.batch_size)


_ANSWERS = ("estimator", "cfg_scale", "greedy")
MEANINGFUL = {
    "shards": ("blocks",),
    "pairs": _ANSWERS,
    "harness": (*_ANSWERS, "include_path", "num_fewshot", "limit", "length", "steps"),
}


def evaluate(options: EvaluateOptions) -> int:
    """Prints what was found, and returns 0. InputError for options that do not go together, before anything is loaded."""
    mode = _mode(options)
    if mode == "harness":
        from pretrain.evaluation.harness import require_harness  # before a large model is read

        require_harness()
    run = EvaluatedRun.open(options.run)
    with failing_together(run.mesh):
        found, lines = _evaluate(run, mode, options)
        if run.mesh.rank == 0:
            print("\n".join(lines))
            if options.json:
                write_json(options.json, found)
    return 0


def _mode(options: EvaluateOptions) -> str:
    chosen = [name for name in MEANINGFUL if getattr(options, name)]
    if len(chosen) != 1:
        raise InputError(f"evaluate: give one of --{', --'.join(MEANINGFUL)}, not {len(chosen)} of them")
    others = {name for names in MEANINGFUL.values() for name in names} - set(MEANINGFUL[chosen[0]])
    for field in fields(options):
        if field.name in others and getattr(options, field.name) is not None:
            where = " and ".join(f"--{mode}" for mode, names in MEANINGFUL.items() if field.name in names)
            raise InputError(
                f"evaluate: --{field.name} means nothing with --{chosen[0]}, only with {where}: leave it out"
            )
    rules = (
        ("draws", 1),
        ("batch_size", 1),
        ("blocks", 0),
        ("limit", 1),
        ("length", 1),
        ("steps", 1),
        ("num_fewshot", 0),
    )
    for name, least in rules:
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"evaluate: --{name} is {value}, it must be at least {least}")
    _ = options.likelihood  # its own rules
    return chosen[0]


def _evaluate(run: EvaluatedRun, mode: str, options: EvaluateOptions) -> tuple[dict[str, Any], list[str]]:
    if mode == "shards":
        from pretrain.evaluation import evaluate as blocks

        blocks.meaning_of(run.config.objective)
        found = blocks.evaluate_blocks(
            run,
            _shard_set(run, options.shards),
            most=options.blocks or 0,
            draws=options.draws or 1,
            seed=options.seed,
            micro_batch=options.batch_size,
        )
        return found, blocks.shown(found)
    if mode == "pairs":
        from pretrain.evaluation import text_pairs

        found = text_pairs.evaluate_pairs(run, options.pairs, options.likelihood)
        return found, text_pairs.shown(found)
    from pretrain.evaluation import harness

    found = harness.run_tasks(
        run,
        [task for task in options.harness.split(",") if task],
        options.likelihood,
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        length=options.length or 256,
        steps=options.steps,
    )
    return found, harness.shown(found)


def _shard_set(run: EvaluatedRun, location: str) -> ShardSet:
    # One process per host reads every byte; the others look at sizes and headers.
    shards = open_set("evaluate: --shards", location, "auto" if run.mesh.rank == 0 else "size", run.config)
    if shards.manifest.tokenizer_sha256 != run.tokenizer.sha256:
        raise InputError(
            f"evaluate: --shards {location} was made with another tokenizer than the run: prepare the text with the run's "
            f"(prepare --tokenizer {run.folder.parent.parent / 'tokenizer.json'})"
        )
    return shards
