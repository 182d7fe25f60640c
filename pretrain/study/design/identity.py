"""What makes a cell the cell that it is: its definition, and the name that follows from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Optional

from pretrain.config import Config

# What says nothing about the result of a cell: where it lies, what is watched and written, how it is spread over ranks.
_NOT_THE_RESULT = {
    *(
        "train.micro_batch_size",
        "train.checkpoint_every",
        "train.async_checkpoint",
        "train.keep_checkpoints",
        "train.compile",
    ),
    *("train.validate_every", "train.sample_every", "train.log_every", "train.stop_at", "train.max_skipped"),
    *("data.shards", "data.val_shards", "data.workers", "data.verify", "data.max_bad_shards", "data.reset_stream"),
    *("data.cache_dir", "data.cache_gib", "optimizer.impl", "model.norm_impl"),
}
_SECTIONS = ("model", "data", "objective", "train", "optimizer")


def plain(config: Config) -> dict[str, Any]:
    """Sections and keys as JSON has them."""
    return json.loads(json.dumps(asdict(config)))


def definition(config: Config) -> dict[str, Any]:
    """What of a config the result depends on: dotted keys whose values are not the defaults, and the seed."""
    defaults, values = plain(Config()), plain(config)
    found: dict[str, Any] = {
        f"{section}.{key}": value
        for section in _SECTIONS
        for key, value in values[section].items()
        if value != defaults[section][key] and f"{section}.{key}" not in _NOT_THE_RESULT
    }
    return found | {"run.seed": config.run.seed}


def cell_id(
    kind: str,
    size: str,
    config: Config,
    data: str,
    *,
    budget: Optional[float],
    tokens: float,
    unique: Optional[int],
    repeat: int,
) -> str:
    """Readable, and a hash of what defines the result: the same cell has the same id whatever other cells the study has.

    data: fingerprint of training and validation sets. unique: tokens of the part that is read, None: all of it.
    """
    defined = {"config": definition(config), "data": data, "unique": unique, "budget": budget}
    digest = hashlib.sha256(json.dumps(defined, sort_keys=True).encode()).hexdigest()[:8]
    amount = f"c{budget:.4g}".replace("e+0", "e").replace("+", "") if budget else f"d{_short(tokens)}"
    words = [{"autoregressive": "ar"}.get(kind, kind), size, amount]
    words += [f"u{_short(unique)}"] if unique else []
    words += [f"r{repeat}"] if repeat else []
    return "-".join([*words, digest])


def _short(amount: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if amount >= unit:
            return f"{amount / unit:.3g}{letter}"
    return f"{amount:.0f}"


def differences(before: dict[str, Any], now: dict[str, Any]) -> Sequence[str]:
    """ "optimizer.lr 0.001 -> 0.002", ... of two definitions."""
    return [
        f"{key} {before.get(key, 'default')} -> {now.get(key, 'default')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
