"""The command line: `python -m pretrain COMMAND ...`. Exit codes: 0 done, 2 a mistake in config or input, others are crashes."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from data.errors import InputError
from parallel.errors import CheckpointError

HELP = """Palimpsest: pretraining of masked-diffusion language models.

usage: python -m pretrain COMMAND [options]        (COMMAND --help shows the options)

  prepare     text -> tokenizer + tar shards          prepare --source stdlib --out runs/stdlib --vocab-size 8192
  data        whether every byte of a shard set is    data verify runs/stdlib/train [--processes 4]
              as it must be, and what is in it        data inspect https://host/sets/train
  train       train a model; on an existing run       train --config configs/quickstart.yaml [--section.key value ...]
              folder it goes on where it stopped      (several ranks: torchrun --nproc-per-node 2 -m pretrain train ...)
  sample      text from a checkpoint, shown live      sample --run runs/quickstart --prompt "def main("
  evaluate    likelihood bounds on held-out text, of  evaluate --run runs/quickstart --shards runs/stdlib/val
              answers to prompts, benchmark tasks     evaluate --run runs/quickstart --harness arc_easy,hellaswag
  plot        loss curves of a run as a PNG           plot --run runs/quickstart
  checkpoint  what a checkpoint holds, and whether    checkpoint inspect runs/quickstart [--norms] [--json FILE]
              every byte of it is as it was written   checkpoint verify runs/quickstart
  track sync  ship metrics MLflow does not have yet   track sync --run runs/quickstart
  doctor      what this machine has and lacks         doctor
  quickstart  prepare, train, sample, plot on real    quickstart
              text, every command shown

Every mistake in a config or an input ends with one line and exit code 2, before any process group or GPU is taken.
"""


def _parser(description: str):
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        exit_on_error=False, description=description, prog=f"python -m pretrain {description.split(':')[0]}"
    )


def _options(cls: type, name: str, arguments: Sequence[str], positional: str = "") -> Any:
    """An options dataclass from a command line; its docstring is the help. `positional`: a list field given without its name."""
    parser = _parser(f"{name}: {(cls.__doc__ or '').splitlines()[0]}")
    if positional:
        parser.add_argument(positional, nargs="*", default=[], help="files and folders to read")
    parser.add_class_arguments(cls, skip={positional} if positional else None)
    for field in dataclasses.fields(cls):
        arguments = _flag(arguments, f"--{field.name}") if field.type in ("bool", bool) else arguments
    return cls(**vars(parser.instantiate(_parse(parser, name, arguments))))


def _flag(arguments: Sequence[str], option: str) -> list[str]:
    """`--quiet` alone means `--quiet true`."""
    found = list(arguments)
    for at, argument in enumerate(arguments):
        if argument == option and (at + 1 == len(arguments) or arguments[at + 1].startswith("--")):
            found[at] = f"{option}=true"
    return found


def _dashes_to_underscores(argument: str) -> str:
    """--val-fraction is accepted for --val_fraction."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _prepare(arguments: Sequence[str]) -> int:
    from data.prepare import prepare
    from data.prepare_options import PrepareOptions

    prepare(_options(PrepareOptions, "prepare", arguments, positional="inputs"))
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
        return data_command.inspect(_located(data_command.InspectOptions, "data inspect", arguments[1:]))
    return data_command.verify(_located(data_command.VerifyOptions, "data verify", arguments[1:]))


def _located(cls: type, name: str, arguments: Sequence[str]) -> Any:
    """An options dataclass whose field `location` is the argument without a name."""
    parser = _parser(f"{name}: {(cls.__doc__ or '').splitlines()[0]}")
    parser.add_argument("location", help="a folder that holds manifest.json, or its address (https://, s3://, gs://)")
    parser.add_class_arguments(cls, skip={"location"})
    return cls(**vars(parser.instantiate(_parse(parser, name, arguments))))


def _train(arguments: Sequence[str]) -> int:
    from pretrain.load_config import config_parser, parse

    config, _ = parse(config_parser("train: trains a model, or goes on training in an existing run folder"), arguments)
    from pretrain.train import train

    return train(config)


