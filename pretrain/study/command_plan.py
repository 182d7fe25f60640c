"""`study plan`: the cells of a study, what they cost, and the folder that `study run` trains them from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from data.errors import InputError
from pretrain.arguments import flag, parse, parser_of
from pretrain.flops import PEAK_FLOPS
from pretrain.study.design.costs import Rate, table
from pretrain.study.design.plan import Plan, hold, make_plan, write_plan
from pretrain.study.design.spec import load_study

DESCRIPTION = """study plan: budgets, sizes and rules -> cells with stable ids, and what they cost.
`study plan STUDY.yaml [--study.key value ...]` writes STUDY/plan.json and a config of `train` for each cell. Planning again changes
nothing; more budgets, sizes or repeats add cells and rename none; what has been trained is not planned away."""


def plan(arguments: Sequence[str]) -> int:
    """arguments: the study's YAML, --study.key overrides, options. Returns 0; InputError for a mistake, nothing written then."""
    options, study = parse_study("study plan", arguments, planning=True)
    made = make_plan(study, need_data=not options.dry_run)
    rate = rate_of(options)
    if options.dry_run:
        said = ["dry run: nothing written"]
    else:
        with hold(made.folder):
            said = [f"study {made.folder}: {len(made.cells)} cells, planned", *write_plan(made)]
    show(made, rate, said)
    return 0


def show(made: Plan, rate: Optional[Rate], said: Sequence[str]) -> None:
    """The cost table, and what a person should know."""
    study = made.study
    print(*table([cell for cell, _ in made.cells], rate), sep="\n")
    print(f"N: {study.count} parameters; FLOPs: counted as `{study.flops}`, forward and backward")
    print(*(f"note: {note}" for note in made.notes), *said, sep="\n")


def add_rate(parser: Any) -> None:
    """The options of `rate_of`."""
    parser.add_argument("--flops_rate", type=float, default=0.0, help="FLOP/s that one rank does, for the times")
    parser.add_argument("--gpu", default="", help=f"instead: {', '.join(PEAK_FLOPS)}")
    parser.add_argument("--mfu", type=float, default=0.4, help="with --gpu: share of its peak that is useful")


def rate_of(options: Any) -> Optional[Rate]:
    """The rate that the options give; None if they give none."""
    if options.flops_rate < 0 or not 0 < options.mfu <= 1:
        raise InputError("study: --flops-rate must be > 0, and --mfu in (0, 1]")
    if options.gpu and options.gpu not in PEAK_FLOPS:
        raise InputError(f"study: --gpu {options.gpu} is not known; {', '.join(PEAK_FLOPS)} are (or say --flops-rate)")
    if options.flops_rate:
        return Rate(options.flops_rate, "--flops-rate", {})
    if options.gpu:
        return Rate(PEAK_FLOPS[options.gpu] * options.mfu, f"{options.gpu} at {options.mfu:.0%} of its peak", {})
    return None


def parse_study(name: str, arguments: Sequence[str], planning: bool) -> tuple[Any, Any]:
    """(options, study) of `study plan`; the keys of the study itself are the --study.* ones."""
    parser = parser_of(DESCRIPTION)
    parser.prog = f"python -m pretrain {name}"
    parser.add_argument("study_file", help="YAML with a section `study`: configs/study_*.yaml")
    parser.add_argument("--dry_run", type=bool, default=False, help="show, write nothing; the data need not be there")
    add_rate(parser)
    own, others = split_overrides(arguments)
    options = parse(parser, name, flag(flag(own, "--dry-run"), "--dry_run"))
    return options, load_study(options.study_file, others)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the command's own arguments, those that begin with --study. and their values)."""
    own: list[str] = []
    others: list[str] = []
    to_study = False
    for argument in arguments:
        if argument.startswith("--study."):
            others.append(argument)
            to_study = "=" not in argument
        elif to_study:
            others.append(argument)
            to_study = False
        else:
            own.append(argument)
    return own, others
