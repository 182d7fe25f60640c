"""Every command: its command line, and the function that does it. What is imported is what the command needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

from data.errors import InputError
from pretrain.arguments import flag, located, options, parse, parser_of

PROFILE = "record a few steps: RUN/profile; --profile=steps=5,ranks=all,stacks,memory,flops for more"
WATCH = """watch train --config FILE [--section.key value ...]: the parent of one rank's training process, one a rank, in its place:

  srun python -m pretrain watch train ...      torchrun --nproc-per-node 8 -m pretrain watch train ...

It finds a rank that hangs or is gone, writes the stacks of all ranks to RUN/logs/stacks-START, names the fault in
RUN/health/fault-START.json and ends every rank. Exit codes: 0, 2 and 75 as train, 76 a fault, 130 Ctrl-C."""


def _prepare(arguments: Sequence[str]) -> int:
    from data.prepare import prepare
    from data.prepare_options import PrepareOptions

    prepare(options(PrepareOptions, "prepare", arguments, positional="inputs"))
    return 0


def _data(arguments: Sequence[str]) -> int:
    what = arguments[0] if arguments else ""
    if what in ("-h", "--help"):
        print(
            "data verify LOCATION: reads every byte of a shard set, lists all that is wrong; exit code 2 if anything is"
        )
        print("data inspect LOCATION: what a shard set holds: counts, lengths of documents, spans, padding, licences")
        return 0
    if what not in ("verify", "inspect"):
        raise InputError("data: say `data verify LOCATION` or `data inspect LOCATION`")
    from pretrain import data_command

    if what == "inspect":
        return data_command.inspect(located(data_command.InspectOptions, "data inspect", arguments[1:]))
    return data_command.verify(located(data_command.VerifyOptions, "data verify", arguments[1:]))


def _train(arguments: Sequence[str]) -> int:
    from pretrain import load_config
    from pretrain.loop.preemption import Preemption
    from pretrain.loop.profiling import profile_options

    parser = load_config.config_parser("train: trains a model, or goes on training in an existing run folder")
    parser.add_argument("--profile", nargs="?", const="", help=PROFILE)
    config, others = load_config.parse(parser, arguments)
    profile = None if others["profile"] is None else profile_options(others["profile"])
    preemption = Preemption(("TERM", config.health.preempt_signal))  # before the seconds that imports take
    from pretrain.train import train

    return train(config, preemption, profile)


def _watch(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(WATCH)
        return 0
    from pretrain.watching.watch import watch

    return watch(arguments)


def _restart(arguments: Sequence[str]) -> int:
    parser = parser_of("restart: when a start of a run is over: whether there is another one (75) or not (77)")
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--code", type=int, required=True, help="exit code that the start ended with")
    parser.add_argument("--no_wait", type=bool, default=False, help="only say the pause, do not sit it out")
    parser.add_argument("--config", default="", help="file to take `health` from instead of RUN/config.yaml")
    values = parse(parser, "restart", flag(flag(arguments, "--no-wait"), "--no_wait"))
    from pretrain.watching.restart_command import restart

    return restart(values.run, values.code, wait=not values.no_wait, config=values.config)


def _submit(arguments: Sequence[str]) -> int:
    from pretrain.submission.submit import submit

    return submit(arguments)


def _status(arguments: Sequence[str]) -> int:
    parser = parser_of("status: is a run well, how far is it, when is it done; of a folder of runs, a line for each")
    parser.add_argument("path", help="a run folder, or a folder of runs")
    parser.add_argument("--json", help="also write it to this file")
    parser.add_argument(
        "--watch", type=float, default=0.0, help="seconds between two looks, until Ctrl-C (0: one look)"
    )
    values = parse(parser, "status", arguments)
    from pretrain.status.command import status

    return status(values.path, values.json, values.watch)


def _logs(arguments: Sequence[str]) -> int:
    parser = parser_of("logs: what all ranks of a run said, in the order of time")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--ranks", default="", help="only these: 0,3-5")
    parser.add_argument("--last", type=Optional[int], default=None, help="newest messages shown (200)")
    parser.add_argument("--since", default="", help="a time in UTC (2026-11-21T18:00), or 10m, 2h, 3d ago")
    parser.add_argument("--grep", default="", help="only messages that match this regular expression")
    parser.add_argument("--follow", type=bool, default=False, help="go on with what comes, until Ctrl-C")
    parser.add_argument("--start", default="", help="only that start of the run, by its name, or `last`")
    values = parse(parser, "logs", flag(arguments, "--follow"))
    from pretrain.logs.command import logs

    return logs(
        values.run,
        ranks=values.ranks,
        last=values.last,
        since=values.since,
        grep=values.grep,
        follow=values.follow,
        start=values.start,
    )


def _sample(arguments: Sequence[str]) -> int:
    from pretrain.sampling.command import SampleOptions, sample

    sample(options(SampleOptions, "sample", arguments))
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    from pretrain.evaluation.command import EvaluateOptions, evaluate

    return evaluate(options(EvaluateOptions, "evaluate", arguments))


def _plot(arguments: Sequence[str]) -> int:
    parser = parser_of("plot: loss curves of a run as a PNG")
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--output", help="file to write instead of loss.png in the run folder")
    values = parse(parser, "plot", arguments)
    from pretrain.plot import plot

    print(plot(values.run, values.output or ""))
    return 0


def _track(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] != "sync":
        raise InputError("track: the only thing to do is `track sync --run FOLDER` (or --all FOLDER)")
    parser = parser_of("track sync: ships every metric of a run that MLflow does not have yet")
    parser.add_argument("--run", default="", help="run folder")
    parser.add_argument("--all", default="", help="every run below this folder")
    parser.add_argument("--uri", default="", help="another store than the run's own")
    values = parse(parser, "track sync", arguments[1:])
    if bool(values.run) == bool(values.all):
        raise InputError("track sync: give --run FOLDER, or --all FOLDER for every run below it")
    from pretrain.tracking.sync import sync, sync_all

    if values.all:
        sync_all(values.all, values.uri)
    else:
        print(sync(values.run, values.uri))
    return 0


def _checkpoint(arguments: Sequence[str]) -> int:
    what = arguments[0] if arguments else ""
    descriptions = {
        "inspect": "checkpoint inspect: what a checkpoint holds: step, samples, who wrote it, every tensor",
        "verify": "checkpoint verify: reads every byte of a checkpoint, or of all of a run; exit code 2 if one is bad",
    }
    if what in ("-h", "--help"):
        print("\n".join(descriptions.values()))
        return 0
    if what not in descriptions:
        raise InputError("checkpoint: say `checkpoint inspect PATH` or `checkpoint verify PATH`")
    parser = parser_of(descriptions[what])
    parser.add_argument("path", help="a run folder, or one checkpoint: RUN/checkpoints/step-NNNNNNNN")
    parser.add_argument("--json", help="also write the findings to this file")
    if what == "inspect":
        parser.add_argument("--norms", type=bool, default=False, help="also print each tensor's norm; reads all values")
    values = parse(parser, f"checkpoint {what}", flag(arguments[1:], "--norms"))
    from pretrain import checkpoint_command

    if what == "inspect":
        return checkpoint_command.inspect(values.path, values.json, values.norms)
    return checkpoint_command.verify(values.path, values.json)


def _doctor(arguments: Sequence[str]) -> int:
    parser = parser_of("doctor: what this machine has and lacks")
    parser.add_argument("--json", help="also write the findings to this file")
    values = parse(parser, "doctor", arguments)
    from pretrain.doctor.command import doctor

    return doctor(values.json)


def _quickstart(arguments: Sequence[str]) -> int:
    parse(
        parser_of("quickstart: prepare, train on 2 ranks, resume, sample and plot, on the standard library's sources"),
        "quickstart",
        arguments,
    )
    from pretrain.quickstart import quickstart

    return quickstart()


STUDY = """study: a scaling-law study, from a budget to a law with error bars

  study plan STUDY.yaml      budgets, sizes and rules -> cells with stable ids, and what they cost
  study run STUDY.yaml       trains what is missing, here or (--slurm) as an array job; a bad cell is left out with its reason
  study fit FOLDER | CSV     laws with intervals, and predictions that say how far they reach
  study report FOLDER        one page with figures, and the config of the recommended run

`study WHAT --help` shows the options."""


def _plan(arguments: Sequence[str]) -> int:
    from pretrain.planning.command import plan

    return plan(arguments)


def _study(arguments: Sequence[str]) -> int:
    what = arguments[0] if arguments else ""
    if what in ("-h", "--help"):
        print(STUDY)
        return 0
    if what == "plan":
        from pretrain.study.command_plan import plan

        return plan(arguments[1:])
    if what == "run":
        from pretrain.study.command_run import run

        return run(arguments[1:])
    if what == "fit":
        from pretrain.study.command_fit import fit

        return fit(arguments[1:])
    if what == "report":
        from pretrain.study.command_report import report

        return report(arguments[1:])
    raise InputError(
        "study: say `study plan`, `study run`, `study fit` or `study report`; `study --help` says what they do"
    )


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "prepare": _prepare,
    "data": _data,
    "train": _train,
    "watch": _watch,
    "restart": _restart,
    "plan": _plan,
    "study": _study,
    "submit": _submit,
    "status": _status,
    "logs": _logs,
    "sample": _sample,
    "evaluate": _evaluate,
    "plot": _plot,
    "checkpoint": _checkpoint,
    "track": _track,
    "doctor": _doctor,
    "quickstart": _quickstart,
}
