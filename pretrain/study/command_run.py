"""`study run`: trains what a study lacks, on this machine or on a Slurm cluster, and says of each cell what became of it."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from data.errors import InputError
from pretrain.arguments import flag, parse, parser_of
from pretrain.quantities import duration
from pretrain.study.command_plan import add_rate, rate_of, split_overrides
from pretrain.study.design.cells import Cell
from pretrain.study.design.corpus import write_part
from pretrain.study.design.costs import Rate, measured_rate, table
from pretrain.study.design.plan import Planned, begun, hold, make_plan, open_study, write_plan
from pretrain.study.design.spec import load_study
from pretrain.study.running.local_queue import LocalQueue, listening
from pretrain.study.running.results import Results
from pretrain.study.running.slurm import SlurmOptions, slurm_ends, submit_study
from pretrain.study.running.tracking import StudyShipper, ship_study
from pretrain.submission.submit import jobs_of

FLAGS = ("--slurm", "--collect", "--chain_fit", "--cpu", "--dry_run")
DESCRIPTION = """study run: trains the cells of a study that are not done, here or (--slurm) as an array job.
`study run STUDY.yaml [--study.key value ...]` plans first, `study run FOLDER` takes what `study plan` wrote; both go on where
the study was stopped. Ctrl-C and TERM let cells save. A cell that diverged, was cut, lacks tokens or failed stands in results.csv
with its reason, and stops no other. Exit codes: 0 over, 1 over but no cell has a loss, 2 a mistake, 75 and 130 asked to leave."""


def run(arguments: Sequence[str]) -> int:
    """arguments: a study's YAML or folder, --study.key overrides, options. InputError for a mistake."""
    options, others = _options(arguments)
    folder = _folder(options.study, others, options.dry_run, options.collect)
    with hold(folder) if not options.dry_run else contextlib.nullcontext():
        said = _plan(options, others)
        planned = open_study(folder)
        results = _known(planned)
        if options.collect:
            return _collect(planned, results)
        waiting = [cell for cell in planned.runnable() if not results.of(cell).final]
        rate = rate_of(options) or _measured(planned, results)
        print(*table(planned.cells, rate), sep="\n")
        print(
            *said,
            f"{len(planned.runnable()) - len(waiting)} cells have their result, {len(waiting)} are to run",
            sep="\n",
        )
        if options.dry_run or not waiting:
            if not options.dry_run:
                return _collect(planned, results)
            return 0
        _check(planned, waiting)
        _make_parts(planned, waiting)
        if options.slurm:
            print(*submit_study(planned, waiting, _slurm_options(options)), sep="\n")
            return 0
        if there := _jobs_of(planned):
            raise InputError(
                f"study {folder} has a job already: {there[0][0]} ({there[0][1].lower()}); wait for it, or scancel it"
            )
        return _here(planned, results, waiting, rate, options)


