"""Every objective on the same text, model and compute: validation curves as a figure, and a table.

    python bench/objectives.py --data runs/stdlib --out runs/objectives [--figure docs/objectives.png] [--only "masked;bert"]

Trains configs/quickstart.yaml once for each objective (one process each, `--jobs` at a time), with as many steps as give all
of them the FLOPs of `masked`; a run that is there is not trained again. The curves are val/nelbo, two standard errors, over FLOPs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pretrain.flops import flops_per_token  # noqa: E402
from pretrain.load_config import load_config  # noqa: E402
from pretrain.model import model_shape  # noqa: E402
from pretrain.objective import row_length  # noqa: E402
from pretrain.tracking.store import read_metrics  # noqa: E402

CONFIG = str(ROOT / "configs" / "quickstart.yaml")
RUNS: dict[str, list[str]] = {
    "masked": [],
    "block of 16": ["--objective.kind", "block", "--objective.block_size", "16"],
    "block of 4": ["--objective.kind", "block", "--objective.block_size", "4"],
    "bert": ["--objective.kind", "bert"],
    "uniform": ["--objective.kind", "uniform"],
    "flow": ["--objective.kind", "flow", "--objective.temperature_steps", "1600"],
    "flow, rows alike": [
        "--objective.kind",
        "flow",
        "--objective.temperature_steps",
        "1600",
        "--objective.weighting",
        "false",
    ],
    "autoregressive": ["--objective.kind", "autoregressive"],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="runs/stdlib", help="what `make quickstart` prepared")
    parser.add_argument("--out", default="runs/objectives", help="folder of the runs")
    parser.add_argument("--figure", default="", help="file of the figure; default: OUT/objectives.png")
    parser.add_argument("--only", default="", help="names of some runs, with semicolons")
    parser.add_argument("--steps", type=int, default=1600, help="steps of masked")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    return parser.parse_args()


def folder_of(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def step_flops(name: str) -> float:
    """FLOPs of one optimizer step. The head counts for all columns of a row and attention for all pairs of them."""
    config = load_config(["--config", CONFIG, *RUNS[name]])
    columns = row_length(config)
    return config.train.global_batch_size * columns * flops_per_token(model_shape(config.model), columns)


def steps_of(name: str, args: argparse.Namespace) -> int:
    """As many as cost what masked's `--steps` do."""
    return round(args.steps * step_flops("masked") / step_flops(name))


def options(name: str, args: argparse.Namespace) -> list[str]:
    """The command line of one run, behind `train`."""
    steps, data = steps_of(name, args), Path(args.data)
    return [
        *("--config", CONFIG, "--run.dir", args.out, "--run.name", folder_of(name)),
        *("--data.shards", str(data / "train"), "--data.val_shards", str(data / "val"), "--data.workers", "0"),
        *("--train.steps", str(steps), "--train.validate_every", str(max(steps // 8, 1)), "--train.val_samples", "512"),
        *("--train.sample_every", "0", "--train.checkpoint_every", "0", "--train.log_every", "100"),
        *(
            "--optimizer.warmup_steps",
            str(max(steps * 60 // 1600, 1)),
            "--optimizer.decay_steps",
            str(int(0.35 * steps)),
        ),
        *("--tracking.uri", "none", *RUNS[name]),
    ]


def train(name: str, args: argparse.Namespace) -> None:
    log = Path(args.out) / f"{folder_of(name)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        command = [sys.executable, "-m", "pretrain", "train", *options(name, args)]
        subprocess.run(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, check=True, timeout=7200
        )
    print(f"trained {name}", flush=True)


def curve(name: str, args: argparse.Namespace) -> list[tuple[float, float, float, float]]:
    """(training FLOPs, nats per token, standard error, unigram entropy) at each validation."""
    cost = step_flops(name)
    return [
        (m["step"] * cost, m["val/nelbo"], float(m["val/nelbo_se"]), m["val/unigram_entropy"])
        for m in read_metrics(Path(args.out) / folder_of(name))
        if "val/nelbo" in m
    ]


def draw(curves: dict[str, list], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    for name, points in curves.items():
        flops, nats, error, _ = zip(*points)
        axes.errorbar(flops, nats, [2 * e for e in error], marker="o", markersize=3, capsize=2, label=name)
    entropy = next(iter(curves.values()))[0][3]
    axes.axhline(entropy, color="black", linestyle=":", label="unigram entropy")
    axes.set(
        xlabel="training FLOPs",
        ylabel="validation, nats per token (+- 2 SE)",
        title="objectives at equal compute; autoregressive is exact, the others are upper bounds",
    )
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    args = arguments()
    names = [name for name in RUNS if not args.only or name in args.only.split(";")]
    missing = [n for n in names if not (Path(args.out) / folder_of(n) / "checkpoints" / "latest").exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda name: train(name, args), missing))
    curves = {name: curve(name, args) for name in names}
    path = Path(args.figure or Path(args.out) / "objectives.png")
    draw(curves, path)
    print(
        "| objective | steps | training FLOPs | nats per token | standard error |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for name, points in curves.items():
        flops, nats, error, _ = points[-1]
        print(f"| {name} | {steps_of(name, args)} | {flops:.2e} | {nats:.3f} | {error:.3f} |")
    print(f"unigram entropy {curves[names[0]][0][3]:.3f}; figure: {path}")


if __name__ == "__main__":
    main()
