"""Samples logged during training: the original text, what is hidden of it, and what the model fills in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data.masking import MaskingOptions, draw_mask
from data.shard_set import ShardSet
from data.stream import SequentialBlocks
from data.tokenizer import TextTokenizer
from parallel.engine import Engine
from pretrain.predictor import MASKED, Objective, Predictor
from pretrain.sampling.options import options_for
from pretrain.sampling.sampler import generate

STEPS = 32


def log_samples(
    engine: Engine,
    shards: ShardSet,
    tokenizer: TextTokenizer,
    sequence_length: int,
    step: int,
    folder: Path,
    count: int = 2,
    objective: Objective = MASKED,
) -> str:
    """Hides tokens of the first `count` blocks of `shards` at fixed noise levels, fills them in, and returns the text.

    Collective: every rank calls it alike, since a forward gathers parameters on all of them. Rank 0 writes
    FOLDER/step-NNNNNNNN.txt.
    """
    predictor = Predictor.of_engine(engine, objective, eos_id=shards.special.eos)
    blocks = SequentialBlocks(shards, sequence_length)
    mask_id = shards.special.mask
    given = {} if objective.kind == "autoregressive" else {"steps": STEPS}
    sections = []
    for g in range(min(count, len(blocks))):
        tokens = blocks.block(g).tokens.astype(np.int64)
        tokens = tokens[: len(tokens) // engine.mesh.tp * engine.mesh.tp]  # equal shares under sequence parallelism
        hidden = hidden_tokens(g, len(tokens), count, objective)
        noisy = torch.from_numpy(np.where(hidden, mask_id, tokens))[None]
        filled = generate(
            predictor,
            noisy,
            torch.from_numpy(~hidden)[None],
            mask_id=mask_id,
            options=options_for(objective, given),
            objective=objective,
            vocab_size=engine.vocab_size,
            eos_id=shards.special.eos,
            forbidden_ids=range(tokenizer.vocab_size, engine.vocab_size),
        )[0].numpy()
        right = int((filled == tokens)[hidden].sum())
        sections.append(
            f"=== step {step}, block {g}\n--- original\n{tokenizer.decode(tokens, show_special=True)}\n"
            f"--- masked: {int(hidden.sum())} of {len(tokens)} tokens\n"
            f"{tokenizer.decode(noisy[0].numpy(), show_special=True)}\n"
            f"--- generated: {right} of {int(hidden.sum())} masked tokens restored\n{tokenizer.decode(filled, show_special=True)}\n"
        )
    text = "\n".join(sections)
    if engine.mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step-{step:08d}.txt").write_text(text)
    return text


def hidden_tokens(number: int, length: int, count: int, objective: Objective) -> np.ndarray:
    """What the model is to fill in of logged block `number` of `count`: [L] bool, the same at every step of a run.

    Drawn token by token; for a left-to-right model as many at the end; never the first token where nothing predicts it.
    """
    options = MaskingOptions(seed=0, global_batch=count, stream="samples")
    hidden = draw_mask(number, length, None, length, options).mask
    if objective.kind == "autoregressive":
        hidden = np.arange(length) >= length - hidden.sum()
    if objective.shift:
        hidden[:1] = False
    return hidden
