"""What a study is asked for: its YAML as dataclasses. A mistake in it is one line that names the key."""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from data.errors import InputError

Quantity = Literal["parameters", "width", "tokens", "budget", "batch"]
Objective = Literal["masked", "autoregressive"]


@dataclass
class RuleConfig:
    """A number that may follow the cell: at * (quantity / reference)^exponent.

    Args:
        rule: `constant`: `at` in every cell; `power`: it follows `of`.
        at: the value, for `power` that of a cell whose quantity is `reference`.
        of: quantity: `parameters` (as study.count counts), `width` (hidden size), `tokens` of the cell, `budget` (FLOPs), or
            `batch` (samples; for the learning rate alone).
        reference: the quantity at which the value is `at`.
        exponent: of the power.
    """

    rule: Literal["constant", "power"] = "constant"
    at: float = 0.0
    of: Quantity = "parameters"
    reference: float = 1.0
    exponent: float = 0.0


@dataclass
class OptimumConfig:
    """Where the best size is looked for: N = coefficient * C^exponent. The defaults are about SMDM's (arXiv 2410.18514).

    Args:
        coefficient: parameters at one FLOP, for a masked model.
        exponent: of the compute.
        autoregressive: what the estimate is multiplied by for an autoregressive model.
        spread: sizes are taken from 1 / spread to spread times the estimate.
    """

    coefficient: float = 1.92e-4
    exponent: float = 0.62
    autoregressive: float = 1.9
    spread: float = 3.0


@dataclass
class StudyConfig:
    """A scaling-law study: which models, how large, on how many tokens, trained how.

    Args:
        name: folder of the study inside `dir`.
        dir: folder that holds studies.
        base: config of `train` that every cell starts from; what the keys below set is replaced.
        overrides: keys of `base` that the study changes: {train.val_samples: 512, ...}.
        family: file with the sizes, or the sizes themselves: {NAME: {num_layers: ..., hidden_size: ..., ...}, ...}.
        design: `isoflop`: budgets x sizes, tokens follow; `ladder`: sizes x tokens.
        budgets: FLOPs of a cell (isoflop).
        sizes: names in the family; empty: all of it.
        sizes_per_budget: isoflop: only so many sizes, evenly around `optimum` (0: all).
        optimum: the estimate that sizes_per_budget goes by.
        count: which parameters N counts: without embedding and head, or all.
        flops: how FLOPs are counted (pretrain.flops).
        objectives: what is trained: masked, autoregressive.
        tokens: of a cell (ladder).
        tokens_per_parameter: tokens of a cell as multiples of its N (ladder).
        unique: unique tokens of a cell; the data-constrained axis. The set is cut to whole shards.
        epochs: ladder with `unique`: tokens are unique x epochs.
        max_epochs: how often a cell may read its data; more tokens than that and it is left out.
        repeats: cells that differ by their seed alone.
        learning_rate: the peak; min_lr of `base` keeps its share of it. at 0: that of `base`.
        batch: samples in a step; at 0: that of `base`.
        batch_multiple: the batch is a multiple of this.
        warmup: share of the steps.
        decay: share of the steps (optimizer.schedule wsd).
        validations: in the course of a cell; the last is at its last step.
        min_steps: cells of fewer steps are left out.
        ranks: processes of a cell; one GPU each.
        gpu_memory: GiB of a GPU that the estimate of a cell must fit into; 0: no check.
    """

    name: str = "study"
    dir: str = "runs/studies"
    base: str = "configs/quickstart.yaml"
    overrides: dict[str, Any] = field(default_factory=dict)
    family: Union[str, dict[str, dict[str, int]]] = "configs/families/smdm.yaml"
    design: Literal["isoflop", "ladder"] = "isoflop"
    budgets: list[float] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    sizes_per_budget: int = 0
    optimum: OptimumConfig = field(default_factory=OptimumConfig)
    count: Literal["non_embedding", "total"] = "non_embedding"
    flops: Literal["exact", "6n", "6n_total", "palm", "chinchilla"] = "exact"
    objectives: list[Objective] = field(default_factory=lambda: ["masked"])
    tokens: list[float] = field(default_factory=list)
    tokens_per_parameter: list[float] = field(default_factory=list)
    unique: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    max_epochs: float = 1.0
    repeats: int = 1
    learning_rate: RuleConfig = field(default_factory=RuleConfig)
    batch: RuleConfig = field(default_factory=RuleConfig)
    batch_multiple: int = 1
    warmup: float = 0.05
    decay: float = 0.2
    validations: int = 1
    min_steps: int = 50
    ranks: int = 1
    gpu_memory: float = 0.0

    @property
    def folder(self) -> Path:
        return Path(self.dir) / self.name


