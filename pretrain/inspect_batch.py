"""What the model will see: samples of one training step, drawn as training draws them, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.batch import collate, expand
from data.errors import InputError
from data.inspect_sample import render_sample
from data.loader import stages
from data.samples import sample_of
from data.shard_set import ShardSet
from data.stream import BlockStream
from data.tokenizer import load_tokenizer
from pretrain.config import Config
from pretrain.load_config import load_config
from pretrain.training_data import stage_options


@dataclass(frozen=True)
class View:
    """Which samples: `count` of step `step` (from 0), as `config` (a config file; none: the defaults) would draw them."""

    count: int
    step: int = 0
    config: str = ""


def training_config(view: View, location: str) -> Config:
    """The config whose stream is shown, reading `location`. InputError for a config that cannot be read."""
    given = ["--config", view.config] if view.config else []
    return load_config([*given, "--data.shards", location])


def batch_lines(shards: ShardSet, view: View, width: int, colour: bool) -> list[str]:
    """The samples, drawn by the stages of training. Raises InputError for numbers that make no sense."""
    config = training_config(view, shards.location)
    batch = config.train.global_batch_size
    if not 1 <= view.count <= batch:
        raise InputError(
            f"--batch {view.count}: a step has {batch} samples (train.global_batch_size), show 1 to {batch}"
        )
    if view.step < 0:
        raise InputError(f"--step {view.step}: steps count from 0")
    size = shards.row_tokens or config.data.sequence_length
    stream = BlockStream(shards, size, config.run.seed, window=config.data.shuffle_window, borders=True)
    options = stage_options(config)
    tokenizer = load_tokenizer(Path(shards.tokenizer_path), special=shards.special)
    first = view.step * batch
    blocks = {g: stream.block(g) for g in range(first, first + view.count)}
    samples: Iterable[dict] = [
        sample_of(g, block, size, options.isolate, options.eos_in_loss) for g, block in blocks.items()
    ]
    for stage in stages(options):
        samples = stage(samples)
    compact = next(collate(samples, view.count, shards.special.pad))
    drawn = expand(compact, shards.special.mask, config.objective.weighting)
    prompt = ~drawn.eligible & (drawn.document_ids >= 0)
    said = [
        f"step {view.step}, samples {first} to {first + view.count - 1} of {batch}, {size} tokens, packing {config.data.packing}, "
        f"seed {config.run.seed}"
    ]
    for i, (g, block) in enumerate(blocks.items()):
        text = render_sample(
            block.tokens.astype(np.int64),
            drawn.masked[i].numpy(),
            block.borders,
            prompt[i].numpy(),
            (drawn.document_ids[i] < 0).numpy(),
            bool(drawn.dropped[i]),
            float(drawn.t[i, 0]),
            drawn.weight[i].numpy(),
            tokenizer,
            width,
            colour,
        )
        said += ["", f"=== sample {g}, epoch {stream.epoch(g)}", text]
    return said
