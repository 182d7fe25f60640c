"""`plan` and `plan search`: what a run will take, before any GPU is asked for."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional

from data.errors import InputError
from pretrain.arguments import parser_of
from pretrain.config import Config
from pretrain.json_file import write_json
from pretrain.load_config import config_parser, parse
from pretrain.planning.cluster import read_cluster
from pretrain.planning.display import plan_lines, search_lines
from pretrain.planning.plan import Question, plan_of, verdict_of_layout
from pretrain.planning.search import search
from pretrain.terminal import coloured

HELP = """plan: parameters, memory, FLOPs, communication, time and cost of a run; needs no GPU and starts nothing

  plan --config configs/llada_8b.yaml --nodes 8 --tokens 2.3e12 --price 2
  plan search --config configs/llada_8b.yaml --gpus 64        the fastest layouts that fit, as overrides to paste

A run that does not fit is an answer (exit code 0, the first line says so, and what would fit); a layout that is not legal is a
mistake (exit code 2, with the nearest that is)."""


@dataclass
class PlanOptions:
    """Where the run would go, and how long.

    Args:
        nodes: of the cluster, each with --gpus-per-node GPUs.
        gpus_per_node: 0: as many as the cluster's nodes have.
        gpus: all GPUs together, instead of --nodes.
        cluster: a YAML file, or the name of one in configs/clusters (h800, h100, h200, a100).
        mfu: share of the GPUs' peak that compute reaches, recomputation being compute too.
        tokens: that the run trains on; by default train.steps x batch x length.
        price: of a GPU-hour; by default the cluster's.
        json: also write everything to this file.
    """

    nodes: int = 0
    gpus_per_node: int = 0
    gpus: int = 0
    cluster: str = "h800"
    mfu: float = 0.4
    tokens: Optional[float] = None
    price: Optional[float] = None
    json: Optional[str] = None


def plan(arguments: Sequence[str]) -> int:
    """Prints the plan of a config, or with `search` in front the ranking of layouts. Returns 0.

    arguments: `--config FILE`, overrides as `train` takes them, and PlanOptions with dashes or underscores. Raises InputError
    with one line for every mistake.
    """
    if {"-h", "--help"} & set(arguments):
        print(f"{HELP}\n\n{_options_help()}")
        return 0
    searching = bool(arguments) and arguments[0] == "search"
    config, options = _parse(arguments[1:] if searching else arguments)
    question = _question(options)
    if options.json and not searching and not (verdict := verdict_of_layout(config, question))["legal"]:
        write_json(options.json, {"config": config.run.name, "legal": verdict})  # for scripts: the nearest that is
    found = search(config, question) if searching else plan_of(config, question)
    if options.json:
        write_json(options.json, found)
    lines = search_lines if searching else plan_lines
    print("\n".join(lines(found, coloured(sys.stdout))))
    return 0


def _options_help() -> str:
    """PlanOptions alone; the config's keys are those of `train --help`."""
    parser = parser_of("plan: --config FILE, every --section.key of `train --help`, and")
    parser.add_class_arguments(PlanOptions)
    return parser.format_help()


def _parse(arguments: Sequence[str]) -> tuple[Config, PlanOptions]:
    parser = config_parser(HELP)
    parser.add_class_arguments(PlanOptions)
    plain: list[str] = []
    for argument in arguments:
        if not argument.startswith("-") and not (plain and plain[-1].startswith("--") and "=" not in plain[-1]):
            raise InputError(
                f"plan: {argument!r} is no option; say `plan --config FILE` or `plan search --config FILE`"
            )
        name, equals, value = argument.partition("=")
        name = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
        plain.append(f"{name}{equals}{value}")
    config, others = parse(parser, plain)
    return config, PlanOptions(**others)


def _question(options: PlanOptions) -> Question:
    for name in ("nodes", "gpus_per_node", "gpus"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}, it must be at least 1")
    if options.gpus and options.nodes:
        raise InputError(f"--gpus {options.gpus} and --nodes {options.nodes}: give one of them")
    if not 0 < options.mfu <= 1:
        raise InputError(f"--mfu is {options.mfu:g}, it must be in (0, 1]: 0.4 is 40% of the GPUs' peak")
    if options.tokens is not None and not (options.tokens > 0 and math.isfinite(options.tokens)):
        raise InputError(f"--tokens is {options.tokens:g}, it must be a positive number, such as 2.3e12")
    if options.price is not None and not (options.price >= 0 and math.isfinite(options.price)):
        raise InputError(f"--price is {options.price:g}, it must be 0 or more, of a GPU-hour")
    cluster = read_cluster(options.cluster)
    if options.gpus_per_node > cluster.gpus_per_node:
        raise InputError(
            f"--gpus-per-node is {options.gpus_per_node}, a node of {options.cluster} has {cluster.gpus_per_node}"
        )
    if options.gpus and options.gpus_per_node:
        raise InputError("--gpus-per-node goes with --nodes; --gpus fills whole nodes")
    world = options.gpus or (options.nodes or 1) * (options.gpus_per_node or cluster.gpus_per_node)
    used = replace(cluster, gpus_per_node=options.gpus_per_node or cluster.gpus_per_node)
    return Question(used, world, options.mfu, options.tokens, options.price)
