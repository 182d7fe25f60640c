"""What `evaluate` reads, made without training: run folders with random weights, for any objective, and benchmark tasks."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import torch

from data.shard_set import ShardSet
from parallel import checkpoint
from parallel.boxes import Boxes
from parallel.shape import parameter_table
from pretrain.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from pretrain.load_config import to_dict
from pretrain.model import model_shape

MODEL = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, ffn_hidden_size=32, vocab_size=520)


def make_run(
    folder: Path,
    corpus: Path,
    sequence_length: int,
    scale: float = 0.3,
    data: Any = None,
    nan_token: Optional[int] = None,
    **objective: Any,
) -> Path:
    """`folder`, a run whose model has weights of standard deviation `scale`; its vocabulary is larger than the tokenizer's.

    nan_token: an id whose embedding is no number, so that nothing is where it is read.
    """
    shards = ShardSet.open(corpus / "train", "size")
    config = Config(
        model=MODEL,
        data=DataConfig(shards=str(corpus / "train"), sequence_length=sequence_length, **(data or {})),
        objective=ObjectiveConfig(**objective),
    )
    draw = torch.Generator().manual_seed(7)
    state = {}
    for name, spec in parameter_table(model_shape(MODEL)).items():
        noise = scale * torch.randn(spec.shape, generator=draw)
        state[f"weight/{name}"] = 1 + noise if len(spec.shape) == 1 else noise
    if nan_token is not None:
        (embedding,) = (name for name in state if "embed" in name)
        state[embedding][nan_token] = torch.nan
    trainer = {
        "applied_steps": 40,
        "config": to_dict(config),
        "special": asdict(shards.special),
        "tokenizer_sha256": shards.manifest.tokenizer_sha256,
    }
    folder.mkdir(parents=True)
    shutil.copyfile(shards.tokenizer_path, folder / "tokenizer.json")
    boxes = {name: Boxes(t.shape, [((0,) * t.dim(), t)]) for name, t in state.items()}
    checkpoint.save(folder / "checkpoints", 40, boxes, trainer)
    return folder


CHOICES = [" return self", " import os", "zq"]
QUESTIONS = [("def f(self):\n   ", 0), ("import sys\n", 1), ("x =", 2), ("", 1)]
TEXTS = ["def f(x):\n    return x + 1\n" * 6, "import os\n", ""]
STARTS = ["def f(", "import ", "", "a long one " * 9]

TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "local_choice": (
        [{"question": q, "choices": CHOICES, "gold": gold} for q, gold in QUESTIONS],
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
    ),
    "local_rolling": (
        [{"text": text} for text in TEXTS],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ),
    "local_generate": (
        [{"question": text, "answer": ""} for text in STARTS],
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}


def write_tasks(folder: Path) -> Path:
    """The tasks with their data, as the harness reads them with --include_path."""
    for name, (rows, task) in TASKS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    return folder
