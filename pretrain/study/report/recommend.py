"""The run that a study recommends next: the optimum of a budget beyond its cells, as a config that `plan` and `train` take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Optional

import yaml

from data.errors import InputError
from parallel.shape import parameter_counts
from pretrain.config import Config
from pretrain.flops import CONVENTIONS, flops_per_token_in
from pretrain.load_config import config_from_dict, to_dict
from pretrain.planning.case import masked_fraction
from pretrain.study.design.cells import Cell, base_config, cells_of, shape_of
from pretrain.study.design.corpus import Corpus, look_at
from pretrain.study.design.family import Size, load_family
from pretrain.study.design.plan import rules_as_planned
from pretrain.study.design.spec import StudyConfig, load_study
from pretrain.study.report.fit_file import APPROACHES, Fit, Number, Prediction
from pretrain.study.report.numbers import count
from pretrain.study.report.recommend_shape import shape_for
from pretrain.study.report.references import parameters

BEYOND = 1.0001  # above this, a prediction is an extrapolation


@dataclass(frozen=True)
class Rules:
    """What turns a prediction into a run: the study's family, base config, and rules for batch and learning rate."""

    study: StudyConfig
    base: Config
    family: dict[str, Size]
    corpus: Corpus


@dataclass(frozen=True)
class Recommendation:
    """A run: where it comes from, the cell that it would be, and its config with the file's text."""

    prediction: Prediction
    cell: Cell
    config: Config
    text: str


def rules_of(fit: Fit, spec: str = "") -> Rules:
    """The rules that the study's cells were planned with, or of the file `spec`. InputError says why there are none."""
    path = Path(spec) if spec else (fit.study / "study.yaml" if fit.study else None)
    if path is None or not (spec or path.is_file()):
        raise InputError(
            "a fit of a bare table knows no model family and no rules for batch and learning rate: name a study with --study FILE"
        )
    study = load_study(spec) if spec else rules_as_planned(path.parent)
    if fit.count in ("non_embedding", "total"):  # the numbers mean what the fit says, whatever the file of rules counts
        study = replace(study, count=fit.count)  # type: ignore[arg-type]
    convention = fit.flops
    if convention == "6ND":  # a table that gave no C
        convention = "6n_total" if study.count == "total" else "6n"
    if convention in CONVENTIONS:
        study = replace(study, flops=convention)  # type: ignore[arg-type]
    base = base_config(study)
    return Rules(study, base, load_family(study.family), _corpus(fit, base, spec))


def _corpus(fit: Fit, base: Config, spec: str) -> Corpus:
    """The data that the study was planned with, as its plan has them; those of a file of rules as they are, if they are here."""
    planned = fit.plan.get("data")
    if not spec and isinstance(planned, dict) and planned.get("fingerprint"):
        return Corpus(planned.get("tokens"), str(planned["fingerprint"]))
    try:
        return look_at(base)
    except InputError:  # a report may be made where the data are not
        return Corpus(None, "")


def choose(fit: Fit, approach: str = "auto", budget: float = 0.0) -> Prediction:
    """The prediction that is recommended: of the first objective, by `approach` (auto: IsoFLOP, else the parametric law, else the
    envelope), at `budget` FLOPs (0: the nearest beyond the cells). InputError with the reasons where there is none.
    """
    objective = fit.first
    reasons = []
    for name in APPROACHES if approach == "auto" else [approach]:
        found = [p for p in objective.predicted(name) if p.N_opt and p.D_opt]
        if budget:
            near = [p for p in found if abs(p.C / budget - 1) < 0.01]
            if found and not near:
                known = ", ".join(f"{p.C:.4g}" for p in found)
                raise InputError(
                    f"study report: --budget {budget:g} was not predicted; there are {known}: choose one, or fit with --predict"
                )
            found = near
        else:
            found = [p for p in found if p.extrapolation > BEYOND]
        if found:
            return found[0]
        reasons.append(f"{APPROACHES[name]}: {objective.refused(name) or 'predicts no optimum beyond the cells'}")
    raise InputError(f"no optimum of {objective.name} could be predicted ({'; '.join(reasons)})")


def objective_of(fit: Fit, rules: Rules) -> str:
    """What is trained: the fit's first objective, or the study's where a table named none."""
    return fit.first.name if fit.first.name in ("masked", "autoregressive") else rules.study.objectives[0]


