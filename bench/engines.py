"""Side by side: torch's DistributedDataParallel, DeepSpeed ZeRO-0 to 3 and FSDP2, in every layout, training one model on one batch.

    python bench/engines.py                          # 4 ranks: gloo on a CPU, nccl on GPUs
    python bench/engines.py --only ddp,z3,fsdp2      # some rows
    python bench/engines.py --parts overhead         # one rank: an engine against a plain loop

Three tables: `layouts` (time, memory and what is communicated), `where` (where a step's time goes) and `overhead` (what an engine
costs where there is nobody to talk to). Exit code 1: a row failed, or losses or gradient norms differ between the rows of a table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.comm_counter import KINDS  # noqa: E402
from bench.engines_cases import ON_MANY, ON_ONE_RANK, YARDSTICK, Sizes, why_not  # noqa: E402
from bench.engines_run import Figures, merged, run_in_turns, run_ranks  # noqa: E402
from bench.step_trace import PARTS, supported  # noqa: E402
from bench.tables import Table  # noqa: E402
from bench.timing import summary  # noqa: E402

TABLES = ("layouts", "where", "overhead")
AGREE = 1e-5  # relative, of losses and gradient norms
GOAL = 0.05  # an engine's own overhead
MIB = 1024**2
LAYOUT_COLUMNS = ("step ms", "x ddp", "cpu s", "x ddp cpu", *KINDS[:-1], "peak MiB", "loss")


def last_line(error: Exception) -> str:
    """The line of a failed rank's output that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "Error" in line and not line.startswith(("File", "raise"))]
    return (causes or lines or ["no word"])[0][:300]


def cell(volume: dict[str, int]) -> str:
    size = volume["bytes"] / MIB
    return f"{volume['calls']}: {f'{size:.4g}' if size >= 0.001 else '<0.001'}" if volume["calls"] else "-"


def fill_layouts(table: Table, name: str, figures: Figures) -> None:
    found, base = figures[name], figures.get(YARDSTICK, {})
    cpu = statistics.median(found["cpu_s"])
    cells = {
        "step ms": summary(found["wall_s"]).cell(), "cpu s": cpu,
        **{kind: cell(found["volumes"][kind]) for kind in KINDS[:-1]},
        "peak MiB": found["peak_bytes"], "loss": f"{found['loss']:.7f}",
    }  # fmt: skip
    if base:
        cells["x ddp"] = statistics.median(found["wall_s"]) / statistics.median(base["wall_s"])
        cells["x ddp cpu"] = cpu / statistics.median(base["cpu_s"])
    table.fill(name, cells)


def fill_where(table: Table, name: str, trace: dict[str, Any]) -> None:
    shares = {part: f"{s * 1e3:.0f} ms, {s / trace['seconds']:.1%}" for part, s in trace["parts"].items()}
    top = ", ".join(f"{range_name} {s * 1e3:.0f}" for range_name, s in list(trace["rest"].items())[:4])
    table.fill(name, {"traced step s": trace["seconds"], **shares, "most of the rest, ms": top})


def overheads(engine: dict[str, Any], plain: dict[str, Any], clock: str) -> list[float]:
    """(engine - plain) / plain of every round."""
    return [a / b - 1 for a, b in zip(engine[clock], plain[clock])]


def fill_overhead(table: Table, figures: Figures) -> None:
    clock = "wall_s" if torch.cuda.is_available() else "cpu_s"
    for name, found in figures.items():
        cells = {
            "step ms": summary(found["wall_s"]).cell(), "cpu s": statistics.median(found["cpu_s"]),
            "loss": f"{found['loss']:.7f}",
        }  # fmt: skip
        if not ON_ONE_RANK[0].name == name and ON_ONE_RANK[0].name in figures:
            rounds = overheads(found, figures[ON_ONE_RANK[0].name], clock)
            middle = statistics.median(rounds)
            cells["overhead"] = f"{middle:+.1%} ({min(rounds):+.1%} to {max(rounds):+.1%})"
            cells["met"] = middle < GOAL
            found["overhead"] = middle
        table.fill(name, cells)


def disagreements(figures: Figures) -> list[str]:
    """What differs from the first row by more than rounding; a loss that is no number differs from everything."""
    if not figures:
        return []
    (first, truth), *others = figures.items()
    wrong = [] if math.isfinite(truth["loss"]) else [f"{first}: loss {truth['loss']}"]
    for name, found in others:
        for value in ("loss", "norm"):
            off = abs(found[value] - truth[value]) / abs(truth[value])
            if not off <= AGREE:
                wrong.append(f"{name}: {value} {found[value]!r}, {first} has {truth[value]!r}")
    return wrong


