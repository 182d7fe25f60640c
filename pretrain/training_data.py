"""The data of a run: one shard set or a mixture of several, opened, checked against each other, and made a block stream."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, fields
from typing import Any, Literal, Optional

from data.errors import InputError
from data.loader import StageOptions
from data.mixture import Ingredient, Mixture
from data.shard_set import ShardSet
from data.stream import BlockStream
from pretrain.addresses import plain_address
from pretrain.config import Config, SourceConfig
from pretrain.objective import flow_options, masking_options

Verify = Literal["auto", "full", "size"]
Shard = tuple[int, int]  # number of the source, number of the shard in its set


@dataclass(frozen=True)
class TrainingData:
    """The training sets by source, in the order of data.shards."""

    names: tuple[str, ...]
    sets: tuple[ShardSet, ...]
    weights: tuple[float, ...]
    epochs: tuple[Optional[float], ...]

    @property
    def first(self) -> ShardSet:
        """Any of the sets: they share tokenizer, special ids and vocabulary."""
        return self.sets[0]

    def bad(self) -> dict[Shard, str]:
        """The shards that were found bad at opening, and why."""
        return {(source, shard): why for source, one in enumerate(self.sets) for shard, why in one.bad.items()}

    def file_of(self, shard: Shard) -> str:
        """How a shard is spoken of."""
        source, number = shard
        return f"{self.sets[source].shards[number].file} of {self.sets[source].location}"

    def fingerprint(self) -> str:
        """Identifies the data and how it is mixed: hashes of shards and tokenizers, names, weights and caps."""
        if len(self.sets) == 1 and self.epochs == (None,):
            return fingerprint(self.first)
        parts = [self.names, self.weights, self.epochs, [fingerprint(one) for one in self.sets]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def blocks(self, config: Config) -> BlockStream | Mixture:
        """The run's global block stream."""
        data, seed = config.data, config.run.seed
        isolate = data.packing == "isolate"

        def stream(one: ShardSet, key: int | str) -> BlockStream:
            return BlockStream(one, data.sequence_length, key, window=data.shuffle_window, borders=isolate)

        if len(self.sets) == 1 and self.epochs == (None,):
            return stream(self.first, seed)
        ingredients = [
            Ingredient(name, stream(one, f"{seed}/{name}"), weight, cap)
            for name, one, weight, cap in zip(self.names, self.sets, self.weights, self.epochs, strict=True)
        ]
        return Mixture(ingredients, seed)


def open_training_data(config: Config, verify: Verify) -> TrainingData:
    """Opens and checks data.shards. Raises InputError with the key and the source that is wrong."""
    given = config.data.shards
    sources = _sources(given)
    key = "data.shards" if isinstance(given, str) else "data.shards[{}]"
    sets = tuple(
        open_set(key.format(number), source.path, verify, config, config.data.max_bad_shards)
        for number, source in enumerate(sources)
    )
    names = tuple(source.name or name_of(source.path) for source in sources)
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"data.shards: two sources are called {name!r}: give them a `name` each")
    weights = tuple(source.weight for source in sources)
    if None in weights and any(weight is not None for weight in weights):
        raise InputError(
            "data.shards: some sources have a weight and some have none: give one to all of them, or to none (then each "
            "counts by its tokens)"
        )
    shares = tuple(float(one.tokens) if weight is None else float(weight) for one, weight in zip(sets, weights))
    for number, one in enumerate(sets):
        if one.manifest.tokenizer_sha256 != sets[0].manifest.tokenizer_sha256:
            raise InputError(
                f"data.shards[{number}] ({one.location}) was made with another tokenizer than data.shards[0] "
                f"({sets[0].location}): prepare them with the same one (--tokenizer)"
            )
    found = TrainingData(names, sets, shares, tuple(source.epochs for source in sources))
    if len(found.bad()) > config.data.max_bad_shards:
        named = ", ".join(found.file_of(shard) for shard in list(found.bad())[:5])
        raise InputError(f"data.shards: {len(found.bad())} bad shards ({named}), data.max_bad_shards allows fewer")
    _check_blocks(config, found)
    return found


def open_set(key: str, location: str, verify: Verify, config: Config, tolerate: int = 0) -> ShardSet:
    """One shard set, and whether this model and this sequence length can use it. InputError names `key`."""
    if not location:
        raise InputError(f"{key} is empty: name a folder made by `python -m pretrain prepare`")
    data, cache = config.data, None
    if "://" in location:
        from data.remote_options import CacheOptions

        cache = CacheOptions(data.cache_dir, int(data.cache_gib * 2**30))
    try:
        found = ShardSet.open(location, verify, tolerate=tolerate, cache=cache)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    if found.vocab_size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the {found.vocab_size} ids of {key} "
            f"({found.location}): set model.vocab_size to {found.vocab_size} or more"
        )
    if found.row_tokens and found.row_tokens != data.sequence_length:
        raise InputError(
            f"{key} ({found.location}) holds rows of {found.row_tokens} tokens, data.sequence_length is "
            f"{data.sequence_length}: make them equal, or prepare the set with --row_tokens {data.sequence_length}"
        )
    return found


