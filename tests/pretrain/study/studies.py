"""Studies small enough for tests, written as a person would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

BASE = {
    "run": {"seed": 3},
    "model": {"vocab_size": 512, "rope_theta": 1000.0, "init_std": 0.08},
    "data": {"sequence_length": 32, "workers": 0, "random_length_prob": 0.0},
    "train": {
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "val_samples": 24,
        "checkpoint_every": 1000,
        "log_every": 10,
    },
    "optimizer": {"lr": 4.0e-3, "min_lr": 4.0e-4, "schedule": "wsd"},
    "parallel": {"engine": "fsdp2"},
    "tracking": {"uri": "none", "system_every": 0.0},
    "health": {"stall_seconds": 60},
}
SIZES = {
    "s": {"num_layers": 1, "num_heads": 2, "hidden_size": 32, "ffn_hidden_size": 88, "num_kv_heads": 2},
    "m": {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "ffn_hidden_size": 88, "num_kv_heads": 1},
    "l": {"num_layers": 2, "num_heads": 4, "hidden_size": 64, "ffn_hidden_size": 176, "num_kv_heads": 4},
}


def write_study(folder: Path, corpus: Path, config: dict[str, dict[str, Any]] | None = None, **study: Any) -> Path:
    """A study over `corpus` in `folder`: its YAML. config: sections and keys that differ from BASE; study: keys of `study`."""
    data = {"shards": str(corpus / "train"), "val_shards": str(corpus / "val")}
    values = {name: BASE.get(name, {}) | (config or {}).get(name, {}) for name in {**BASE, **(config or {})}}
    values["data"] = data | values["data"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    keys = {
        "name": "study",
        "dir": str(folder),
        "base": str(folder / "base.yaml"),
        "family": SIZES,
        "budgets": [2e9, 4e9, 8e9],
        "objectives": ["masked", "autoregressive"],
        "min_steps": 1,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"study": keys | study}, sort_keys=False))
    return path
