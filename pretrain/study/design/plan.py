"""A study's plan and its folder: written again it is the same, byte for byte; what has been trained is never planned away.

STUDY/study.yaml       the study as planned          STUDY/cells/ID.yaml   a whole config of `train`
STUDY/planned_base.yaml, planned_family.yaml         what all cells start from, and their sizes
STUDY/plan.json        every cell                    STUDY/cells.txt       a cell a line, for slurm/study.sbatch
STUDY/runs/ID/         run folders                   STUDY/results.csv     a row a cell
STUDY/data/            parts of the training set     STUDY/logs/           what the cells said
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Optional

import yaml

from data.durable import keep_file, take_lock
from data.errors import InputError
from pretrain.config import Config
from pretrain.load_config import config_from_dict
from pretrain.study.design.cells import Cell, base_config, cells_of
from pretrain.study.design.corpus import Corpus, look_at
from pretrain.study.design.family import Size, load_family
from pretrain.study.design.identity import definition, differences, plain
from pretrain.study.design.spec import StudyConfig, load_study, to_yaml

PLAN, STUDY, CELLS_LIST, LOCK = "plan.json", "study.yaml", "cells.txt", ".lock"
BASE, FAMILY = "planned_base.yaml", "planned_family.yaml"
NAMED = 3  # differences that a refusal lists


@dataclass(frozen=True)
class Plan:
    """notes: what a person should know."""

    study: StudyConfig
    base: Config
    family: dict[str, Size]
    corpus: Corpus
    cells: tuple[tuple[Cell, Config], ...]
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.study.folder


def make_plan(study: StudyConfig, need_data: bool = True) -> Plan:
    """Everything that follows from the study, its base, its family and its data; nothing is written. InputError for a mistake.

    need_data: without it, data that are not there are a note, and every cell has tokens enough.
    """
    base = base_config(study)
    notes: list[str] = []
    try:
        corpus = look_at(base)
        notes += corpus.unseen
        _check_vocabulary(base, corpus)
    except InputError as error:
        if need_data:
            raise
        corpus = Corpus(None, "")
        notes.append(f"{error}; ids are not final, and whether there are tokens enough is not known")
    family = load_family(study.family)
    cells = cells_of(study, base, family, corpus)
    return Plan(study, base, family, corpus, tuple(cells), tuple(notes))


def _check_vocabulary(base: Config, corpus: Corpus) -> None:
    if corpus.manifest is not None and corpus.manifest.vocab_size > base.model.vocab_size:
        raise InputError(
            f"study.base: model.vocab_size {base.model.vocab_size} is smaller than the {corpus.manifest.vocab_size} ids of "
            f"data.shards: set model.vocab_size to {corpus.manifest.vocab_size} in study.overrides"
        )


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps every other `study plan` and `study run` of this study out; InputError if one is at work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder / LOCK)
    except BlockingIOError:
        raise InputError(f"study {folder} is in use by another `study` command: wait for it, or end it") from None
    except OSError as error:
        raise InputError(
            f"study folder {folder} cannot be written ({error.strerror}): choose another study.dir"
        ) from None
    try:
        yield
    finally:
        os.close(lock)


def write_plan(plan: Plan) -> list[str]:
    """Writes the plan into its folder, which the caller holds; what changed there, in words.

    InputError, and nothing written, if a cell that has begun would be trained otherwise than it was.
    """
    folder, said = plan.folder, []
    before = _read(folder) if (folder / PLAN).exists() else None
    if before:
        said = _compare(plan, before)
    planned = {cell.id: config for cell, config in plan.cells if cell.status == "planned"}
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        for name, config in planned.items():
            keep_file(folder / "cells" / f"{name}.yaml", _dump(config))
        for path in (folder / "cells").glob("*.yaml"):
            if path.stem not in planned:
                path.unlink()
        keep_file(
            folder / CELLS_LIST, "".join(shlex.quote(f"{folder}/cells/{name}.yaml") + "\n" for name in planned).encode()
        )
        keep_file(folder / BASE, _dump(plan.base))
        keep_file(folder / FAMILY, _yaml({"sizes": {name: asdict(size) for name, size in plan.family.items()}}))
        keep_file(folder / STUDY, to_yaml(plan.study).encode())
        keep_file(folder / PLAN, (json.dumps(_record(plan), indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(
            f"study folder {folder} cannot be written ({error.strerror}): choose another study.dir"
        ) from None
    return said


def _dump(config: Config) -> bytes:
    return _yaml(plain(config))


def _yaml(values: dict[str, Any]) -> bytes:
    return yaml.dump(values, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False).encode()


def _record(plan: Plan) -> dict[str, Any]:
    study = plan.study
    return {
        "name": study.name,
        "design": study.design,
        "count": study.count,
        "flops": study.flops,
        "sequence_length": plan.base.data.sequence_length,
        "vocab_size": plan.base.model.vocab_size,
        "data": {"fingerprint": plan.corpus.fingerprint, "tokens": plan.corpus.tokens, "shards": plan.base.data.shards},
        "tracking": {"uri": plan.base.tracking.uri, "experiment": plan.base.tracking.experiment},
        "cells": [asdict(cell) for cell, _ in plan.cells],
    }


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / PLAN).read_bytes())
        found["cells"] = [_cell(record) for record in found["cells"]]
        return found
    except FileNotFoundError:
        raise InputError(
            f"{folder}: no {PLAN}, so this is no planned study: `study plan STUDY.yaml` makes one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / PLAN}: cannot be read ({error!r:.100}): plan the study again in another folder"
        ) from None


def _cell(record: dict[str, Any]) -> Cell:
    names = {one.name for one in fields(Cell)}
    return Cell(**{name: value for name, value in record.items() if name in names} | {"part": tuple(record["part"])})


def begun(folder: Path, name: str) -> bool:
    """Whether a cell has taken steps."""
    spool = folder / "runs" / name / "metrics.jsonl"
    return spool.exists() and spool.stat().st_size > 0


def _compare(plan: Plan, before: dict[str, Any]) -> list[str]:
    folder, ids = plan.folder, {cell.id for cell, _ in plan.cells}
    old: dict[str, Cell] = {cell.id: cell for cell in before["cells"]}
    now = {cell.place: (cell, config) for cell, config in plan.cells}
    gone = [cell for name, cell in old.items() if name not in ids]
    for cell in gone:
        if begun(folder, cell.id) and cell.place in now:
            _refuse(folder, cell, now[cell.place][1], before, plan)
    if (before["count"], before["flops"]) != (plan.study.count, plan.study.flops) and any(
        begun(folder, name) for name in old
    ):
        return [
            f"N and C are now counted as {plan.study.count} and {plan.study.flops} (before: {before['count']}, {before['flops']})"
        ]
    said = []
    if new := [cell for cell, _ in plan.cells if cell.id not in old]:
        said.append(f"{len(new)} cells are new")
    left = [cell.id for cell in gone if begun(folder, cell.id)]
    if left:
        said.append(
            f"{len(left)} cells that were trained are not in this study any more ({left[0]}, ...): their runs stay"
        )
    return said


def _refuse(folder: Path, old: Cell, config: Config, before: dict[str, Any], plan: Plan) -> None:
    changed = []
    if before["data"]["fingerprint"] != plan.corpus.fingerprint:
        changed.append("the data are others")
    path = folder / "runs" / old.id / "config.yaml"
    if path.exists():
        was = config_from_dict(yaml.safe_load(path.read_text()))
        changed += differences(definition(was), definition(config))
    words = ", ".join(changed[:NAMED]) + (f" and {len(changed) - NAMED} more" if len(changed) > NAMED else "")
    raise InputError(
        f"study {folder}: cell {old.id} has been trained, and this study would train it otherwise: {words or 'its definition'}; "
        "take that back, or give the study another study.name"
    )


@dataclass(frozen=True)
class Planned:
    """A planned study as its folder has it."""

    folder: Path
    study: StudyConfig
    cells: tuple[Cell, ...]
    count: str
    flops: str
    sequence_length: int
    vocab_size: int
    shards: str
    tracking: Mapping[str, str]

    @property
    def tracking_uri(self) -> Optional[str]:
        """The MLflow store: what the base config says, by default sqlite in the studies' folder; None when switched off."""
        uri = self.tracking.get("uri", "none")
        return None if uri == "none" else uri or f"sqlite:///{self.folder.absolute().parent / 'mlflow.db'}"

    @property
    def experiment(self) -> str:
        return self.tracking.get("experiment", "palimpsest")

    def runnable(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.status == "planned"]

    def config_file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.id}.yaml"

    def run_folder(self, cell: Cell) -> Path:
        return self.folder / "runs" / cell.id

    def config(self, cell: Cell) -> Optional[Config]:
        path = self.config_file(cell)
        return config_from_dict(yaml.safe_load(path.read_text())) if path.exists() else None


def rules_as_planned(folder: Path) -> StudyConfig:
    """The study of a folder, whose base and family are those that its cells were planned with, whatever became of the files.

    InputError where study.yaml is missing or broken. A folder without the two files names those of study.yaml.
    """
    study = load_study(str(folder / STUDY))
    if not ((folder / BASE).is_file() and (folder / FAMILY).is_file()):
        return study
    return replace(study, base=str(folder / BASE), overrides={}, family=str(folder / FAMILY))


def open_study(folder: Path) -> Planned:
    """The study at a folder that `study plan` wrote; InputError if it is none."""
    found = _read(folder)
    study = load_study(str(folder / STUDY))
    words = (
        found["count"],
        found["flops"],
        found["sequence_length"],
        found["vocab_size"],
        str(found["data"]["shards"]),
        found["tracking"],
    )
    return Planned(folder, study, tuple(found["cells"]), *words)
