"""The cells of a study, or of any CSV with N, D and loss, as checked numbers. Every mistake in them is one line that says what to
do."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd

from data.errors import InputError
from pretrain.study.fitting.digest import digest_of
from pretrain.study.fitting.table_checks import check_cells, check_units

NEEDED = ("N", "D", "loss")
NUMERIC = ("N", "D", "C", "loss", "loss_se", "unique_tokens", "epochs", "budget")
TEXT = ("cell", "objective", "status", "reason")
REPEATS = ("repeat", "seed")
STATUS = ("done", "excluded", "missing")
ALIASES = {
    "N": ("n", "params", "parameters", "n_params", "num_params", "model_size", "size"),
    "D": ("d", "tokens", "n_tokens", "num_tokens", "training_tokens", "data"),
    "loss": ("val_loss", "final_loss", "nelbo", "nll", "val/nelbo", "l"),
}
GROUP = 0.05  # budgets closer than this, relatively, are one


@dataclass(frozen=True)
class Table:
    """frame: the cells to fit, columns NUMERIC (NaN where not given) and TEXT; excluded: rows with their reason, as fit.json lists
    them."""

    path: Path
    study: Optional[Path]
    frame: pd.DataFrame
    excluded: list[dict[str, Any]]
    rows: int
    count: str
    flops: str
    notes: list[str] = field(default_factory=list)
    optima: bool = False  # a budget's single cell is its optimum
    digest: str = ""  # of a study's results

    def objectives(self) -> list[str]:
        """masked first, else in the order of the file."""
        return sorted(dict.fromkeys(self.frame["objective"]), key=lambda name: name != "masked")


def read_table(path: str, optima: bool = False) -> Table:
    """The cells of PATH: a study's folder (its results.csv) or a CSV file. InputError for whatever is wrong with it.

    optima: each budget's single cell is its optimum, found elsewhere.
    """
    place = Path(path)
    study = place if place.is_dir() else None
    file = place / "results.csv" if study else place
    where = f"study fit: {file}"
    if not file.is_file():
        hint = "run `study run` first, or name a CSV file" if study else "name a CSV file or a study's folder"
        raise InputError(f"{where}: there is no such file; {hint}")
    digest = digest_of(file) if study else ""  # before it is read: of a table that grows meanwhile this is the older
    frame = _numbers(_text(file, where), where)
    notes: list[str] = []
    used = frame["status"].eq("done")
    excluded = [_excluded(row) for row in frame[~used].to_dict("records")]
    done = frame[used].copy()
    _check_values(done, where)
    if done["C"].isna().all():
        done["C"] = 6.0 * done["N"] * done["D"]
        notes.append("C was not in the file: C = 6 N D")
        without_C = True
    elif done["C"].isna().any():
        raise InputError(
            f"{where} line {done.loc[done['C'].isna(), 'line'].iloc[0]}: C is empty; give it in every row or in none"
        )
    else:
        without_C = False
    check_units(done, where, given_C=not without_C)
    _check_budgets(done, where)
    _fill_epochs(done, where)
    check_cells(done, where)
    plan = _plan(study)
    _check_planned(frame, plan, where)
    flops = "6ND" if without_C else str(plan.get("flops") or "as given")
    count = str(plan.get("count") or "as given")
    return Table(file, study, done, excluded, len(frame), count, flops, notes, optima, digest)


def _check_budgets(done: pd.DataFrame, where: str) -> None:
    """InputError where the budget of a cell is not about what it cost."""
    off = np.abs(np.log(done["C"] / done["budget"])) > math.log(2)
    if off.any():
        row = done[off].iloc[0]
        raise InputError(
            f"{where} line {row['line']}: budget is {row['budget']:g} and C is {row['C']:g}: give both in FLOPs, or no budget"
        )


def _fill_epochs(done: pd.DataFrame, where: str) -> None:
    """Unique tokens from epochs and epochs from unique tokens, where one of them is given. InputError if they disagree."""
    unique, epochs = done["unique_tokens"], done["epochs"]
    done["epochs"] = epochs.where(epochs.notna(), (done["D"] / unique).clip(lower=1.0))
    done["unique_tokens"] = unique.where(unique.notna(), done["D"] / epochs.clip(lower=1.0))
    ratio = (done["D"] / done["unique_tokens"]).clip(lower=1.0) / done["epochs"].clip(lower=1.0)
    off = np.abs(np.log(ratio)) > 0.1
    if off.any():
        row = done[off].iloc[0]
        raise InputError(
            f"{where} line {row['line']}: {row['D']:g} tokens of {row['unique_tokens']:g} unique ones are not {row['epochs']:g} "
            "epochs: correct one of D, unique_tokens and epochs"
        )


def _check_planned(frame: Any, plan: dict[str, Any], where: str) -> None:
    """InputError for rows that are not those of the plan: they were written before the study was planned otherwise."""
    planned = {str(cell["id"]): cell for cell in plan.get("cells", [])}
    for row in frame.to_dict("records") if planned else []:
        cell = planned.get(str(row["cell"]))
        same = cell is not None and all(
            math.isclose(float(row[name]), float(cell[name]), rel_tol=1e-9) for name in ("N", "D", "C")
        )
        if not same:
            raise InputError(
                f"{where}: cell {row['cell']} is not as plan.json has it, the study was planned again since: `study run FOLDER "
                "--collect` writes the table anew"
            )


def _plan(study: Optional[Path]) -> dict[str, Any]:
    file = study / "plan.json" if study else None
    if file is None or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"study fit: {file} cannot be read as JSON ({error}); run `study plan` again") from None
    return found if isinstance(found, dict) else {}


def _text(file: Path, where: str) -> pd.DataFrame:
    """All fields as text, with the line each row is on."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{where}: is not text; a CSV file in UTF-8 is needed (save a spreadsheet as CSV)") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from None
    if not content.strip():
        raise InputError(f"{where}: is empty; it needs a header with the columns {', '.join(NEEDED)} and a row a cell")
    if "\x00" in content:
        raise InputError(f"{where}: is not text; a CSV file in UTF-8 is needed (save a spreadsheet as CSV)")
    reader = csv.reader(io.StringIO(content), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        rows.extend(
            (reader.line_num, [value.strip() for value in row]) for row in reader if any(v.strip() for v in row)
        )
    except csv.Error as error:
        raise InputError(f"{where} line {reader.line_num}: is not CSV ({error})") from None
    header = rows[0][1]
    if len(header) == 1:
        for mark, name in ((";", "semicolons"), ("\t", "tabs")):
            if mark in header[0]:
                raise InputError(
                    f"{where}: its columns are separated by {name}; commas are needed, and points in decimals"
                )
    repeated = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if repeated:
        raise InputError(f"{where}: the header has the column {repeated[0]!r} twice")
    _check_header(header, where)
    for line, row in rows[1:]:
        if len(row) != len(header):
            hint = " (a decimal comma?)" if len(row) > len(header) else ""
            raise InputError(f"{where} line {line}: {len(row)} fields under a header of {len(header)}{hint}")
    if len(rows) == 1:
        raise InputError(f"{where}: has a header and no rows; a row a cell is needed")
    frame = pd.DataFrame([row for _, row in rows[1:]], columns=header, dtype=object)
    return frame.assign(line=[line for line, _ in rows[1:]])


def _check_header(header: list[str], where: str) -> None:
    for name in NEEDED:
        if name in header:
            continue
        known = {column.lower(): column for column in header}
        close = [known[alias] for alias in ALIASES[name] if alias in known]
        close += difflib.get_close_matches(name, header, 1, 0.5)
        hint = f"; is {close[0]!r} meant? rename it" if close else f"; it has {', '.join(header[:12])}"
        raise InputError(f"{where}: has no column {name!r}{hint} (needed: N, D, loss; C if it is not 6 N D)")


def _numbers(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Typed columns; a field that is no number names its line. In rows that are not done anything may stand."""
    for name in TEXT:
        frame[name] = frame[name] if name in frame else ""
    frame["status"] = frame["status"].replace("", "done")
    for line, status in zip(frame["line"], frame["status"]):
        if status not in STATUS:
            raise InputError(f"{where} line {line}: status is {status!r}; it must be one of {', '.join(STATUS)}")
    frame["objective"] = frame["objective"].replace("", "all")
    for name in NUMERIC:
        texts = frame[name] if name in frame else [""] * len(frame)
        rows = zip(frame["line"], frame["status"], texts)
        frame[name] = [_number(text, f"{where} line {line}", name, status == "done") for line, status, text in rows]
    return frame


def _number(text: str, where: str, name: str, needed: bool) -> float:
    if text == "":
        if needed and name in NEEDED:
            raise InputError(f"{where}: {name} is empty; give the number, or the row the status excluded and a reason")
        return math.nan
    try:
        value = float(text)
        if "_" in text:
            raise ValueError
    except ValueError:
        if not needed:
            return math.nan
        hint = "decimals need a point" if "," in text else "write raw numbers without units, as 84e6"
        raise InputError(f"{where}: {name} is {text!r}, not a number; {hint}") from None
    if needed and not math.isfinite(value):
        hint = "give the row the status excluded and a reason" if name == "loss" else "give the number"
        raise InputError(f"{where}: {name} is {text}; {hint}")
    return value


def _check_values(done: pd.DataFrame, where: str) -> None:
    for name in NUMERIC:
        wrong = done[done[name] < 0 if name == "loss_se" else done[name] <= 0]
        if len(wrong):
            raise InputError(
                f"{where} line {wrong['line'].iloc[0]}: {name} is {wrong[name].iloc[0]:g}; it must be above 0"
            )
    if len(done) < 3:
        raise InputError(f"{where}: {len(done)} cells are done; a fit needs at least 3, and the parametric law 6")


def _excluded(row: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: _or_none(row[name]) for name in ("N", "D", "C", "loss")}
    reason = row["reason"] or ("not run yet" if row["status"] == "missing" else "no reason was given")
    return {"cell": row["cell"], "objective": row["objective"], **numbers, "reason": reason}


def _or_none(value: Any) -> Optional[float]:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


@dataclass(frozen=True)
class Cells:
    """One objective's cells, [n] each; groups: (ln C, cells) of its budgets, rising. Logarithms are natural."""

    name: str
    frame: pd.DataFrame
    ln_N: Any
    ln_D: Any
    ln_C: Any
    y: Any  # log loss
    groups: list[tuple[float, Any]]

    def without(self, group: int) -> Cells:
        """The cells that are not in one budget."""
        keep = np.ones(len(self.y), dtype=bool)
        keep[self.groups[group][1]] = False
        return cells_of(self.name, self.frame[keep])

    def rows(self) -> list[dict[str, Any]]:
        """As fit.json lists them."""
        names = ("N", "D", "C", "loss", "loss_se", "budget", "unique_tokens", "epochs")
        records = self.frame.to_dict("records")
        return [{"cell": row["cell"], **{name: _or_none(row[name]) for name in names}} for row in records]


def cells_of(name: str, frame: pd.DataFrame) -> Cells:
    """Budgets: the column where it is filled, else cells whose C lie within 5 % of their neighbours and 10 % of each other."""
    frame = frame.reset_index(drop=True)
    ln_C = np.log(frame["C"].to_numpy(float))
    named = frame["budget"].notna().to_numpy()
    label = np.log(np.where(named, frame["budget"].fillna(1.0), frame["C"]).astype(float))
    order = np.argsort(label, kind="stable")
    cuts = _cuts(label[order])
    groups = [(float(label[at].mean()), np.sort(at)) for at in np.split(order, cuts)] if len(order) else []
    ln_N, ln_D, y = (np.log(frame[column].to_numpy(float)) for column in ("N", "D", "loss"))
    return Cells(name, frame, ln_N, ln_D, ln_C, y, groups)


def _cuts(label: Any) -> list[int]:
    """Where a sorted row of ln C falls into budgets: at steps of more than GROUP, and where one would span more than twice that."""
    cuts, first = [], 0
    for at in range(1, len(label)):
        if label[at] - label[at - 1] > np.log1p(GROUP) or label[at] - label[first] > np.log1p(2 * GROUP):
            cuts.append(at)
            first = at
    return cuts
