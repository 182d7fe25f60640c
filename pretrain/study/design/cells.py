"""The cells of a study: which there are, what each trains, and its name, which no other cell changes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

from data.errors import InputError
from parallel.shape import ModelShape, parameter_counts
from pretrain.addresses import without_credentials
from pretrain.config import Config, ObjectiveConfig
from pretrain.flops import flops_per_token_in
from pretrain.load_config import load_config
from pretrain.lr_schedule import check_schedule
from pretrain.planning.case import case_of, check_layout, check_memory, masked_fraction
from pretrain.planning.plan import check_objective
from pretrain.study.design.corpus import Corpus, check_apart, part_of
from pretrain.study.design.family import Size
from pretrain.study.design.identity import cell_id, plain
from pretrain.study.design.rules import micro_batch, value_of, whole_batch
from pretrain.study.design.spec import StudyConfig


@dataclass(frozen=True)
class Cell:
    """One run of a study. N: parameters as study.count counts, D: tokens that its whole steps read, C: FLOPs that they cost.

    budget: the C that was asked for (isoflop), target: the tokens. unique_tokens, epochs: of the data, and D / unique_tokens where
    that is more than 1. part: shards of the set, empty: all. status: `planned`, or `excluded` for the reason.
    """

    id: str
    objective: str
    size: str
    N: int
    D: int
    C: float
    budget: Optional[float]
    target: float
    unique_tokens: Optional[int]
    epochs: float
    part: tuple[int, ...]
    repeat: int
    seed: int
    lr: float
    batch: int
    steps: int
    ranks: int
    status: str = "planned"
    reason: str = ""

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it stands in the design: what stays when its training is changed."""
        asked = self.budget if self.budget is not None else -round(self.target)
        return self.objective, self.size, asked, self.part, self.repeat


def base_config(study: StudyConfig) -> Config:
    """The config that all cells start from, study.overrides applied. InputError that says which file or key is wrong."""
    if not Path(study.base).is_file():
        raise InputError(f"study.base: no file {study.base}: name a config of `train`")
    words = [
        f"--{key}={value if isinstance(value, (str, float)) else json.dumps(value)}"
        for key, value in study.overrides.items()
    ]
    try:
        base = load_config(["--config", study.base, *words])
    except InputError as error:
        raise InputError(f"study.base {study.base} with study.overrides: {error}") from None
    values = plain(base)
    if values != without_credentials(values):
        raise InputError(
            "study.base: an address in it holds a user, a password or a query, which no stored config may: use the environment"
        )
    check_objective(base)
    for key, value in (
        ("optimizer.lr", base.optimizer.lr),
        ("train.micro_batch_size", base.train.micro_batch_size),
        ("train.global_batch_size", base.train.global_batch_size),
        ("data.sequence_length", base.data.sequence_length),
    ):
        if value <= 0:
            raise InputError(f"study.base: {key} is {value}, it must be positive")
    if base.optimizer.schedule == "stages":
        raise InputError(
            "study.base: optimizer.schedule is stages, whose steps no cell could follow: wsd, cosine or constant"
        )
    if not base.data.val_shards or not base.data.shards:
        raise InputError(
            "study.base: data.shards and data.val_shards must be named: the loss of a cell is that of its validation"
        )
    if base.train.init_from:
        raise InputError("study.base: train.init_from is set, but the cells of a scaling law start from nothing")
    return base


def cells_of(study: StudyConfig, base: Config, family: dict[str, Size], corpus: Corpus) -> list[tuple[Cell, Config]]:
    """Every cell and its config of `train`, in the order of the design.

    InputError for a size that is not in the family, two cells or two parts of the data that are the same, or a cell that `train`
    would refuse.
    """
    names = study.sizes or list(family)
    if unknown := [name for name in names if name not in family]:
        raise InputError(f"study.sizes: {unknown[0]} is not in the family: {', '.join(family)}")
    check_apart(corpus, study.unique)
    cells = [
        _cell(study, base, kind, name, family[name], target, corpus, repeat)
        for kind in study.objectives
        for name, target in _targets(study, base, {name: family[name] for name in names}, corpus, kind)
        for repeat in range(study.repeats)
    ]
    seen: dict[tuple[object, ...], str] = {}
    for cell, _ in cells:
        trained = (cell.objective, cell.size, cell.D, cell.part, cell.repeat)
        if trained in seen:
            raise InputError(
                f"study: cells {seen[trained]} and {cell.id} train the same: their tokens differ by less than a step"
            )
        seen[trained] = cell.id
    return cells


