"""`quickstart`: the main job from end to end on real text, by the same commands a person would type."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from pretrain.load_config import load_config
from pretrain.tracking.metric_log import read_metrics
from pretrain.tracking.store import tracking_uri

CONFIG = "configs/quickstart.yaml"
RANKS = 2
TIMEOUT = 900  # seconds, of any one command


def quickstart() -> int:
    """Runs every stage, shows each command before it runs, and ends with what was done.

    Returns the exit code of the first command that fails, else 0.
    """
    config = load_config(["--config", CONFIG])
    run = Path(config.run.dir) / config.run.name
    out = Path(str(config.data.shards)).parent
    train = f"torch.distributed.run --standalone --nproc-per-node {RANKS} -m pretrain train --config {CONFIG}"
    stages = [
        (
            "1/6  real text -> tokenizer and shards",
            f"pretrain prepare --source stdlib --out {out} --vocab-size {config.model.vocab_size} --val-fraction 0.03",
        ),
        (
            f"2/6  train on {RANKS} ranks with ZeRO-3, stop half way",
            f"{train} --train.stop_at {config.train.steps // 2}",
        ),
        ("3/6  the same command goes on where it stopped", train),
        (
            "4/6  text from the model, unmasked step by step",
            f"pretrain sample --run {run} --prompt 'def ' --length 96 --steps 96 --temperature 0.9 --remasking random",
        ),
        ("5/6  the loss curves", f"pretrain plot --run {run}"),
        ("6/6  ship what MLflow does not have yet", f"pretrain track sync --run {run}"),
    ]
    began = time.monotonic()
    for title, command in stages:
        print(f"\n== {title}\n$ python -m {command}", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if torch.cuda.device_count() < RANKS:  # one rank a GPU, or none
            environment["CUDA_VISIBLE_DEVICES"] = ""
        code = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)], timeout=TIMEOUT, env=environment
        ).returncode
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
  .venv/bin/python -m pretrain prepare YOUR_TEXTS/ --out data_mine      (README: train on your own text)""",
        flush=True,
    )
