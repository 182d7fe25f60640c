"""Every GPU figure of this repository in one command and at most 8 minutes, on one bare GPU.

    bash bench/gpu.sh                    # installs carried wheels if there are any, then runs this program
    python bench/gpu.py                  # all parts: a blocks, b loss, d correctness, c whole step
    python bench/gpu.py --only a,b
    python bench/gpu.py --smoke          # every part at tiny shapes on the CPU: shows that it runs, no more

Prints the tables and writes gpu.md, gpu.json and gpu.log to $OUT (bench/out without it). Each task runs in a process of
its own: one that crashes, hangs or lacks a package costs its own rows alone, and they say why. Exit code 0: all rows
have figures or a reason that is no fault ("not run: ..."); 1: a row failed, or a correctness row is not met.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.gpu_cases import FULL, SMOKE, TASKS, Sizes, Task, plan  # noqa: E402
from bench.tables import Table, read_tables, write_tables  # noqa: E402

BUDGET_SECONDS = 480
GRACE = 0.85  # share of a task's time after which it begins no new row; at all of it, it is stopped
LEAST_SECONDS = 15  # a task is not begun with less


def arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="a,b,d,c", help="parts to run, comma separated (order: a, b, d, c)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds that the whole run may take")
    parser.add_argument("--task", help=argparse.SUPPRESS)  # a child process: this task alone, results to --file
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.parts = [part.strip() for part in options.only.split(",")]
    if unknown := set(options.parts) - {task.part for task in TASKS}:
        parser.error(f"--only {options.only}: no part {', '.join(sorted(unknown))}; the parts are a, b, c, d")
    return options


def run_task(
    task: Task, sizes: Sizes, seconds: float, chosen: Optional[int], log: Path
) -> tuple[list[Table], dict[str, Any]]:
    """(tables, environment) of a task run in a child process of at most `seconds`, whatever became of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        command = [sys.executable, __file__, "--task", task.name, "--file", str(file), "--budget", str(seconds * GRACE)]
        command += ["--smoke"] if sizes.device == "cpu" else []
        command += ["--micro-batch", str(chosen)] if chosen else []
        with log.open("a") as output:
            print(f"==== task {task.name}: at most {seconds:.0f} s", file=output, flush=True)
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
            try:
                code = child.wait(seconds)
                why = f"failed: the process ended with code {code}; see {log.name}"
            except subprocess.TimeoutExpired:
                why = f"not run: the task was stopped after its {seconds:.0f} s"
            finally:
                _end(child)
        tables, more = read_tables(file) if file.exists() else (plan(task, sizes), {})
    for table in tables:
        table.refuse_rest(why)
    return tables, more.get("environment", {})


def _end(child: subprocess.Popen) -> None:
    """Ends the task and what it started (compiler workers)."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def child_main(options: argparse.Namespace) -> None:
    """One task, in this process; leaves without the interpreter's shutdown, in which gloo aborts."""
    deadline = time.monotonic() + options.budget
    from bench.gpu_perform import perform
    from bench.gpu_task import Work

    task = next(t for t in TASKS if t.name == options.task)
    sizes = SMOKE if options.smoke else FULL
    code = perform(Work(task, sizes, plan(task, sizes), options.file, deadline, options.micro_batch))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def best_micro_batch(tables: Sequence[Table]) -> Optional[int]:
    """The fastest micro batch of the first search that has any figure: the engine's, else the yardstick's."""
    for table in tables:
        measured = [r for r in table.rows.values() if table.key.endswith(".eager") and r["status"] == "ok"]
        if measured:
            return max(measured, key=lambda r: r["tokens/s"])["micro"]
    return None