def _sample(arguments: Sequence[str]) -> int:
    from pretrain.sample import SampleOptions, sample

    sample(_options(SampleOptions, "sample", arguments))
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    from pretrain.evaluate_command import EvaluateOptions, evaluate

    return evaluate(_options(EvaluateOptions, "evaluate", arguments))


def _plot(arguments: Sequence[str]) -> int:
    parser = _parser("plot: loss curves of a run as a PNG")
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--output", help="file to write instead of loss.png in the run folder")
    values = _parse(parser, "plot", arguments)
    from pretrain.plot import plot

    print(plot(values.run, values.output or ""))
    return 0


def _track(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] != "sync":
        raise InputError("track: the only thing to do is `track sync --run FOLDER`")
    parser = _parser("track sync: ships every metric of a run that MLflow does not have yet")
    parser.add_argument("--run", required=True, help="run folder")
    values = _parse(parser, "track sync", arguments[1:])
    from pretrain.track_sync import sync

    print(sync(values.run))
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
    parser = _parser(descriptions[what])
    parser.add_argument("path", help="a run folder, or one checkpoint: RUN/checkpoints/step-NNNNNNNN")
    parser.add_argument("--json", help="also write the findings to this file")
    if what == "inspect":
        parser.add_argument("--norms", type=bool, default=False, help="also print each tensor's norm; reads all values")
    values = _parse(parser, f"checkpoint {what}", _flag(arguments[1:], "--norms"))
    from pretrain import checkpoint_command

    if what == "inspect":
        return checkpoint_command.inspect(values.path, values.json, values.norms)
    return checkpoint_command.verify(values.path, values.json)


def _doctor(arguments: Sequence[str]) -> int:
    parser = _parser("doctor: what this machine has and lacks")
    parser.add_argument("--json", help="also write the findings to this file")
    values = _parse(parser, "doctor", arguments)
    from pretrain.doctor import doctor

    return doctor(values.json)


def _quickstart(arguments: Sequence[str]) -> int:
    _parse(
        _parser("quickstart: prepare, train on 2 ranks, resume, sample and plot, on the standard library's sources"),
        "quickstart",
        arguments,
    )
    from pretrain.quickstart import quickstart

    return quickstart()


def _parse(parser: Any, name: str, arguments: Sequence[str]) -> Any:
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args([_dashes_to_underscores(a) for a in arguments])
    except ArgumentError as error:
        raise InputError(
            f"{name}: {' '.join(str(error).split())}; `python -m pretrain {name} --help` shows the options"
        ) from None


def _brief(message: str) -> str:
    """jsonargparse's message without its list of all the types it tried."""
    text = " ".join(message.split())
    if found := re.match(r'Parser key "([\w.]+)":? .*Got value: (.*)', text):
        return f"--{found[1]} cannot be {found[2].strip()[:80]}"
    return text[:300]


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "prepare": _prepare,
    "data": _data,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "plot": _plot,
    "checkpoint": _checkpoint,
    "track": _track,
    "doctor": _doctor,
    "quickstart": _quickstart,
}


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; raises InputError for a mistake."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if arguments[0] not in COMMANDS:
        raise InputError(f"unknown command {arguments[0]!r}: the commands are {', '.join(COMMANDS)}")
    return COMMANDS[arguments[0]](arguments[1:])


def _quiet() -> None:
    """Silences what dependencies say about parts that are not used here; everything else is still shown."""
    import logging
    import warnings

    for module in (r"megatron\.", r"torch\.distributed", r"torch\.jit", r"mlflow\."):
        warnings.filterwarnings("ignore", module=module)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)


def execute(arguments: Sequence[str]) -> int:
    """Runs one command; its mistakes become one line, its crashes a traceback. Returns the exit code."""
    try:
        return run(arguments)
    except (InputError, CheckpointError) as error:
        # Before the ranks meet all of them see the same mistake and one line is enough; later it may be one rank's own.
        if os.environ.get("LOCAL_RANK", "0") == "0" or _in_process_group():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; `prepare` and `train` go on from what is complete when started again", file=sys.stderr)
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def main() -> None:
    _quiet()
    _leave(execute(sys.argv[1:]))


def _in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave(code: int) -> None:
    """A process that holds a process group must not run the interpreter's own shutdown: gloo aborts in it."""
    if _in_process_group():
        from parallel.mesh import leave

        leave(code)
    sys.exit(code)
