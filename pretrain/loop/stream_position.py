"""Where a run stands in its sample stream, what the stream follows from, and what becomes of it when that changes.

The state of the stream is one integer. Step s reads samples [sample + (s - step) B, ... + B): `step` and `sample` are 0 unless the
stream was reset, which only `data.reset_stream` allows, or samples were skipped after trouble (trouble.py). Both are kept in the
checkpoint for good.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data.errors import InputError
from pretrain.config import Config, ModelConfig, ObjectiveConfig
from pretrain.load_config import to_dict
from pretrain.objective import BERT_MASK_RATIO

# Changing one of these makes it another model.
MODEL_KEYS = tuple(f"model.{name}" for name in ModelConfig.__dataclass_fields__ if name != "norm_impl")
# What blocks, and their order, follow from.
BLOCK_KEYS = ("run.seed", "data.sequence_length", "data.shuffle_window", "data.shards")
# What else the samples of the stream follow from.
SAMPLE_KEYS = (
    "data.packing",
    "data.pad_policy",
    "data.random_length_prob",
    "data.cfg_dropout",
    "data.cfg_condition",
    *(f"objective.{name}" for name in ObjectiveConfig.__dataclass_fields__),
    "train.global_batch_size",
)


@dataclass(frozen=True)
class StreamPosition:
    """The samples of step `step` begin at `sample`. Every reset so far is in `resets`, every range left out in `skips`:
    {"step": the step that reads the first sample behind it, "samples": [first, last], "reason"}.
    """

    step: int = 0
    sample: int = 0
    resets: tuple[dict[str, Any], ...] = field(default=())
    skips: tuple[dict[str, Any], ...] = field(default=())

    def consumed(self, step: int, global_batch: int) -> int:
        """Global index of the first sample of a step at or after `self.step`."""
        return self.sample + (step - self.step) * global_batch

    def behind(self, reached: int, back_to: int, global_batch: int, reason: str) -> StreamPosition:
        """The stream of a run that has taken `reached` steps, goes back to where it had taken `back_to`, and reads none of the
        samples again that it read since.

        It goes on where the next step would have: at a multiple of the global batch, if it began at one, so that every step
        keeps its whole set of noise levels.
        """
        read = self.consumed(reached, global_batch)
        first = self.consumed(max(back_to, self.step), global_batch)
        record = {"step": back_to, "samples": [first, read - 1], "reason": reason}
        return StreamPosition(back_to, read, self.resets, (*self.skips, record))

    def saved(self) -> dict[str, Any]:
        """For the checkpoint."""
        skips = {"skips": list(self.skips)} if self.skips else {}
        return {"step": self.step, "sample": self.sample, "resets": list(self.resets), **skips}


def go_on(config: Config, data_fingerprint: str, trainer: dict[str, Any], folder: str) -> StreamPosition:
    """Where the run in `folder` goes on, given what its checkpoint says. The same position wherever nothing changed.

    Raises InputError, naming every key, for changes that would make it another model, or another stream without
    data.reset_stream. A reset goes on behind the samples already read if the blocks and their order stay the same, else at 0.
    """
    now, then = _settled(to_dict(config)), _settled(trainer.get("config") or {})
    stored = trainer.get("stream") or {}
    resets, skips = (tuple(stored.get(key, ())) for key in ("resets", "skips"))
    position = StreamPosition(stored.get("step", 0), stored.get("sample", 0), resets, skips)
    changed = {
        key: [_look_up(then, key), _look_up(now, key)]
        for key in (*MODEL_KEYS, *BLOCK_KEYS, *SAMPLE_KEYS)
        if key != "data.shards" and _look_up(now, key) != _look_up(then, key)
    }
    if trainer.get("data_fingerprint") != data_fingerprint:  # the same data may lie elsewhere now
        changed["data.shards"] = [_look_up(then, "data.shards"), _look_up(now, "data.shards")]
    if not changed:
        return position
    named = ", ".join(f"{key} (there {there}, now {here})" for key, (there, here) in changed.items())
    if any(key in MODEL_KEYS for key in changed):
        raise InputError(
            f"run folder {folder} was started with another {named}: resume with the same values, or choose another run.name"
        )
    if not config.data.reset_stream:
        other_data = " (other shards, tokenizer or mixture)" if "data.shards" in changed else ""
        raise InputError(
            f"run folder {folder} was started with another {named}{other_data}: resume with the same values, choose another "
            "run.name, or begin a new stream on purpose with data.reset_stream=true"
        )
    step, batch = trainer["step"], config.train.global_batch_size
    before = position.consumed(step, _look_up(then, "train.global_batch_size"))
    sample = 0 if any(key in BLOCK_KEYS for key in changed) else -(-before // batch) * batch
    record = {"step": step, "sample_before": before, "sample": sample, "changed": changed}
    return StreamPosition(step, sample, (*position.resets, record), position.skips)


def _settled(values: dict[str, Any]) -> dict[str, Any]:
    """A config whose objective says what its defaults mean, so that a run that spelled them out is the same."""
    given = values.get("objective")
    if not isinstance(given, dict):
        return values
    kind = given.get("kind")
    ratio = list(BERT_MASK_RATIO) if kind == "bert" else [0.0, 1.0]
    divisor = "masked" if kind == "bert" else "tokens"
    meant = {"normalizer": given.get("normalizer") or divisor, "mask_ratio": given.get("mask_ratio") or ratio}
    return {**values, "objective": {**given, **meant}}


def _look_up(values: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; where an older config has its section without it, what was meant then: the default."""
    section, _, name = key.partition(".")
    found = values.get(section)
    if not isinstance(found, dict):
        return None
    return found[name] if name in found else to_dict(Config()).get(section, {}).get(name)