def layout_tables(options: argparse.Namespace) -> tuple[list[Table], Figures]:
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes.__dataclass_fields__})
    chosen = [c for c in ON_MANY if not options.only or c.name in options.only]
    gpu = torch.cuda.is_available()
    shared = f"{sizes.ranks} ranks share {os.cpu_count()} cores: cpu seconds (all ranks) say more than step time."
    layouts = Table.planned(
        "layouts", f"Layouts on {sizes.ranks} ranks: hidden {sizes.hidden}, {sizes.layers} layers, sequence "
        f"{sizes.sequence}, {sizes.global_batch} samples a step, vocabulary {sizes.vocab}, float32",
        LAYOUT_COLUMNS, [c.name for c in chosen],
        "step ms: median (least-most) of the slowest rank." + ("" if gpu else f" {shared}"),
        "collectives: `calls: MiB` of one step on the rank with most, of the full, unsharded buffers; messages where sent",
        f"peak MiB: {'allocated' if gpu else 'resident'} during the steps, above the rank before it had a model",
    )  # fmt: skip
    where = Table.planned(
        "where", "Where a rank's step time goes, mean over ranks", ("traced step s", *PARTS, "most of the rest, ms"),
        [c.name for c in chosen if c.traced],
        "one more step under torch.profiler, wall time of the main thread; bench/step_trace.py says what belongs where",
        "collectives are what the main thread waits for them, for ranks that have no core at the moment as well",
    )  # fmt: skip
    figures: Figures = {}
    for contender in chosen:
        print(f"{contender.name} ...", file=sys.stderr, flush=True)
        if refused := why_not(contender, sizes):
            layouts.refuse(contender.name, f"not run: {refused}")
        else:
            try:
                figures[contender.name] = merged(run_ranks(contender, sizes, options.timeout))
                fill_layouts(layouts, contender.name, figures)
            except AssertionError as error:
                layouts.refuse(contender.name, f"failed: {last_line(error)}")
        if trace := figures.get(contender.name, {}).get("trace"):
            fill_where(where, contender.name, trace)
    where.refuse_rest("not run: only on a CPU" if not supported() else "not run: see the table above")
    return [t for t in (layouts, where) if t.key in options.parts], figures


def overhead_table(options: argparse.Namespace) -> tuple[Table, Figures]:
    sizes = Sizes(
        1, options.overhead_hidden, options.overhead_layers, options.overhead_sequence, options.overhead_micro_batch,
        options.overhead_accumulation, options.vocab, options.steps,
    )  # fmt: skip
    chosen = [c for c in ON_ONE_RANK if not options.only or c.name in options.only or c.plain]
    table = Table.planned(
        "overhead", f"Overhead of an engine on one rank: hidden {sizes.hidden}, {sizes.layers} layers, "
        f"{sizes.accumulation} microbatches of {sizes.micro_batch} x {sizes.sequence} tokens, vocabulary {sizes.vocab}",
        ("step ms", "cpu s", "overhead", "met", "loss"), [c.name for c in chosen],
        f"overhead: (engine - plain) / plain, {'step time' if torch.cuda.is_available() else 'cpu seconds'}, of each round "
        f"in which all took one step in turn: median (least to most); met: below {GOAL:.0%}",
    )  # fmt: skip
    print(f"overhead: {', '.join(c.name for c in chosen)} ...", file=sys.stderr, flush=True)
    figures, failures = run_in_turns(chosen, sizes, options.timeout)
    for name, error in failures.items():
        table.refuse(name, f"failed: {last_line(error)}")
    fill_overhead(table, figures)
    return table, figures


def parse_arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    defaults = {
        "ranks": 4, "hidden": 512, "layers": 8, "sequence": 256, "micro_batch": 2, "accumulation": 4, "vocab": 8192,
        "steps": 7, "overhead_hidden": 1024, "overhead_layers": 2, "overhead_sequence": 256, "overhead_micro_batch": 16,
        "overhead_accumulation": 1, "timeout": 900,
    }  # fmt: skip
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    known = list(dict.fromkeys(c.name for c in (*ON_MANY, *ON_ONE_RANK)))
    parser.add_argument("--only", type=names, help=f"rows, of {', '.join(known)}")
    parser.add_argument("--parts", type=names, default=list(TABLES), help=f"tables, of {', '.join(TABLES)}")
    parser.add_argument("--json", type=Path, help="writes every figure here: seconds, bytes")
    options = parser.parse_args()
    for given, allowed in ((options.only or [], known), (options.parts, TABLES)):
        if unknown := set(given) - set(allowed):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(allowed)}")
    return options


def main() -> int:
    options = parse_arguments()
    tables: list[Table] = []
    found: dict[str, Figures] = {}
    if {"layouts", "where"} & set(options.parts):
        made, found["layouts"] = layout_tables(options)
        tables += made
    if "overhead" in options.parts:
        table, found["overhead"] = overhead_table(options)
        tables.append(table)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    print(f"{where}, torch {torch.__version__}")
    print("\n\n".join(table.markdown() for table in tables))
    wrong = [f"{key}: {line}" for key, figures in found.items() for line in disagreements(figures)]
    failed = [
        f"{table.key}: {label}: {row['status']}"
        for table in tables
        for label, row in table.rows.items()
        if row["status"].startswith("failed")
    ]
    for line in wrong + failed:
        print(f"FAULT {line}")
    for key, figures in found.items():
        if not disagreements(figures):
            print(
                f"{key}: all {len(figures)} rows have the same loss and gradient norm within {AGREE:.0e} of the first"
            )
    if options.json:
        statuses = {table.key: {label: row["status"] for label, row in table.rows.items()} for table in tables}
        sizes = {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(json.dumps({"options": sizes, "figures": found, "rows": statuses}, indent=1))
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