@dataclass(frozen=True)
class _Target:
    """What a cell is to be: tokens before steps make them whole, and the unique tokens asked for (None: all data)."""

    tokens: float
    budget: Optional[float] = None
    unique: Optional[float] = None


def _targets(
    study: StudyConfig, base: Config, sizes: dict[str, Size], corpus: Corpus, kind: str
) -> Iterator[tuple[str, _Target]]:
    share = _masked(_objective(base, kind))
    uniques: list[Optional[float]] = [*study.unique] or [None]
    if study.design == "isoflop":
        for budget in study.budgets:
            for name in _around(study, base, sizes, budget, kind):
                tokens = budget / _flops(study, base, sizes[name], share)
                for unique in uniques:
                    yield name, _Target(tokens, budget, unique)
        return
    for name, size in sizes.items():
        counted = _counted(study, base, size)
        for tokens in study.tokens or [ratio * counted for ratio in study.tokens_per_parameter]:
            for unique in uniques:
                yield name, _Target(tokens, None, unique)
        for unique in study.unique if study.epochs else []:
            for epochs in study.epochs:
                yield name, _Target(part_of(corpus, unique)[1] * epochs, None, unique)


def _around(study: StudyConfig, base: Config, sizes: dict[str, Size], budget: float, kind: str) -> list[str]:
    """The sizes of a budget in the family's order: all, or those nearest to places evenly (in log N) around the expected best."""
    if not study.sizes_per_budget:
        return list(sizes)
    guess, count = study.optimum, study.sizes_per_budget
    best = math.log(guess.coefficient) + guess.exponent * math.log(budget)
    best += math.log(guess.autoregressive) if kind == "autoregressive" else 0.0
    logs = {name: math.log(_counted(study, base, size)) for name, size in sizes.items()}
    chosen: set[str] = set()
    for place in range(count):
        wanted = best + math.log(guess.spread) * (2 * place / (count - 1) - 1 if count > 1 else 0)
        left = [name for name in logs if name not in chosen]
        chosen |= {min(left, key=lambda name: abs(logs[name] - wanted))} if left else set()
    return [name for name in sizes if name in chosen]


def shape_of(config: Config) -> ModelShape:
    """The sizes of its model."""
    return ModelShape(**{name: getattr(config.model, name) for name in ModelShape.__dataclass_fields__})


def _sized(base: Config, size: Size) -> Config:
    return replace(base, model=replace(base.model, **asdict(size)))


_counts = lru_cache(parameter_counts)
_flops_in = lru_cache(flops_per_token_in)


def _counted(study: StudyConfig, base: Config, size: Size) -> int:
    return _counts(shape_of(_sized(base, size)))[study.count]


def _masked(objective: ObjectiveConfig) -> float:
    return _masked_of(objective.kind, objective.schedule, objective.power, objective.mask_ratio)


@lru_cache
def _masked_of(*values: Any) -> float:
    kind, schedule, power, mask_ratio = values
    return masked_fraction(ObjectiveConfig(kind=kind, schedule=schedule, power=power, mask_ratio=mask_ratio))


def _flops(study: StudyConfig, base: Config, size: Size, masked: float) -> float:
    return _flops_in(study.flops, shape_of(_sized(base, size)), base.data.sequence_length, masked)


def _objective(base: Config, kind: str) -> ObjectiveConfig:
    """The base's objective if it is of this kind, else that kind as it is by default."""
    return base.objective if base.objective.kind == kind else ObjectiveConfig(kind=kind)  # type: ignore[arg-type]


