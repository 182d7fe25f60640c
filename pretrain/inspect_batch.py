"""What the model will see: samples of one training step, drawn as training draws them, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.batch import DiffusionBatch, expand
from data.compact import collate
from data.errors import InputError
from data.inspect_sample import render_sample
from data.loader import stages
from data.samples import sample_of
from data.shard_set import ShardSet
from data.stream import BlockStream
from data.tokenizer import load_tokenizer
from pretrain.config import Config
from pretrain.load_config import load_config
from pretrain.objective import batch_form, check_objective
from pretrain.training_data import stage_options

MOST_COUNTED = 1024  # samples


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


def training_shards(view: View) -> list:
    """The sources that the config itself names."""
    if not view.config:
        return []
    shards = load_config(["--config", view.config]).data.shards
    return [shards] if isinstance(shards, str) else shards


def masked_by_noise(drawn: DiffusionBatch, samples: int) -> list[str]:
    """How much of what may be masked is masked, by tenths of the noise level, beside what is expected."""
    lines = [f"masked by noise level t, of all {samples} samples (expected: the mean of p over their tokens)"]
    tenth = (drawn.t * 10).long().clamp(max=9)
    for k in range(10):
        here = drawn.eligible & (tenth == k)
        if tokens := int(here.sum()):
            rate, expected = float(drawn.masked[here].float().mean()), float(drawn.p_mask[here].double().mean())
            bar = "█" * round(40 * rate)
            lines.append(
                f"  {k / 10:.1f} - {(k + 1) / 10:.1f}  {rate:6.1%} ({expected:6.1%})  of {tokens:>9,} tokens  {bar}"
            )
    return lines


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
    if size < 1 or batch < 1:
        raise InputError(f"--config {view.config}: data.sequence_length or train.global_batch_size makes no sense")
    config.data.sequence_length = size
    check_objective(config)
    stream = BlockStream(shards, size, config.run.seed, window=config.data.shuffle_window, borders=True)
    options = stage_options(config)
    tokenizer = load_tokenizer(Path(shards.tokenizer_path), special=shards.special)
    first = view.step * batch
    counted = max(view.count, min(batch, MOST_COUNTED))
    blocks = {g: stream.block(g) for g in range(first, first + counted)}
    samples: Iterable[dict] = [
        sample_of(g, block, size, options.isolate, options.eos_in_loss) for g, block in blocks.items()
    ]
    for stage in stages(options):
        samples = stage(samples)
    compact = next(collate(samples, counted, shards.special.pad))
    form = replace(batch_form(config.objective, shards.special.eos), kind="masked", shift=False)  # token by token
    drawn = expand(compact, shards.special.mask, form)
    kind = config.objective.kind
    if kind in ("uniform", "flow"):  # shown is what was replaced; expected: how often the replacement is another token
        drawn.masked = (drawn.noisy_ids != drawn.target_ids) & drawn.eligible
        drawn.p_mask = drawn.p_mask * (1 - 1 / config.model.vocab_size)
    prompt = ~drawn.eligible & (drawn.document_ids >= 0)
    said = []
    if len(mixed := training_shards(view)) > 1:
        said.append(
            f"note: the config mixes {len(mixed)} sources; shown is this set as a run on it alone would read it"
        )
    said += [
        f"step {view.step}, samples {first} to {first + view.count - 1} of {batch}, {size} tokens, packing {config.data.packing}, "
        f"seed {config.run.seed}"
    ]
    if kind == "autoregressive":
        said += [
            "",
            "autoregressive: nothing is hidden, every token marked as masked is predicted from those before it",
        ]
    else:
        said += ["", *masked_by_noise(drawn, counted)]
    for i, (g, block) in enumerate(list(blocks.items())[: view.count]):
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
