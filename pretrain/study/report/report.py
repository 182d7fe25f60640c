"""`study report`: a fit as one page with its figures, and the config of the run that it recommends."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, Union

from data.durable import keep_file
from data.errors import InputError
from pretrain.flops import PEAK_FLOPS
from pretrain.study.report.fit_file import Fit, read_fit
from pretrain.study.report.page import page
from pretrain.study.report.plots import Drawn, Picture
from pretrain.study.report.plots_frontier import frontier, gap, optima
from pretrain.study.report.plots_isoflop import isoflop_curves
from pretrain.study.report.plots_repeated import repeated_data
from pretrain.study.report.plots_surface import loss_surface, residuals
from pretrain.study.report.recommend import Recommendation, Rules, choose, recommend, rules_of
from pretrain.study.report.references import parameters

# Of pictures: the names of their files begin so.
MADE = ".made.json"  # what a report wrote beside the page


@dataclass
class ReportOptions:
    """writes index.html (one page that needs nothing else), its pictures and recommended.yaml

    Args:
        output: folder to write to; none: `report` in the study's folder, or beside the file.
        approach: that the recommended run follows; auto: the first that has an answer of isoflop, parametric, envelope.
        budget: FLOPs of the recommended run, one that the fit predicted; 0: its first beyond the cells.
        study: YAML of a study, for the model family and the rules of batch and learning rate; none: the study's own.
        gpu: whose hours are shown: a name in the table of peaks (H100, H200, H800, A100, A800, B200).
        mfu: share of that GPU's peak that training is taken to reach.
    """

    output: str = ""
    approach: Literal["auto", "isoflop", "parametric", "envelope"] = "auto"
    budget: float = 0.0
    study: str = ""
    gpu: str = "H800"
    mfu: float = 0.4


@dataclass(frozen=True)
class Report:
    """What was written: its folder, and the recommended run or why there is none."""

    folder: Path
    recommendation: Union[Recommendation, str]


def write_report(path: str, options: ReportOptions) -> Report:
    """path: a study's folder with fit.json, or such a file. All is made before any is written. InputError with one line."""
    if options.gpu not in PEAK_FLOPS:
        raise InputError(f"study report: --gpu {options.gpu}: its peak is not known; there are {', '.join(PEAK_FLOPS)}")
    if not 0 < options.mfu <= 1:
        raise InputError(f"study report: --mfu is {options.mfu:g}, it must be a share of the peak, in (0, 1]")
    if not options.budget >= 0:
        raise InputError(
            f"study report: --budget is {options.budget:g}, it must be FLOPs (0 = the first beyond the cells)"
        )
    fit = read_fit(path)
    if options.budget or options.study:  # what a person asked for and cannot have is a mistake, not a refusal
        _check_wishes(fit, options)
    folder = Path(options.output) if options.output else (fit.study or fit.path.parent) / "report"
    if taken := [one for one in (folder, *folder.parents) if one.exists() and not one.is_dir()]:
        raise InputError(f"study report: {taken[0]} is a file: choose another folder with --output")
    rules, recommendation = _recommendation(fit, options)
    try:
        pictures = draw(fit)
        text = page(fit, pictures, recommendation, rules, options.gpu, options.mfu)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"study report: {fit.path} is not what `study fit` writes ({type(error).__name__}: {error}): fit again"
        ) from None
    _write(folder, text, pictures, recommendation)
    return Report(folder, recommendation)


def draw(fit: Fit) -> dict[str, list[Drawn]]:
    """Every picture, or why there is none: of each objective by its name, those of all under ""."""
    counted = parameters(fit.count)
    found: dict[str, list[Drawn]] = {}
    for name, o in fit.objectives.items():
        found[name] = [isoflop_curves(o, counted), loss_surface(o, counted), residuals(o, counted), optima(o, fit)]
        if repeats := repeated_data(o):
            found[name].append(repeats)
    between = gap(fit)
    return {"": [frontier(fit), *([between] if between else [])]} | found


def _check_wishes(fit: Fit, options: ReportOptions) -> None:
    if options.study:
        rules_of(fit, options.study)
    if options.budget and any(p.N_opt for p in fit.first.predictions):
        choose(fit, options.approach, options.budget)


def _recommendation(fit: Fit, options: ReportOptions) -> tuple[Optional[Rules], Union[Recommendation, str]]:
    try:
        rules = rules_of(fit, options.study)
    except InputError as error:
        return None, str(error)
    try:
        return rules, recommend(fit, rules, options.approach, options.budget)
    except InputError as error:
        return rules, str(error)


def _write(
    folder: Path, text: str, pictures: dict[str, list[Drawn]], recommendation: Union[Recommendation, str]
) -> None:
    """The page last; pictures and the config of an earlier report that this one does not have go, if nobody has changed them."""
    made = {f"{one.name}.png": one.png for drawn in pictures.values() for one in drawn if isinstance(one, Picture)}
    if isinstance(recommendation, Recommendation):
        made["recommended.yaml"] = recommendation.text.encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, digest in _made_before(folder).items():
            if name not in made and _digest(folder / name) == digest:
                (folder / name).unlink()
        for name, content in made.items():
            keep_file(folder / name, content)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in made.items()}
        keep_file(folder / MADE, (json.dumps(digests, indent=1) + "\n").encode())
        keep_file(folder / "index.html", text.encode())
    except OSError as error:
        raise InputError(
            f"study report: {folder} cannot be written ({error.strerror}): choose another folder with --output"
        ) from None


def _made_before(folder: Path) -> dict[str, str]:
    """File -> sha256 of what an earlier report wrote here."""
    try:
        found = json.loads((folder / MADE).read_bytes())
    except (OSError, ValueError):
        return {}
    return (
        {name: digest for name, digest in found.items() if Path(name).name == name} if isinstance(found, dict) else {}
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