def _cell(
    study: StudyConfig, base: Config, kind: str, name: str, size: Size, target: _Target, corpus: Corpus, repeat: int
) -> tuple[Cell, Config]:
    counted = _counted(study, base, size)
    length = base.data.sequence_length
    quantities = {"parameters": float(counted), "width": float(size.hidden_size), "tokens": target.tokens}
    quantities |= {"budget": target.budget} if target.budget else {}
    batch = whole_batch(value_of(study.batch, quantities, base.train.global_batch_size), study.batch_multiple)
    rate = float(f"{value_of(study.learning_rate, quantities | {'batch': batch}, base.optimizer.lr):.6g}")
    steps = max(1, round(target.tokens / (batch * length)))
    tokens = steps * batch * length
    part, unique = part_of(corpus, target.unique) if target.unique else ([], corpus.tokens)
    config = _config(study, base, kind, size, steps, batch, rate, repeat)
    if part:
        path = str(study.folder / "data" / f"unique-{unique}")
        config = replace(config, data=replace(config.data, shards=path))
    epochs = round(tokens / unique, 4) if unique and tokens > unique else 1.0
    flops = _flops(study, base, size, _masked(config.objective))
    cell = Cell(
        cell_id(
            *(kind, name, config, corpus.fingerprint),
            budget=target.budget,
            tokens=target.tokens,
            unique=unique if part else None,
            repeat=repeat,
        ),
        *(kind, name, counted, tokens, tokens * flops, target.budget, target.tokens),
        *(min(tokens, unique) if unique else None, epochs, tuple(part), repeat, config.run.seed),
        *(rate, batch, steps, study.ranks),
    )
    config = replace(config, run=replace(config.run, dir=str(study.folder / "runs"), name=cell.id))
    if reason := _why_not(study, cell, unique):
        return replace(cell, status="excluded", reason=reason), config
    _check(study, cell, config)
    return cell, config


def _config(
    study: StudyConfig, base: Config, kind: str, size: Size, steps: int, batch: int, rate: float, repeat: int
) -> Config:
    config = _sized(base, size)
    wsd = base.optimizer.schedule == "wsd"
    optimizer = replace(
        base.optimizer,
        lr=rate,
        min_lr=float(f"{base.optimizer.min_lr / base.optimizer.lr * rate:.6g}"),
        warmup_steps=0 if not study.warmup else max(1, round(study.warmup * steps)),
        decay_steps=round(study.decay * steps) if wsd else base.optimizer.decay_steps,
    )
    optimizer = replace(
        optimizer, warmup_steps=min(optimizer.warmup_steps, steps - optimizer.decay_steps if wsd else steps)
    )
    train = replace(
        base.train,
        steps=steps,
        stop_at=0,
        global_batch_size=batch,
        micro_batch_size=micro_batch(max(batch // study.ranks, 1), base.train.micro_batch_size),
        validate_every=-(-steps // study.validations),
        sample_every=0,
        keep_checkpoints=min(base.train.keep_checkpoints, 2),
    )
    return replace(
        config,
        run=replace(base.run, seed=base.run.seed + repeat),
        objective=_objective(base, kind),
        train=train,
        optimizer=optimizer,
        tracking=replace(base.tracking, uri="none"),
    )


def _why_not(study: StudyConfig, cell: Cell, unique: Optional[int]) -> str:
    """Why a cell is left out before it runs; "" if it is not."""
    if cell.steps < study.min_steps:
        return f"too few steps: {cell.steps} of {cell.batch} samples, study.min_steps is {study.min_steps}"
    allowed = math.inf if cell.part else study.max_epochs
    if unique and cell.D > allowed * unique:
        return f"lacks tokens: needs {cell.D:,}, the data have {unique:,} (study.max_epochs {study.max_epochs:g})"
    return ""


def _check(study: StudyConfig, cell: Cell, config: Config) -> None:
    """InputError, naming the cell, for a config that `train` would refuse: layout, memory, schedule. No torch is imported."""
    try:
        if cell.batch % study.ranks:
            raise InputError(
                f"its batch of {cell.batch} samples is no multiple of study.ranks {study.ranks}: set study.batch_multiple"
            )
        case = case_of(config, study.ranks)
        check_layout(case)
        if study.gpu_memory:
            check_memory(case, study.gpu_memory)
        check_schedule(config)
    except InputError as error:
        words = str(error).replace("--gpu-memory", "study.gpu_memory")
        raise InputError(f"study: cell {cell.id}: {words}") from None