def overhead(tables: Sequence[Table]) -> Optional[Table]:
    """What the engines cost over the yardstick at equal micro batch; None if part c was not asked for."""
    steps = [t for t in tables if t.key.startswith("step.")]
    if not steps:
        return None
    step = {(*t.key.split(".")[1:], r["micro"]): r for t in steps for r in t.rows.values() if r["status"] == "ok"}
    pairs = [(e, mode, micro) for e, mode, micro in step if e != "plain" and ("plain", mode, micro) in step]
    labels = [f"{engine}, {mode}, micro batch {micro}" for engine, mode, micro in pairs] or ["any micro batch"]
    columns = ("engine ms", "yardstick ms", "overhead")
    table = Table.planned("overhead", "(c) the engines beside the yardstick", columns, labels)
    for (engine, mode, micro), label in zip(pairs, labels, strict=False):
        ours, plain = step[engine, mode, micro]["step ms"], step["plain", mode, micro]["step ms"]
        table.fill(label, {
            "engine ms": ours, "yardstick ms": plain, "overhead": f"{ours['median_s'] / plain['median_s'] - 1:+.1%}",
        })  # fmt: skip
    table.refuse_rest("not run: needs a step of both at one micro batch")
    return table


def heading(environment: dict[str, Any], options: argparse.Namespace) -> str:
    lines = ["## GPU benchmark" + options.smoke * " (smoke run: tiny shapes, CPU; the figures mean nothing)", ""]
    shown = ["python bench/gpu.py", "--smoke" * options.smoke, f"--only {options.only}" * (options.only != "a,b,d,c")]
    lines.append(f"- command: `{' '.join(word for word in shown if word)}`")
    lines += [f"- {name}: {value}" for name, value in environment.items()]
    lines.append("- times: median (least-most, n) after warm-up, CUDA events on a GPU; every task in its own process")
    return "\n".join(lines)


def publish(out: Path, tables: list[Table], environment: dict[str, Any], options: argparse.Namespace) -> None:
    """Writes what there is so far, after every task: a run cut off from outside leaves its finished tasks."""
    write_tables(out / "gpu.json", tables, environment=environment, command=sys.argv[1:])
    (out / "gpu.md").write_text("\n\n".join([heading(environment, options), *(t.markdown() for t in tables)]) + "\n")


def faults(tables: Sequence[Table]) -> list[str]:
    """Rows that failed, and correctness rows that are not met."""
    return [
        f"{table.key}: {label}: {row['status'] if row['status'] != 'ok' else 'not met'}"
        for table in tables for label, row in table.rows.items()
        if row["status"].startswith("failed") or row.get("met") is False
    ]  # fmt: skip


def main() -> int:
    options = arguments()
    if options.task:
        child_main(options)
    sizes = SMOKE if options.smoke else FULL
    if not options.smoke:
        try:
            import torch
        except ModuleNotFoundError:
            print("error: this Python has no PyTorch: install it, or name another one by PYTHON=", file=sys.stderr)
            return 2
        if not torch.cuda.is_available():
            print("error: no CUDA device here; `python bench/gpu.py --smoke` needs none", file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running task is ended too
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "out")
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    deadline = time.monotonic() + options.budget
    tasks = [task for task in TASKS if task.part in options.parts]
    print(f"{len(tasks)} tasks, at most {options.budget:.0f} s; log: {log}", flush=True)
    tables: list[Table] = []
    environment: dict[str, Any] = {}
    for i, task in enumerate(tasks):
        left = deadline - time.monotonic()
        seconds = left * task.share / sum(t.share for t in tasks[i:])
        began = time.monotonic()
        if seconds < LEAST_SECONDS:
            new, seen = plan(task, sizes), {}
            for table in new:
                table.refuse_rest("not run: time budget used up")
        else:
            new, seen = run_task(task, sizes, seconds, best_micro_batch(tables), log)
        environment = environment or seen
        tables += new
        print(f"\n[task {task.name}: {time.monotonic() - began:.0f} s of {seconds:.0f} s]\n", flush=True)
        print("\n\n".join(table.markdown() for table in new), flush=True)
        publish(out, tables, environment, options)
    if (extra := overhead(tables)) is not None:
        tables.append(extra)
        print("\n" + extra.markdown())
    print("\n" + heading(environment, options))
    publish(out, tables, environment, options)
    wrong = faults(tables)
    for line in wrong:
        print(f"FAULT {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
