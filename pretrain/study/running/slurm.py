"""A study as one Slurm array: a task a cell, each started again until it is done, then one job that collects, fits and reports."""

from __future__ import annotations

import calendar
import getpass
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import InputError
from pretrain.study.design.cells import Cell
from pretrain.study.design.plan import CELLS_LIST, Planned
from pretrain.study.running.results import End, last_word
from pretrain.submission.ask import ask
from pretrain.submission.checks import check_time
from pretrain.submission.package import forget, package
from pretrain.submission.submit import jobs_of

SCRIPT, END_SCRIPT = Path("slurm") / "study.sbatch", Path("slurm") / "study_end.sbatch"


@dataclass(frozen=True)
class SlurmOptions:
    """limit: cells at a time. time: limit of one start of a cell. chain_fit: also submit the job that fits and reports."""

    limit: int = 8
    time: str = "24:00:00"
    signal_seconds: int = 180
    gpus_per_node: int = 8
    partition: str = ""
    account: str = ""
    environment: str = ""
    sbatch_args: str = ""
    chain_fit: bool = True
    cpu: bool = False


def submit_study(planned: Planned, cells: Sequence[Cell], options: SlurmOptions) -> list[str]:
    """Packs the code with the configs of `cells`, submits the array and what follows it; what was done, in lines.

    InputError, and nothing left behind, for what Slurm refuses, or if a job of this study waits or runs already.
    """
    folder = planned.folder.absolute()
    ranks = planned.study.ranks
    check_time(options.time, options.signal_seconds)
    if options.limit < 1 or options.gpus_per_node < 1:
        raise InputError("study run: --limit and --gpus-per-node must be at least 1")
    per_node = min(ranks, options.gpus_per_node)
    if ranks % per_node:
        raise InputError(f"study run: study.ranks {ranks} is no multiple of --gpus-per-node {per_node}")
    if options.environment and not Path(options.environment).is_file():
        raise InputError(f"study run: --environment: no file {options.environment}")
    if there := jobs_of(folder, planned.study.name):
        raise InputError(
            f"study {folder} has a job already: {there[0][0]} ({there[0][1].lower()}); wait for it, or scancel it"
        )
    first = planned.config(cells[0])
    assert first is not None, "a cell that is to run has a config"
    about = {"study": planned.study.name, "cells": len(cells), "user": getpass.getuser(), "python": sys.executable}
    packed = package(first, folder, options.environment, about)
    lines = []
    try:
        (packed / "cells").mkdir()
        for cell in cells:
            kept = packed / "cells" / f"{cell.id}.yaml"
            shutil.copyfile(planned.config_file(cell), kept)
            lines.append(shlex.quote(str(kept)) + "\n")
        (packed / CELLS_LIST).write_text("".join(lines))
        (folder / "logs").mkdir(exist_ok=True)
        command = [
            *_common(planned, folder, options),
            f"--array=1-{len(cells)}%{options.limit}",
            *(f"--nodes={ranks // per_node}", f"--ntasks-per-node={per_node}"),
            *(f"--gpus-per-node={0 if options.cpu else per_node}", f"--cpus-per-task={2 + first.data.workers}"),
            *(f"--time={options.time}", f"--signal=B:USR1@{options.signal_seconds}", "--requeue", "--open-mode=append"),
            *_more(options.sbatch_args),
            str(packed / "code" / SCRIPT),
            str(packed / CELLS_LIST),
            sys.executable,
            first.health.preempt_signal,
        ]
        job = ask(command).split(";")[0]
    except InputError:
        forget(packed)
        raise
    except OSError as error:
        forget(packed)
        raise InputError(f"{packed} cannot be written ({error.strerror}): choose another study.dir") from None
    (packed / "job").write_text(job + "\n")
    said = [
        f"submitted: {packed}",
        f"command: {shlex.join(command)}",
        f"job {job}: {len(cells)} cells, {options.limit} at a time",
    ]
    if options.chain_fit:
        behind = [
            *_common(planned, folder, options, "-end"),
            *(f"--dependency=afterany:{job}", "--nodes=1", "--ntasks=1", "--gpus-per-node=0", "--time=02:00:00"),
            *_more(options.sbatch_args),
            *(str(packed / "code" / END_SCRIPT), str(packed), str(folder), sys.executable),
        ]
        try:
            last = ask(behind).split(";")[0]
        except InputError as error:  # the cells are on their way
            said.append(
                f"no job behind them ({error}): when they are over, `study run {folder} --collect`, `study fit`, `study report`"
            )
        else:
            said.append(f"job {last}: collects, fits and reports when all cells are over")
            job = f"{job} {last}"
    return [*said, f"their output: {folder}/logs/slurm-*.out; to end all: scancel {job}"]


def _common(planned: Planned, folder: Path, options: SlurmOptions, suffix: str = "") -> list[str]:
    logs = str(folder / "logs").replace("%", "%%")
    names = "slurm-%A-%a" if not suffix else "slurm-%j-end"
    return [
        *("sbatch", "--parsable", f"--job-name={planned.study.name}{suffix}", f"--comment=palimpsest:{folder}"),
        f"--output={logs}/{names}.out",
        *([f"--partition={options.partition}"] if options.partition else []),
        *([f"--account={options.account}"] if options.account else []),
    ]


def _more(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--sbatch-args: {text!r} cannot be read ({error})") from None
    for word in words:
        if not word.startswith("-"):
            raise InputError(f"--sbatch-args: {word!r} is no option; write each as --name=value")
    return words


def slurm_ends(folder: Path) -> dict[str, End]:
    """Cell -> how its last start ended, by what the tasks of arrays said; of those that said it."""
    found: dict[str, End] = {}
    for path in sorted((folder / "logs").glob("slurm-*_*.out")) + sorted((folder / "logs").glob("slurm-*-*.out")):
        try:
            text, touched = path.read_text(errors="replace"), os.path.getmtime(path)
        except OSError:
            continue
        cell = re.search(r"\] start \d+ of cell \d+, (\S.*), on ", text) or re.search(r"of cell \d+, (.+), on ", text)
        ended = re.findall(r"(?m)^(?:\[([\d-]+ [\d:]+Z?) )?.*the ranks ended with code (\d+)", text)
        if not cell or not ended:
            continue
        name, (stamp, code) = Path(cell[1]).name, ended[-1]
        told = [line for line in text.splitlines() if "srun: " not in line]
        end = End(int(code), last_word(told), len(ended), _seconds(stamp) or touched)
        if name not in found or found[name].time < end.time:
            found[name] = end
    return found


def _seconds(stamp: str) -> float:
    """Since 1970, of what slurm/job.sh writes in front of a line: in UTC, in the cluster's own zone (taken to be this machine's)
    in older logs; 0 if it is none. Better than the file's own time, which copies and later lines move on."""
    seconds = calendar.timegm if stamp.endswith("Z") else time.mktime
    try:
        return float(seconds(time.strptime(stamp.rstrip("Z"), "%Y-%m-%d %H:%M:%S")))
    except (ValueError, OverflowError):
        return 0.0