def _options(arguments: Sequence[str]) -> tuple[Any, list[str]]:
    parser = parser_of(DESCRIPTION)
    parser.prog = "python -m pretrain study run"
    parser.add_argument("study", help="the study's YAML, or the folder that `study plan` wrote")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time on this machine")
    parser.add_argument("--timeout", type=float, default=0.0, help="seconds after which cells save and leave (0: none)")
    parser.add_argument("--dry_run", type=bool, default=False, help="only the table of what would run")
    parser.add_argument(
        "--collect", type=bool, default=False, help="train nothing: results.csv and MLflow as things stand"
    )
    parser.add_argument("--slurm", type=bool, default=False, help="submit an array job, a task a cell")
    for name, default, words in (
        ("limit", 8, "slurm: cells at a time"),
        ("time", "24:00:00", "slurm: limit of one start of a cell, which goes on in the next"),
        ("signal_seconds", 180, "slurm: before that limit, when a cell is asked to save"),
        ("gpus_per_node", 8, "slurm: most ranks on a node"),
        ("partition", "", "slurm: to submit to"),
        ("account", "", "slurm: to charge"),
        ("environment", "", "slurm: shell file that the jobs source (slurm/h800.env)"),
        ("sbatch_args", "", "slurm: more options for sbatch, each as --name=value, in one string"),
        ("chain_fit", True, "slurm: a job behind the array that collects, fits and reports"),
        ("cpu", False, "slurm: ask for no GPUs"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=words)
    add_rate(parser)
    own, others = split_overrides(arguments)
    for name in FLAGS:
        own = flag(flag(own, name.replace("_", "-")), name)
    options = parse(parser, "study run", own)
    if options.jobs < 1 or options.timeout < 0:
        raise InputError("study run: --jobs must be at least 1, and --timeout at least 0 (0: none)")
    if options.slurm and options.collect:
        raise InputError("study run: --slurm or --collect, not both")
    return options, others


def _slurm_options(options: Any) -> SlurmOptions:
    return SlurmOptions(**{name: getattr(options, name) for name in SlurmOptions.__dataclass_fields__})


def _folder(given: str, overrides: Sequence[str], dry_run: bool, collect: bool) -> Path:
    if Path(given).is_dir():
        if overrides:
            raise InputError(f"study run: {given} is planned already: give its YAML to run it with {overrides[0]}")
        found = open_study(Path(given))  # a folder that is no study must not get a lock file
        if not collect and found.study.folder.resolve() != Path(given).resolve():
            raise InputError(
                f"study run: {given} was planned as {found.study.folder}, where its cells would be trained: run it there, or "
                "plan it with another study.dir or study.name"
            )
        return Path(given)
    if dry_run:
        raise InputError(
            f"study run --dry-run takes a planned folder; `study plan {given} --dry-run` shows a study's cells"
        )
    return load_study(given, overrides).folder


def _plan(options: Any, overrides: Sequence[str]) -> list[str]:
    """Plans, where a YAML was given."""
    if Path(options.study).is_dir():
        return []
    made = make_plan(load_study(options.study, overrides))
    return [*(f"note: {note}" for note in made.notes), *write_plan(made)]


def _measured(planned: Planned, results: Results) -> Optional[Rate]:
    seconds = {cell.id: results.of(cell).seconds for cell in planned.runnable() if results.of(cell).status == "done"}
    return measured_rate(planned.cells, seconds)


def _check(planned: Planned, cells: Sequence[Cell]) -> None:
    """InputError, naming the cell, for what `train` would refuse. Imports torch: `study plan` has checked what needs none."""
    from pretrain.check_values import check_values
    from pretrain.training_data import open_set, open_training_data

    for number, cell in enumerate(cells):
        config = planned.config(cell)
        if config is None:
            raise InputError(f"{planned.config_file(cell)} is gone: plan the study again")
        try:
            check_values(config)
            if not number and not cell.part:
                open_training_data(config, "size")
                open_set("data.val_shards", config.data.val_shards, "size", config)
        except InputError as error:
            raise InputError(f"study: cell {cell.id}: {error}") from None


def _make_parts(planned: Planned, cells: Sequence[Cell]) -> None:
    """The parts of the training set that cells with few unique tokens read."""
    for part, cell in {cell.part: cell for cell in cells if cell.part}.items():
        config = planned.config(cell)
        assert config is not None, "checked before"
        write_part(Path(planned.shards), list(part), Path(str(config.data.shards)))


def _here(planned: Planned, results: Results, cells: Sequence[Cell], rate: Optional[Rate], options: Any) -> int:
    import torch

    gpus = torch.cuda.device_count()
    jobs = _jobs_on(gpus, planned.study.ranks, options.jobs)
    began = time.monotonic()
    with listening() as asked:
        shipper = StudyShipper(planned, _say)
        try:
            queue = LocalQueue(
                planned,
                results,
                asked,
                jobs=jobs,
                gpus=gpus,
                timeout=options.timeout,
                seconds_of=lambda cell: rate.seconds(cell) if rate else None,
                say=_say,
            )
            code = queue.run(cells)
        finally:
            shipper.close(10.0 if asked.by is not None else 90.0)
    print(*_summary(planned, results), f"took {duration(time.monotonic() - began)}", sep="\n")
    return code or _code(planned, results)


def _jobs_on(gpus: int, ranks: int, jobs: int) -> int:
    """How many cells train at a time: with GPUs, no more than have one for each of their ranks. InputError if not even one has."""
    if not gpus:
        return jobs
    if gpus < ranks:
        raise InputError(
            f"study run: a cell has study.ranks {ranks}, and {gpus} GPUs are seen here: set study.ranks {gpus} or fewer, use "
            "--slurm, or train on CPUs with CUDA_VISIBLE_DEVICES= in the environment"
        )
    if jobs * ranks > gpus:
        _say(f"{gpus // ranks} cells at a time instead of {jobs}: {gpus} GPUs are seen here")
    return min(jobs, gpus // ranks)


def _jobs_of(planned: Planned) -> list[tuple[str, str]]:
    """(job, state) of what Slurm has of this study; none where there is no Slurm."""
    if shutil.which("squeue") is None:
        return []
    try:
        return jobs_of(planned.folder.absolute(), planned.study.name)
    except InputError:  # a Slurm that does not answer
        return []


def _known(planned: Planned) -> Results:
    """The study's results, with how starts ended here and in jobs; of both the later."""
    results = Results(planned)
    for name, end in slurm_ends(planned.folder).items():
        if name not in results.ends or end.time > results.ends[name].time:
            results.ends[name] = end
    return results


def _collect(planned: Planned, results: Results) -> int:
    """What the run folders and the jobs' logs say now."""
    at_work: frozenset[str] = frozenset()
    if _jobs_of(planned):
        at_work = frozenset(cell.id for cell in planned.runnable() if begun(planned.folder, cell.id))
    results.write(at_work)
    print(*_summary(planned, results, at_work), sep="\n")
    try:
        sent = ship_study(planned, results, wait=30.0, at_work=bool(at_work))
        if planned.tracking_uri is not None:
            print(f"MLflow: {sent} points shipped")
    except Exception as error:  # a dead server is no reason to have no results
        from pretrain.tracking.mlflow_run import plain_error

        print(
            f"MLflow does not take the study ({plain_error(error)}): `study run {planned.folder} --collect` tries again"
        )
    return _code(planned, results)


def _code(planned: Planned, results: Results) -> int:
    return 0 if any(results.of(cell).status == "done" for cell in planned.cells) else 1


def _summary(planned: Planned, results: Results, at_work: frozenset[str] = frozenset()) -> Iterator[str]:
    found = {cell.id: results.of(cell, cell.id in at_work) for cell in planned.cells}
    for name, one in found.items():
        if one.status != "done":
            yield f"{one.status}: {name}: {one.reason}"
        elif one.note:
            yield f"note: {name}: {one.note}: a law through it says little of models that have learned more"
    done = sum(one.status == "done" for one in found.values())
    yield f"{planned.folder / 'results.csv'}: {done} of {len(found)} cells have a loss"
    if done:
        yield f"next: python -m pretrain study fit {planned.folder}"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
