"""The command line: `python -m pretrain COMMAND ...`. Exit codes: 0 done, 2 a mistake in config or input, 75 left
with a checkpoint and asks to be started again, 76 a fault, 77 not to be started again; others are crashes, and 1 also
a fault of storage or network in the middle of a run, which may pass.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from data.errors import InputError
from parallel.errors import CheckpointError
from pretrain.commands import COMMANDS

HELP = """Palimpsest: pretraining of masked-diffusion language models.

usage: python -m pretrain COMMAND [options]        (COMMAND --help shows the options)

  prepare     text -> tokenizer + tar shards          prepare --source stdlib --out runs/stdlib --vocab-size 8192
  data        whether every byte of a shard set is    data verify runs/stdlib/train [--processes 4]
              as it must be, and what is in it        data inspect https://host/sets/train
  train       train a model; on an existing run       train --config configs/quickstart.yaml [--section.key value ...]
              folder it goes on where it stopped      (several ranks: torchrun --nproc-per-node 2 -m pretrain train ...)
  watch       train, looked after: who hangs or is    watch train --config configs/llada_8b.yaml
              gone is named, stacks are written           (srun or torchrun starts one on each rank's place)
  restart     whether a run that ended with a code    restart --run runs/quickstart --code 76
              is to be started again
  plan        parameters, memory, time, cost and     plan --config configs/llada_8b.yaml --nodes 8
              traffic of a run; ranks layouts         plan search --config configs/llada_8b.yaml --gpus 64
  study       a scaling-law study: plan, run, fit,    study plan configs/study_stdlib.yaml
              report                                  study fit losses.csv
  submit      check a run, pack it with its code,     submit --config configs/llada_8b.yaml --nodes 8 [--dry-run]
              hand it to Slurm until it is done
  status      is a run well, how far, how long yet    status runs/quickstart [--watch 10]   status runs
  logs        what all ranks said, in order of time   logs runs/quickstart [--follow] [--grep WARNING]
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
        return 1 if error.passing else 2
    except BrokenPipeError:  # whoever read the output has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
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
        from pretrain.loop.preemption import ASKS_FOR_REQUEUE

        leave(code, together=code in (0, ASKS_FOR_REQUEUE))
    sys.exit(code)
