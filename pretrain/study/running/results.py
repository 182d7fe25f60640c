"""What became of every cell, from its run folder, and results.csv: a row a cell, with the reason why one does not count."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from data.durable import keep_file, write_durably
from data.errors import InputError
from pretrain.study.design.cells import Cell
from pretrain.study.design.plan import Planned
from pretrain.tracking.metric_log import read_metrics

RESULTS, ENDS = "results.csv", "ends.json"
COLUMNS = (
    *("cell", "objective", "size", "N", "D", "C", "loss", "loss_se", "unique_tokens", "epochs", "budget", "repeat"),
    *("lr", "batch", "steps", "seed", "status", "reason"),
)
SHOWN, MOST_SAID = 300, 1000  # characters of a last word: in a reason, and kept
ROLLED_BACK = "health.max_rollbacks"  # what training says when it gives up on numerical trouble


def last_word(lines: Sequence[str]) -> str:
    """Of what a cell said: why it gave up on its numbers, else its last error, else the last exception, else what its watch said
    last, else the last line.
    """
    told = [line.strip() for line in lines if line.strip()]
    plain = [re.sub(r"^\[[^\]]*\]:? ?", "", line) for line in told]  # a launcher names the rank
    gave_up = [line for line in plain if ROLLED_BACK in line]
    errors = [line for line in plain if line.startswith("error")]
    raised = [
        line for line in plain if line.split(":")[0].endswith(("Error", "Exception")) and "ChildFailed" not in line
    ]
    watched = [line for line in plain if line.startswith("watch: ")]
    return (gave_up or errors or raised or watched or plain or [""])[-1][:MOST_SAID]


@dataclass(frozen=True)
class End:
    """How the last start of a cell ended. code: exit code, or minus a signal. said: its last word. time: when (seconds since 1970,
    UTC); 0: nobody noted it.
    """

    code: int
    said: str = ""
    tries: int = 1
    time: float = 0.0

    @property
    def diverged(self) -> bool:
        """Training gave up on its numbers: another start would read the same samples to the same end."""
        return ROLLED_BACK in self.said


@dataclass(frozen=True)
class Result:
    """status: done | excluded | missing. step: the last that was taken. seconds: that all steps took. note: what to think of it."""

    status: str
    reason: str = ""
    loss: Optional[float] = None
    loss_se: Optional[float] = None
    step: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def final(self) -> bool:
        """Whether another start would change nothing."""
        return self.status == "done" or self.reason.startswith("diverged")


def result_of(
    cell: Cell, run: Path, end: Optional[End] = None, running: bool = False, vocab_size: Optional[int] = None
) -> Result:
    """What the run folder of a cell says. end: of its last start, where that is known. running: it is at work now.

    vocab_size: a loss above its logarithm is worse than knowing nothing.
    """
    if cell.status != "planned":
        return Result("excluded", cell.reason)
    try:
        last, seconds, measured = _read(run)
    except InputError as error:
        return Result("excluded", f"failed: {error}")
    where = f"step {last} of {cell.steps}"
    if measured and measured["step"] >= cell.steps:
        return _judge(measured, last, seconds, vocab_size)
    if running:
        return Result("missing", f"running: {where}", step=last, seconds=seconds)
    if end and end.code not in (0, 75):
        what = "diverged" if end.diverged else f"failed (exit code {end.code})"
        said = f"{end.said[:SHOWN]}..." if len(end.said) > SHOWN else end.said or "without a word"
        return Result("excluded", f"{what} at {where}: {said}", step=last, seconds=seconds)
    if last or end:
        behind = "" if last < cell.steps else ", no validation behind it"
        return Result("excluded", f"cut: {where}{behind}", step=last, seconds=seconds)
    return Result("missing", "not run")


def _judge(measured: Mapping[str, Any], last: int, seconds: float, vocab_size: Optional[int]) -> Result:
    """Of a cell whose last validation is there."""
    loss, error, unigram = (_number(measured.get(f"val/{name}")) for name in ("nelbo", "nelbo_se", "unigram_entropy"))
    if loss is None or not math.isfinite(loss):
        said = measured.get("val/nelbo")
        return Result(
            "excluded", f"diverged: the validation loss at the last step is {said}", step=last, seconds=seconds
        )
    reason, note = "", ""
    if vocab_size and loss > math.log(vocab_size):
        reason = f"diverged: its loss {loss:.4f} is above {math.log(vocab_size):.4f}, that of knowing nothing (ln {vocab_size})"
    elif unigram and loss > unigram:
        note = f"its loss {loss:.4f} is above {unigram:.4f}, that of token frequencies alone"
    return Result("excluded" if reason else "done", reason, loss, error, last, seconds, note)


def _read(run: Path) -> tuple[int, float, Optional[dict[str, Any]]]:
    """(last step, seconds of all steps, the last line with a validation)."""
    last, seconds, measured = 0, 0.0, None
    for line in read_metrics(run):
        last = max(last, line["step"])
        seconds += _number(line.get("perf/step_time")) or 0.0
        measured = line if "val/nelbo" in line else measured
    return last, seconds, measured


def _number(value: Any) -> Optional[float]:
    """Numbers that are not finite are written as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


class Results:
    """Of a whole study. What is final is read once."""

    def __init__(self, planned: Planned):
        self.planned = planned
        self.ends = read_ends(planned.folder)
        self._final: dict[str, Result] = {}

    def of(self, cell: Cell, running: bool = False) -> Result:
        if cell.id not in self._final:
            run, end = self.planned.run_folder(cell), self.ends.get(cell.id)
            found = result_of(cell, run, end, running, self.planned.vocab_size)
            if not found.final:
                return found
            self._final[cell.id] = found
        return self._final[cell.id]

    def ended(self, cell: Cell, end: End) -> None:
        """Keeps how a start ended, for the next `study run`."""
        self.ends[cell.id] = end
        record = {name: asdict(one) for name, one in self.ends.items()}
        write_durably(self.planned.folder / ENDS, (json.dumps(record, indent=1) + "\n").encode())

    def write(self, running: frozenset[str] = frozenset()) -> dict[str, Result]:
        """Writes results.csv as things stand; cell -> Result."""
        found = {cell.id: self.of(cell, cell.id in running) for cell in self.planned.cells}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for cell in self.planned.cells:
            writer.writerow(_row(cell, found[cell.id]))
        keep_file(self.planned.folder / RESULTS, text.getvalue().encode())
        return found


def _row(cell: Cell, result: Result) -> list[Any]:
    values = {name: getattr(cell, name, None) for name in COLUMNS} | {
        "cell": cell.id,
        "loss": result.loss,
        "loss_se": result.loss_se,
        "status": result.status,
        "reason": result.reason,
    }
    return ["" if values[name] is None else values[name] for name in COLUMNS]


def read_ends(folder: Path) -> dict[str, End]:
    """How starts ended, as far as it is known; {} where nothing is."""
    try:
        return {name: End(**one) for name, one in json.loads((folder / ENDS).read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
