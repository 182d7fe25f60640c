"""`status`: one screen of a run, or a line for each of several: is it well, how far is it, when is it done.

Reads what a run leaves in its folder (and asks Slurm, where there is one); writes nothing there, needs no GPU and starts without
torch, so that it works on a login node beside a run, after it, and in the middle of its end.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Optional

from data.errors import InputError
from pretrain.json_file import write_json
from pretrain.status.display import moment, screen, table
from pretrain.status.records import Job, Records, is_run, queue, read_records
from pretrain.status.report import Report, describe
from pretrain.terminal import coloured, paint


def status(path: str, json_file: Optional[str] = None, watch: float = 0.0) -> int:
    """Prints how the run in the folder `path` is, or all runs directly below it; the same as JSON to `json_file`.

    watch: seconds between two looks, until interrupted; 0 = one look. Returns the exit code: 0, whatever the state of the run.
    InputError for a folder without a run, a negative time, or a file that cannot be written.
    """
    if not (math.isfinite(watch) and watch >= 0):
        raise InputError(f"status: --watch is {watch:g}, it must be seconds between two looks (0 = one look)")
    folder = Path(path)
    try:
        while True:
            reports = look(folder)
            if json_file:
                write_json(json_file, reports[0] if is_run(folder) else reports)
            _show(reports, one=is_run(folder), again=watch > 0)
            if not watch:
                return 0
            time.sleep(watch)
    except KeyboardInterrupt:
        return 0


def look(folder: Path) -> list[Report]:
    """The report of the run in `folder`, or of every run directly below it, by name. InputError if there is none."""
    if is_run(folder):
        folders = [folder]
    else:
        try:
            folders = sorted(below for below in folder.iterdir() if below.is_dir() and is_run(below))
        except OSError as error:
            raise InputError(f"status: {folder} cannot be read ({error.strerror}); name a run folder") from None
    if not folders:
        raise InputError(f"status: {folder} is no run folder and holds none; `train` makes one at run.dir/run.name")
    found = [read_records(one.absolute() if one.name in ("", "..") else one) for one in folders]
    known = queue([job for one in found for job in one.jobs])
    return [describe(one, _own(one, known)) for one in found]


def _own(found: Records, known: Optional[dict[str, Job]]) -> Optional[dict[str, Job]]:
    """The jobs of one run, the newest first. None: Slurm says nothing, or the run has nothing to do with it."""
    if known is None or not found.jobs:
        return None
    return {job: known[job] for job in reversed(found.jobs) if job in known}


def _show(reports: list[Report], one: bool, again: bool) -> None:
    out, colours = sys.stdout, coloured(sys.stdout)
    blocks = (out.encoding or "").lower().replace("-", "") == "utf8"
    text = "\n\n".join(screen(report, colours, blocks) for report in reports) if one else table(reports, colours)
    if again:
        head = paint(f"{moment(reports[0]['time'])}, Ctrl-C ends", "dim", colours)
        # A terminal is written over, not cleared first: it does not flicker.
        lines = [f"{line}\x1b[K" if out.isatty() else line for line in f"{head}\n{text}".splitlines()]
        text = "\n".join(lines)
        text = f"\x1b[H{text}\n\x1b[J" if out.isatty() else f"{text}\n"
    print(text, flush=True)
