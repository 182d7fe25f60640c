"""`study fit`: scaling laws of a study, or of any table of N, D and loss, with intervals; writes fit.json and prints what was
found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from data.errors import InputError
from pretrain.arguments import flag, parse, parser_of
from pretrain.json_file import write_json

DESCRIPTION = (
    "study fit: scaling laws of a study's folder, or of any CSV with columns N, D, loss (and C; without it C = 6 N D). "
    "Optional columns: objective, cell, loss_se, unique_tokens, epochs, budget, status, reason, repeat, seed. Raw counts, nats per "
    "token, FLOPs. Prints numbers with 95 % intervals, and why a part cannot be had; a study's folder gets fit.json"
)


def fit(arguments: Sequence[str]) -> int:
    """The command. Exit code 0 also where parts are refused, which is an answer; InputError for a table that cannot be fitted."""
    parser = parser_of(DESCRIPTION)
    parser.prog = "python -m pretrain study fit"
    parser.add_argument("path", help="a study's folder, or a CSV file")
    parser.add_argument("--json", default="", help="file for the fit as JSON; default: fit.json in a study's folder")
    parser.add_argument("--samples", type=int, default=1000, help="refits of the bootstrap")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the bootstrap; the same seed gives the same numbers"
    )
    parser.add_argument("--predict", type=float, nargs="*", default=[], help="further budgets to predict, in FLOPs")
    parser.add_argument(
        "--optima",
        type=bool,
        default=False,
        help="each budget's single cell is its optimum, found elsewhere (a published table); not for a study's folder",
    )
    values = parse(parser, "study fit", flag(arguments, "--optima"))
    if not 100 <= values.samples <= 100_000:
        raise InputError(f"study fit: --samples is {values.samples}; give 100 to 100000 (1000 is a good number)")
    if values.seed < 0:
        raise InputError(f"study fit: --seed is {values.seed}; it must be 0 or above")
    for budget in values.predict:
        if not (math.isfinite(budget) and budget > 0):
            raise InputError(f"study fit: --predict is {budget:g}; give FLOPs above 0, as 1e21")
    from pretrain.study.fitting.fit import fit_table
    from pretrain.study.fitting.summary import summary
    from pretrain.study.fitting.table import read_table

    if values.optima and Path(values.path).is_dir():
        raise InputError("study fit: --optima is for a table of optima, a study's cells are no optima by themselves")
    table = read_table(values.path, values.optima)
    least = float(table.frame["budget"].fillna(table.frame["C"]).min())
    for budget in values.predict:
        if budget < 0.999 * least:
            raise InputError(
                f"study fit: --predict {budget:g} lies below the least budget; give {least:g} FLOPs or more"
            )
    target = Path(values.json) if values.json else table.study / "fit.json" if table.study else None
    if target is not None and not target.absolute().parent.is_dir():
        raise InputError(
            f"study fit: {target.absolute().parent} is no folder; name a file in one that exists with --json"
        )
    found = fit_table(table, values.samples, values.seed, tuple(values.predict))
    if target is not None:
        write_json(target, found, "study fit: ")  # before anything is printed: a closed pipe must not lose it
    print(summary(found))
    if target is not None:
        print(f"\nwritten: {target}")
    return 0
