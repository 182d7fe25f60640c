"""`quickstart`: the main job from end to end on real text, by the same commands a person would type."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from pretrain.load_config import load_config
from pretrain.tracking import read_metrics, tracking_uri

CONFIG = "configs/quickstart.yaml"
RANKS = 2
TIMEOUT = 900  # seconds, of any one command


def quickstart() -> int:
    """Runs every stage, shows each command before it runs, and ends with what was done; the first failing command's exit code."""
    config = load_config(["--config", CONFIG])
    run = Path(config.run.dir) / config.run.name
    python = [sys.executable, "-m"]
    prepare = [
        *python,
        "pretrain",
        "prepare",
        "--source",
        "stdlib",
        "--out",
        str(Path(config.data.shards).parent),
        "--vocab-size",
        str(config.model.vocab_size),
        "--val-fraction",
        "0.03",
    ]
    train = [
        *python,
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(RANKS),
        "-m",
        "pretrain",
        "train",
        "--config",
        CONFIG,
    ]
    half = config.train.steps // 2
    stages = [
        ("1/6  real text -> tokenizer and shards", prepare),
        (f"2/6  train on {RANKS} ranks with ZeRO-3, stop half way", [*train, "--train.stop_at", str(half)]),
        ("3/6  the same command goes on where it stopped", train),
        (
            "4/6  text from the model, unmasked step by step",
            [
                *python,
                "pretrain",
                "sample",
                "--run",
                str(run),
                "--prompt",
                "def ",
                "--length",
                "96",
                "--steps",
                "48",
                "--temperature",
                "0.7",
                "--block_length",
                "32",
            ],
        ),
        ("5/6  the loss curves", [*python, "pretrain", "plot", "--run", str(run)]),
        ("6/6  ship what MLflow does not have yet", [*python, "pretrain", "track", "sync", "--run", str(run)]),
    ]
    began = time.monotonic()
    for title, command in stages:
        shown = ["python", *command[1:]]
        print(f"\n== {title}\n$ {shlex.join(shown)}", flush=True)
        code = subprocess.run(command, timeout=TIMEOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        if code:
            print(f"stopped: the command above ended with exit code {code}", file=sys.stderr)
            return code
    _report(run, tracking_uri(config), time.monotonic() - began)
    return 0


def _report(run: Path, uri: str | None, seconds: float) -> None:
    metrics = list(read_metrics(run))
    last = [m for m in metrics if "val/nelbo" in m][-1]
    steps = [m for m in metrics if "train/loss" in m]
    trained = json.loads(
        (run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / "trainer.json").read_text()
    )
    print(
        f"""
== Done in {seconds:.0f} s
A masked-diffusion model was trained on the standard library: {steps[-1]["train/tokens"]:,} tokens in {trained["step"]} steps.
  validation NELBO     {last["val/nelbo"]:.3f} +- {last["val/nelbo_se"]:.3f} nats per token (an upper bound of -log p)
  unigram entropy      {last["val/unigram_entropy"]:.3f} nats per token (the best that is possible without any context)
Where everything lies
  {run}/loss.png        loss curves
  {run}/metrics.jsonl   every metric of every step
  {run}/samples/        samples taken during training
  {run}/checkpoints/    checkpoints; `train` on this folder goes on from the newest
What to type next
  .venv/bin/mlflow server --backend-store-uri {uri} --port 5000      then open http://127.0.0.1:5000
  .venv/bin/python -m pretrain sample --run {run} --prompt "import os" --length 100
  .venv/bin/python -m pretrain sample --run {run} --prompt "for <|mask|> in range(<|mask|>):" --length 0
  .venv/bin/python -m pretrain prepare YOUR_TEXTS/ --out runs/mine      (README: train on your own text)""",
        flush=True,
    )
