"""Samples logged during training: the original text, what is masked of it, and what the model fills in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data.masking import MaskingOptions, draw_mask
from data.shard_set import ShardSet
from data.stream import SequentialBlocks
from data.tokenizer import TextTokenizer
from parallel.engine import Engine
from pretrain.sampler import SamplingOptions, generate

STEPS = 32


def log_samples(
    engine: Engine,
    shards: ShardSet,
    tokenizer: TextTokenizer,
    sequence_length: int,
    step: int,
    folder: Path,
    count: int = 2,
) -> str:
    """Masks the first `count` blocks of `shards` at fixed noise levels, fills them in, and returns the text.

    Collective: every rank calls it alike, since a forward gathers parameters on all of them. Rank 0 writes
    FOLDER/step-NNNNNNNN.txt.
    """

    def logits(ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], dtype=torch.int32).expand(ids.shape)
        return engine.forward({"noisy_ids": ids, "position_ids": positions}).float().cpu()

    blocks = SequentialBlocks(shards, sequence_length)
    mask_id = shards.special.mask
    sections = []
    for g in range(min(count, len(blocks))):
        tokens = blocks.block(g).tokens.astype(np.int64)
        options = MaskingOptions(seed=0, global_batch=count, stream="samples")
        masked, _, p = draw_mask(g, len(tokens), None, len(tokens), options)
        noisy = torch.from_numpy(np.where(masked, mask_id, tokens))[None]
        filled = generate(
            logits,
            noisy,
            torch.from_numpy(~masked)[None],
            mask_id=mask_id,
            options=SamplingOptions(steps=STEPS),
            eos_id=shards.special.eos,
            forbidden_ids=range(tokenizer.vocab_size, engine.vocab_size),
        )[0].numpy()
        right = int((filled == tokens)[masked].sum())
        sections.append(
            f"=== step {step}, block {g}\n--- original\n{tokenizer.decode(tokens, show_special=True)}\n"
            f"--- masked: {int(masked.sum())} of {len(tokens)} tokens, rate {p:.3f}\n"
            f"{tokenizer.decode(noisy[0].numpy(), show_special=True)}\n"
            f"--- generated: {right} of {int(masked.sum())} masked tokens restored\n{tokenizer.decode(filled, show_special=True)}\n"
        )
    text = "\n".join(sections)
    if engine.mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step-{step:08d}.txt").write_text(text)
    return text