def load_study(path: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study in a YAML file whose one section is `study`. overrides: `--study.key value ...`. InputError for any mistake."""
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    if not Path(path).is_file():
        raise InputError(f"study: no file {path}: name a YAML file with a section `study` (configs/study_*.yaml)")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(StudyConfig, "study")
    _check_keys(path)
    try:
        values = parser.instantiate(parser.parse_args(["--config", path, *overrides]))
    except ArgumentError as error:
        raise InputError(f"study {path}: {_one_line(str(error))}") from None
    study: StudyConfig = values.study
    check_study(study)
    return study


def to_yaml(study: StudyConfig) -> str:
    """The study as a file that `load_study` reads."""
    plain = yaml.safe_load(yaml.safe_dump(_plain(asdict(study)), sort_keys=False))
    return yaml.safe_dump({"study": plain}, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def known_keys() -> list[str]:
    """Every dotted key of a study."""
    found = []
    for key, hint in typing.get_type_hints(StudyConfig).items():
        inner = [f"study.{key}.{one.name}" for one in fields(hint)] if hint in (RuleConfig, OptimumConfig) else []
        found += inner or [f"study.{key}"]
    return found


def _check_keys(path: str) -> None:
    """The first key that no study has, with the likeliest one that was meant: before the parser, whose words are its own."""
    try:
        given = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"study {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"study {path}: no YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(given, dict) or set(given) != {"study"} or not isinstance(given["study"], dict):
        raise InputError(f"study {path}: it must hold one section `study:` and its keys, and nothing else")
    known = known_keys()
    tops = {key.split(".")[1] for key in known}
    for key, value in given["study"].items():
        inner = (
            [f"study.{key}.{name}" for name in value] if isinstance(value, dict) and f"study.{key}" not in known else []
        )
        for name in inner if key in tops else [f"study.{key}"]:
            if name not in known and key not in tops or "." in name[6:] and name not in known:
                close = difflib.get_close_matches(name, known, 3, 0.5)
                meant = f"did you mean {', '.join(close)}?" if close else f"the keys are {', '.join(sorted(tops))}"
                raise InputError(f"study {path}: unknown key {name}: {meant}")


def _one_line(message: str) -> str:
    text = " ".join(message.split())
    if found := re.search(r'Parser key "([\w.]+)":? (.*?)Got value: (.*)', text):
        hint: Any = StudyConfig
        for part in found[1].split(".")[1:]:
            hint = typing.get_type_hints(hint).get(part) if hint else None
        allowed = _allowed(hint)
        return f"{found[1]} must be {allowed}, got {found[3].strip()[:80]}"
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        close = difflib.get_close_matches(found[1].lstrip("-"), known_keys(), 3, 0.5)
        return f"unknown key {found[1].lstrip('-')}" + (f": did you mean {', '.join(close)}?" if close else "")
    return text[:300]


def _allowed(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list of {_allowed(typing.get_args(hint)[0])}"
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")


def check_study(study: StudyConfig) -> None:
    """InputError, naming the key and what is allowed, for values that no study can have or that mean nothing together."""
    isoflop = study.design == "isoflop"
    positive = "positive numbers"

    def numbers(values: Sequence[float]) -> bool:
        return all(math.isfinite(value) and value > 0 for value in values)

    rules: list[tuple[str, Any, object, str]] = [
        ("name", study.name, re.fullmatch(r"\w[\w.-]*", study.name), "a plain folder name"),
        ("dir", study.dir, study.dir, "a folder"),
        ("budgets", study.budgets, numbers(study.budgets), positive),
        ("budgets", study.budgets, bool(study.budgets) == isoflop, "FLOPs for design isoflop, and empty for a ladder"),
        ("budgets", study.budgets, len(set(study.budgets)) == len(study.budgets), "different from each other"),
        ("sizes", study.sizes, len(set(study.sizes)) == len(study.sizes), "different from each other"),
        ("sizes_per_budget", study.sizes_per_budget, study.sizes_per_budget >= 0, ">= 0 (0 = all)"),
        ("sizes_per_budget", study.sizes_per_budget, isoflop or not study.sizes_per_budget, "0 for a ladder"),
        (
            "optimum",
            asdict(study.optimum),
            numbers([study.optimum.coefficient, study.optimum.autoregressive]),
            positive,
        ),
        ("optimum.spread", study.optimum.spread, study.optimum.spread > 1, "above 1"),
        ("objectives", study.objectives, study.objectives, "masked, autoregressive or both"),
        ("objectives", study.objectives, len(set(study.objectives)) == len(study.objectives), "each named once"),
        ("tokens", study.tokens, numbers(study.tokens), positive),
        ("tokens_per_parameter", study.tokens_per_parameter, numbers(study.tokens_per_parameter), positive),
        ("unique", study.unique, numbers(study.unique), positive),
        ("epochs", study.epochs, numbers(study.epochs), positive),
        (
            "epochs",
            study.epochs,
            not study.epochs or (study.unique and not isoflop),
            "empty, but for a ladder with unique",
        ),
        ("max_epochs", study.max_epochs, numbers([study.max_epochs]), "> 0"),
        ("repeats", study.repeats, study.repeats >= 1, ">= 1"),
        ("batch_multiple", study.batch_multiple, study.batch_multiple >= 1, ">= 1"),
        ("warmup", study.warmup, 0 <= study.warmup < 1, "a share, in [0, 1)"),
        ("decay", study.decay, 0 <= study.decay <= 1 - study.warmup, "a share that with warmup is at most 1"),
        ("validations", study.validations, study.validations >= 1, ">= 1: the loss is that of the last one"),
        ("min_steps", study.min_steps, study.min_steps >= 1, ">= 1"),
        ("ranks", study.ranks, study.ranks >= 1, ">= 1"),
        ("gpu_memory", study.gpu_memory, study.gpu_memory >= 0, ">= 0 (0 = no check)"),
        ("batch.of", study.batch.of, study.batch.of != "batch", "parameters, width, tokens or budget"),
    ]
    for key, value, fine, allowed in rules:
        if not fine:
            raise InputError(f"study.{key} is {value!r}, it must be {allowed}")
    for key in ("learning_rate", "batch"):
        rule: RuleConfig = getattr(study, key)
        if not (math.isfinite(rule.at) and rule.at >= 0 and math.isfinite(rule.exponent) and numbers([rule.reference])):
            raise InputError(f"study.{key}: at must be >= 0 and reference > 0, it is {asdict(rule)}")
        if rule.rule == "power" and rule.of == "budget" and not isoflop:
            raise InputError(f"study.{key}.of is budget, but a ladder has none: parameters, width or tokens")
        if rule.rule == "power" and not rule.at:
            raise InputError(f"study.{key}.rule is power: say study.{key}.at, the value at study.{key}.reference")
    given = [key for key in ("tokens", "tokens_per_parameter", "epochs") if getattr(study, key)]
    if isoflop and given:
        raise InputError(
            f"study.{given[0]} is set, but with design isoflop the budgets say how many tokens a cell takes"
        )
    if not isoflop and len(given) != 1:
        raise InputError(
            f"study: a ladder takes its tokens from one of tokens, tokens_per_parameter, or unique with epochs; given: "
            f"{', '.join(given) or 'none'}"
        )
    for key in study.overrides:
        if key in SET_BY_STUDY or key.startswith("run.") and key != "run.seed":
            raise InputError(f"study.overrides: the study itself sets {key} in every cell: leave it out")
        if not re.fullmatch(r"\w+\.\w+", key):
            raise InputError(
                f"study.overrides: {key!r} is no key of a config: write section.key, as in train.val_samples: 512"
            )


# What the study sets in every cell's config.
SET_BY_STUDY = {
    *("model.num_layers", "model.hidden_size", "model.num_heads", "model.num_kv_heads", "model.ffn_hidden_size"),
    *("objective.kind", "train.steps", "train.stop_at", "train.validate_every"),
    *("optimizer.warmup_steps", "optimizer.decay_steps"),
}
