"""`submit`: a training run as a Slurm job that is started again until it is done. All is checked before it waits in a queue."""

from __future__ import annotations

import getpass
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import InputError
from pretrain.addresses import plain_address
from pretrain.config import Config
from pretrain.load_config import config_parser, parse
from pretrain.submission.ask import ask
from pretrain.submission.checks import case_of, check_data, check_layout, check_memory, check_run, check_time
from pretrain.submission.package import ROOT, SCRIPT, forget, package

ENVIRONMENT = ROOT / "slurm" / "h800.env"


@dataclass
class SubmitOptions:
    """What the job asks of Slurm.

    Args:
        nodes: of the job.
        gpus_per_node: GPUs, and ranks, on each.
        time: limit of one start, as sbatch takes it; the run goes on in the next start.
        partition: to submit to; none: the cluster's default.
        account: to charge; none: the user's default.
        signal_seconds: before the limit at which the ranks are asked to save and leave; longer than a checkpoint takes.
        cpus_per_task: of each rank; 0: two, and one for each of data.workers.
        gpu_memory: GiB of one GPU that the estimate must fit into; 0: no check.
        environment: shell file that the job sources (NCCL's settings); `none` for none.
        sbatch_args: more options for sbatch, each as --name=value, in one string.
        chain: submit even if a job of this run waits or runs; this one then starts behind it.
        cpu: ask for no GPUs (ranks train on CPUs).
        dry_run: check and show everything, write and submit nothing.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    signal_seconds: int = 180
    cpus_per_task: int = 0
    gpu_memory: float = 80.0
    environment: str = str(ENVIRONMENT)
    sbatch_args: str = ""
    chain: bool = False
    cpu: bool = False
    dry_run: bool = False


def submit(arguments: Sequence[str]) -> int:
    """Checks, packs and submits one run; prints the script, the command and the job's number. Returns 0.

    arguments: `--config FILE`, overrides as `train` takes them, and SubmitOptions with dashes or underscores. Raises InputError
    with one line, and nothing written, for every mistake, Slurm's own refusals included.
    """
    config, options = _parse(arguments)
    folder = (Path(config.run.dir) / config.run.name).absolute()
    check_run(config)
    _check_options(options)
    check_time(options.time, options.signal_seconds)
    world = options.nodes * options.gpus_per_node
    case = case_of(config, world)
    check_layout(case)
    memory = check_memory(case, options.gpu_memory) if options.gpu_memory and not options.cpu else None
    said = [f"run: {folder}, {world} ranks on {options.nodes} node{'s' * (options.nodes > 1)}"]
    said += [f"memory: about {memory.sentence()} of {options.gpu_memory:g} GiB a GPU"] if memory else []
    said += [f"note: {line}" for line in check_data(config)]
    script = (ROOT / SCRIPT).read_text()
    if options.dry_run:
        named = _command(config, options, folder, folder / "submitted" / "TIME-HASH", [])
        print(script.rstrip(), "", *said, f"would run: {shlex.join(named)}", "dry run: nothing written", sep="\n")
        return 0
    earlier = jobs_of(folder, config.run.name)
    if earlier and not options.chain:
        raise InputError(
            f"{folder} has a job already: {', '.join(f'{job} ({state.lower()})' for job, state in earlier)}; cancel it (scancel "
            f"{earlier[0][0]}), or submit one that starts behind it with --chain"
        )
    about = {
        "arguments": [plain_address(argument) for argument in arguments],
        "user": getpass.getuser(),
        "folder": os.getcwd(),
        "python": sys.executable,
    }
    packed = package(config, folder, options.environment if options.environment != "none" else "", about)
    try:
        (folder / "logs").mkdir(exist_ok=True)
        command = _command(config, options, folder, packed, [job for job, _ in earlier])
        job = ask(command).split(";")[0]
    except InputError:
        forget(packed)
        raise
    (packed / "job").write_text(job + "\n")
    print(script.rstrip(), "", *said, f"submitted: {packed}", f"command: {shlex.join(command)}", sep="\n")
    print(f"job {job}; its output: {folder}/logs/slurm-{job}.out; to end it: scancel {job}")
    return 0


def _parse(arguments: Sequence[str]) -> tuple[Config, SubmitOptions]:
    parser = config_parser("submit: submits a run to Slurm and starts it again until it is done")
    parser.add_class_arguments(SubmitOptions)
    flags = {f"--{name}" for name, field in SubmitOptions.__dataclass_fields__.items() if field.type == "bool"}
    plain = []
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = f"--{name[2:].replace('-', '_')}"
        following = arguments[at + 1] if at + 1 < len(arguments) else "--"
        alone = name in flags and not equals and following.startswith("--")
        plain.append(f"{name}=true" if alone else f"{name}{equals}{value}")
    config, others = parse(parser, plain)
    return config, SubmitOptions(**others)


def _check_options(options: SubmitOptions) -> None:
    for name, least in (("nodes", 1), ("gpus_per_node", 1), ("cpus_per_task", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}, it must be at least {least}")
    for name in ("partition", "account"):
        value = getattr(options, name)
        if value and not value.replace(",", "").replace("-", "").replace(".", "").isidentifier():
            raise InputError(f"--{name} is {value!r}: letters, digits and _ - . are allowed")
    if options.environment != "none" and not Path(options.environment).is_file():
        raise InputError(f"--environment: no file {options.environment}; `none` for no settings")
    for word in _more(options):
        if not word.startswith("-"):  # sbatch would take it for the script
            raise InputError(f"--sbatch-args: {word!r} is no option; write each as --name=value")


def _more(options: SubmitOptions) -> list[str]:
    try:
        return shlex.split(options.sbatch_args)
    except ValueError as error:
        raise InputError(f"--sbatch-args: {options.sbatch_args!r} cannot be read ({error})") from None


def _command(config: Config, options: SubmitOptions, folder: Path, packed: Path, behind: Sequence[str]) -> list[str]:
    """sbatch with everything that it needs: arguments of a process, which no shell ever reads."""
    cpus = options.cpus_per_task or 2 + config.data.workers
    logs = str(folder / "logs").replace("%", "%%")  # sbatch replaces %x in file names
    return [
        *("sbatch", "--parsable", f"--job-name={config.run.name}", f"--comment={_comment(folder)}"),
        *(f"--nodes={options.nodes}", f"--ntasks-per-node={options.gpus_per_node}", f"--cpus-per-task={cpus}"),
        f"--gpus-per-node={0 if options.cpu else options.gpus_per_node}",  # always: the script names a number of its own
        *(f"--time={options.time}", f"--signal=B:USR1@{options.signal_seconds}", "--requeue", "--open-mode=append"),
        f"--output={logs}/slurm-%j.out",
        *([f"--partition={options.partition}"] if options.partition else []),
        *([f"--account={options.account}"] if options.account else []),
        *([f"--dependency=afterany:{':'.join(behind)}"] if behind else []),
        *_more(options),
        *(str(packed / "job.sbatch"), str(packed), sys.executable, config.health.preempt_signal),
    ]


def _comment(folder: Path) -> str:
    return f"palimpsest:{folder}"


def jobs_of(folder: Path, name: str) -> list[tuple[str, str]]:
    """(job, state) of every job of this run that waits or runs, whoever submitted it."""
    lines = ask(["squeue", "--noheader", f"--name={name}", "--format=%i|%T|%k"]).splitlines()
    found = [line.split("|", 2) for line in lines if line.count("|") >= 2]
    return [(job, state) for job, state, comment in found if comment == _comment(folder)]