def planned(rules: Rules, kind: str, prediction: Prediction) -> tuple[Cell, Config]:
    """The cell and its config that train the predicted optimum: a legal shape of about N_opt, whole steps of about D_opt tokens.

    kind: the objective. InputError where the rules give no run that could start.
    """
    if prediction.N_opt is None or prediction.D_opt is None:
        raise InputError("the prediction has no size or no tokens")
    study, base = rules.study, rules.base

    def shaped(size: Size) -> Config:
        return replace(base, model=replace(base.model, **vars(size)))

    name, size = shape_for(
        prediction.N_opt.value, rules.family, lambda size: parameter_counts(shape_of(shaped(size)))[study.count]
    )
    objective = base.objective if base.objective.kind == kind else replace(Config().objective, kind=kind)  # type: ignore[arg-type]
    cost = flops_per_token_in(
        study.flops, shape_of(shaped(size)), base.data.sequence_length, masked_fraction(objective)
    )
    alone = replace(
        study,
        design="isoflop",
        budgets=[prediction.D_opt.value * cost],  # so its tokens are D_opt
        sizes=[name],
        sizes_per_budget=0,
        objectives=[kind],  # type: ignore[list-item]
        repeats=1,
        unique=[],
        max_epochs=math.inf,
        min_steps=1,
        gpu_memory=0.0,
    )
    return cells_of(alone, base, {name: size}, rules.corpus)[0]


def recommend(fit: Fit, rules: Rules, approach: str = "auto", budget: float = 0.0) -> Recommendation:
    """The recommended run and its YAML, read back once. InputError with the reason where no approach bears one."""
    prediction = choose(fit, approach, budget)
    cell, config = planned(rules, objective_of(fit, rules), prediction)
    base = rules.base
    config = replace(
        config,
        run=replace(base.run, name=f"{rules.study.name}-next"),
        tracking=base.tracking,
        train=replace(
            config.train,
            validate_every=base.train.validate_every,
            sample_every=base.train.sample_every,
            keep_checkpoints=base.train.keep_checkpoints,
        ),
    )
    values = to_dict(config)
    body = yaml.safe_dump({one.name: values[one.name] for one in fields(Config)}, sort_keys=False)
    config_from_dict(yaml.safe_load(body))
    lines = comment_lines(fit, rules, prediction, cell, config)
    return Recommendation(prediction, cell, config, "".join(f"# {' '.join(line.split())}\n" for line in lines) + body)


def comment_lines(fit: Fit, rules: Rules, prediction: Prediction, cell: Cell, config: Config) -> Sequence[str]:
    """Where each number of the file comes from, for its first lines."""
    beyond = prediction.extrapolation
    size = config.model
    words = "inside the fitted budgets" if beyond <= BEYOND else f"{beyond:.3g} times the largest fitted budget"
    lines = [
        f"Recommended by the study {fit.name}, objective {fit.first.name}, for {prediction.C:.4g} FLOPs: {words}.",
        f"Approach: {APPROACHES.get(prediction.approach, prediction.approach)}. In brackets: 95 % intervals.",
        f"The fit: N counts {parameters(fit.count)}, C is in the convention {fit.flops}. "
        f"This run: {parameters(rules.study.count)}, {rules.study.flops}.",
        f"N: predicted {_with_interval(prediction.N_opt)}; this shape ({cell.size}: {size.num_layers} layers, width "
        f"{size.hidden_size}) has {count(cell.N, 4)}.",
        f"D: predicted {_with_interval(prediction.D_opt)} tokens; {cell.steps} steps of {cell.batch} samples read "
        f"{count(cell.D, 4)} and cost {cell.C:.4g} FLOPs.",
    ]
    if prediction.loss:
        low, high = prediction.loss.low, prediction.loss.high
        ends = f" ({low:.4g} to {high:.4g})" if low is not None and high is not None else ""
        lines.append(f"Predicted loss: {prediction.loss.value:.4g}{ends} nats per token.")
    lines.append(
        f"Batch {cell.batch} and learning rate {cell.lr:g} follow the study's rules; neither was searched for at this size."
    )
    if prediction.N_opt and _ratio(prediction.N_opt) > 4:
        lines.append(
            f"The interval of N spans a factor of {_ratio(prediction.N_opt):.2g}: more cells would narrow it before this is run."
        )
    unique = rules.corpus.tokens
    if unique and cell.D > unique:
        lines.append(
            f"The data have {count(unique, 4)} tokens: this run reads them {cell.D / unique:.3g} times, and the law says "
            "nothing of repeated data. Prepare more text."
        )
    lines.append(f"Its memory and time: `python -m pretrain plan --config THIS_FILE --gpus {cell.ranks}`.")
    return lines


def _with_interval(found: Optional[Number]) -> str:
    if found is None:
        return "none"
    low = count(found.low) if found.low is not None else "no lower bound"
    high = count(found.high) if found.high is not None else "no upper bound"
    return f"{count(found.value)} ({low} to {high})"


def _ratio(found: Number) -> float:
    return found.high / found.low if found.low and found.high and found.low > 0 else math.inf