def stage_options(config: Config, start: tuple[int, int] = (0, 0)) -> StageOptions:
    """The stages of the training stream. start: (step, sample) at which it begins."""
    data, objective = config.data, config.objective
    return StageOptions(
        masking_options(config),
        random_length_prob=data.random_length_prob,
        cfg_dropout=data.cfg_dropout,
        cfg_condition=data.cfg_condition,
        isolate=data.packing == "isolate",
        eos_in_loss=data.pad_policy == "eos_in_loss",
        skip_bad_shards=data.max_bad_shards > 0,
        kind=objective.kind,
        shift=objective.shift,
        vocab_size=config.model.vocab_size,
        flow=flow_options(config, start),
    )


def fingerprint(shards: ShardSet) -> str:
    """Identifies a shard set by the hashes of its shards and tokenizer."""
    text = "\n".join([shards.manifest.tokenizer_sha256, *(entry.sha256 for entry in shards.shards)])
    return hashlib.sha256(text.encode()).hexdigest()


def _sources(given: str | list[dict[str, Any]]) -> list[SourceConfig]:
    """The entries of data.shards, checked by hand: what reads the config must not build classes that it names."""
    if isinstance(given, str):
        if given.lstrip().startswith(("[", "{")):
            raise InputError(f"data.shards: {given[:80]!r} is no list of sources; {_ENTRY}")
        return [SourceConfig(path=given)]
    if not given:
        raise InputError("data.shards is empty: name a folder made by `python -m pretrain prepare`")
    found = []
    for number, entry in enumerate(given):
        where = f"data.shards[{number}]"
        if unknown := sorted(entry.keys() - {f.name for f in fields(SourceConfig)}):
            raise InputError(f"{where}: unknown key {unknown[0]}; {_ENTRY}")
        if not isinstance(entry.get("path"), str):
            raise InputError(f"{where} has no path; {_ENTRY}")
        name = entry.get("name") or ""
        # What a tracker takes as part of a metric's name.
        if not isinstance(name, str) or not re.fullmatch(r"[\w .:/-]*", name):
            raise InputError(f"{where}.name is {name!r}: letters, digits, spaces and . : / _ - are allowed")
        numbers = {}
        for key in ("weight", "epochs"):
            value = entry.get(key)
            if value is not None and (isinstance(value, (str, bool)) or not math.isfinite(value)):
                raise InputError(f"{where}.{key} is {value!r}: it must be a number (leave it out: {_LEFT_OUT[key]})")
            numbers[key] = value
        if numbers["epochs"] is not None and not numbers["epochs"] > 0:
            raise InputError(f"{where}.epochs is {numbers['epochs']}: it must be > 0 (leave it out: without end)")
        found.append(SourceConfig(entry["path"], name=name, **numbers))
    return found


_ENTRY = "a source is {path: FOLDER, weight: NUMBER, epochs: NUMBER, name: WORD}, all but path may be left out"
_LEFT_OUT = {"weight": "by its tokens, like all others", "epochs": "without end"}


def name_of(path: str) -> str:
    """A source's name from its path or address: the last folder's, or for .../NAME/train the one above."""
    parts = [part for part in plain_address(path).rstrip("/").split("/") if part]
    name = parts[-1] if parts else path
    return re.sub(r"[^\w .:/-]", "_", parts[-2] if name == "train" and len(parts) > 1 else name)


def _check_blocks(config: Config, found: TrainingData) -> None:
    data = config.data
    if data.cfg_condition == "spans" and not any(one.has_spans for one in found.sets):
        raise InputError(
            "data.cfg_condition is spans but data.shards has no prompts or conditions: prepare it from chats or with "
            "--condition_fields, or set data.cfg_condition=prefix"
        )
    if data.pad_policy == "eos_in_loss" and not all(one.row_tokens for one in found.sets):
        raise InputError(
            "data.pad_policy is eos_in_loss but data.shards has no padding: only sets of rows have (prepare --row_tokens)"
        )
    remote = {one.location: sum(s.bytes for s in one.shards) for one in found.sets if "://" in one.location}
    if remote and not data.shuffle_window and sum(remote.values()) > data.cache_gib * 2**30:
        raise InputError(
            f"data.shards: {', '.join(remote)}: remote, and together larger than data.cache_gib={data.cache_gib:g}: every block "
            "would fetch a whole shard; set data.shuffle_window (tokens shuffled among each other, say 64000000), or a larger cache"
        )


def check_enough(config: Config, found: TrainingData, consumed: int) -> None:
    """InputError if capped sources end before the run does. consumed: samples read at its end (StreamPosition.consumed)."""
    blocks = found.blocks(config)
    if isinstance(blocks, Mixture) and blocks.total is not None and consumed > blocks.total:
        raise InputError(
            f"data.shards: with these `epochs` the sources give {blocks.total} samples, the run ends behind sample {consumed} "
            "(train.steps, train.global_batch_size): raise or drop an `epochs`, or train fewer steps"
        )
