"""`sample`: text from a checkpoint, the unmasking shown live."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from data.errors import InputError
from data.tokenizer import TextTokenizer
from pretrain.load_model import find_checkpoint, load_model, load_run_tokenizer
from pretrain.sampler import SamplingOptions, generate, render_unmasking


@dataclass
class SampleOptions:
    """Generates text by unmasking.

    Args:
        run: run folder (its newest checkpoint is taken) or a checkpoint folder.
        prompt: text to go on from; it may contain <|mask|> where single tokens are to be filled in.
        length: tokens to generate behind the prompt; 0 with masks in the prompt fills in only those.
        count: texts to generate.
        steps: reveal steps over the whole length.
        block_length: tokens finished before the next ones are begun (semi-autoregressive); 0 = all at once.
        remasking: which tokens are revealed first: the surest, or random ones.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        cfg_scale: classifier-free guidance; 0 = off.
        seed: of the draws.
        pause: seconds for which a terminal shows each step; 0 = as fast as the model goes.
        quiet: only the final text.
    """

    run: str
    prompt: str = ""
    length: int = 128
    count: int = 1
    steps: int = 64
    block_length: int = 0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    temperature: float = 0.0
    cfg_scale: float = 0.0
    seed: int = 0
    pause: float = 0.05
    quiet: bool = False


def sample(options: SampleOptions) -> list[str]:
    """Prints and returns the generated texts. InputError for a missing checkpoint or a prompt longer than the model's blocks."""
    sampling = SamplingOptions(
        options.steps, options.block_length, options.remasking, options.temperature, options.cfg_scale, options.seed
    )
    for name, least in (("count", 1), ("length", 0), ("pause", 0)):
        if getattr(options, name) < least:
            raise InputError(f"sample: {name} is {getattr(options, name)}, it must be at least {least}")
    folder = find_checkpoint(options.run)
    model, config, trainer = load_model(folder)
    device = next(model.parameters()).device
    tokenizer = load_run_tokenizer(folder, trainer)
    mask_id = tokenizer.special.mask
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise InputError("sample: the prompt is not valid text (it holds half of a surrogate pair)") from None
    prompt = tokenizer.encode_prompt(options.prompt).astype(np.int64) if options.prompt else np.zeros(0, np.int64)
    row = torch.from_numpy(np.concatenate([prompt, np.full(options.length, mask_id, np.int64)]))
    if not 0 < len(row) <= config.data.sequence_length:
        raise InputError(
            f"sample: prompt ({len(prompt)} tokens) + length ({options.length}) is {len(row)}; the model was trained on "
            f"1..{config.data.sequence_length} tokens: shorten the prompt or lower --length"
        )
    if not bool((row == mask_id).any()):
        raise InputError("sample: nothing to fill in: give --length above 0, or a prompt that contains <|mask|>")
    positions = torch.arange(len(row), dtype=torch.int32)[None]
    console = Console(file=sys.stdout, highlight=False)
    ids = row.repeat(options.count, 1)

    @torch.no_grad()
    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids.to(device), positions.expand(ids.shape).to(device)).float().cpu()

    with _display(console, options.quiet) as live:
        previous: Optional[list[int]] = None

        def show(step: int, current: torch.Tensor) -> None:
            nonlocal previous
            shown = current[0].tolist()
            if live:
                live.update(render_unmasking(shown, previous, mask_id, tokenizer.decode), refresh=True)
                time.sleep(options.pause)
            previous = shown

        filled = generate(
            logits,
            ids,
            ids != mask_id,
            mask_id=mask_id,
            options=sampling,
            eos_id=tokenizer.special.eos,
            forbidden_ids=range(tokenizer.vocab_size, config.model.vocab_size),
            on_step=show,
        )
        if live:  # the last frame is the result itself, printed below
            live.update(Text(""))
    texts = [_text(tokenizer, row, len(prompt)) for row in filled.tolist()]
    for number, text in enumerate(texts, 1):
        if options.count > 1:
            console.print(f"--- {number} of {options.count}")
        console.print(text, markup=False, soft_wrap=True)
    return texts


def _text(tokenizer: TextTokenizer, ids: list[int], prompt_length: int) -> str:
    """The text up to the first end-of-text behind the prompt: what follows belongs to another document."""
    ends = [at for at in range(prompt_length, len(ids)) if ids[at] == tokenizer.special.eos]
    return tokenizer.decode(ids[: ends[0]] if ends else ids)


class _display:
    """A rich Live on a terminal; nothing when quiet or when the output is a file."""

    def __init__(self, console: Console, quiet: bool):
        self._live = Live(console=console, refresh_per_second=12) if console.is_terminal and not quiet else None

    def __enter__(self) -> Optional[Live]:
        return self._live.__enter__() if self._live else None

    def __exit__(self, *exc) -> None:
        if self._live:
            self._live.__exit__(*exc)
