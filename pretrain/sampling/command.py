"""`sample`: text from a checkpoint of any kind, its making shown live."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, fields
from typing import Literal, Optional

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from data.errors import InputError
from data.tokenizer import TextTokenizer
from pretrain.load_model import find_checkpoint, load_model, load_run_tokenizer
from pretrain.predictor import Objective, Predictor, objective_of
from pretrain.sampling.display import render_progress
from pretrain.sampling.options import options_for
from pretrain.sampling.sampler import SamplingOptions, generate


@dataclass
class SampleOptions:
    """Generates text from a checkpoint.

    Which options a model takes depends on what it was trained for (objective.kind); one that means nothing to it is refused.

    Args:
        run: run folder (its newest checkpoint is taken) or a checkpoint folder.
        prompt: text to go on from; it may contain <|mask|> where single tokens are to be filled in.
        length: tokens to generate behind the prompt; 0 with masks in the prompt fills in only those.
        count: texts to generate.
        steps: reveal or denoising steps over the whole length (64); not autoregressive, which takes one a token.
        block_length: tokens finished before the next ones are begun (semi-autoregressive); 0 = all at once. masked and bert.
        remasking: which tokens are revealed first: the surest (the default), or random ones. masked, bert and block.
        temperature: 0 takes the most likely token; above, tokens are drawn. By default 0, for uniform and flow 1.
        top_p: draw from the fewest tokens that together have this probability; 1 = all. autoregressive.
        cfg_scale: classifier-free guidance; 0 = off.
        seed: of the draws.
        pause: seconds for which a terminal shows each step; 0 = as fast as the model goes.
        quiet: only the final text.
    """

    run: str
    prompt: str = ""
    length: int = 128
    count: int = 1
    steps: Optional[int] = None
    block_length: Optional[int] = None
    remasking: Optional[Literal["low_confidence", "random"]] = None
    temperature: Optional[float] = None
    top_p: Optional[float] = None
    cfg_scale: float = 0.0
    seed: int = 0
    pause: float = 0.05
    quiet: bool = False


def sample(options: SampleOptions) -> list[str]:
    """Prints and returns the generated texts.

    InputError for a missing checkpoint, a prompt longer than the model's blocks, or an option that its kind has no use for.
    """
    for name, least in (("count", 1), ("length", 0), ("pause", 0)):
        if getattr(options, name) < least:
            raise InputError(f"sample: {name} is {getattr(options, name)}, it must be at least {least}")
    given = {field.name: getattr(options, field.name) for field in fields(SamplingOptions)}
    SamplingOptions(
        **{name: value for name, value in given.items() if value is not None}
    )  # bad values need no checkpoint
    folder = find_checkpoint(options.run)
    model, config, trainer = load_model(folder)
    objective = objective_of(config, trainer["step"])
    sampling = options_for(objective, given)
    tokenizer = load_run_tokenizer(folder, trainer)
    mask_id = tokenizer.special.mask
    row, prompt_length = _row(options, tokenizer, config.data.sequence_length, objective)
    console = Console(file=sys.stdout, highlight=False)
    ids = row.repeat(options.count, 1)
    predictor = Predictor.of_model(model, objective, eos_id=tokenizer.special.eos)

    with _display(console, options.quiet) as live:
        previous: Optional[list[int]] = None

        def show(step: int, current: torch.Tensor) -> None:
            nonlocal previous
            shown = current[0].tolist()
            if live:
                live.update(render_progress(shown, previous, mask_id, tokenizer.decode), refresh=True)
                time.sleep(options.pause)
            previous = shown

        filled = generate(
            predictor,
            ids,
            ids != mask_id,
            mask_id=mask_id,
            options=sampling,
            objective=objective,
            vocab_size=predictor.vocab_size,
            eos_id=tokenizer.special.eos,
            forbidden_ids=range(tokenizer.vocab_size, predictor.vocab_size),
            on_step=show,
        )
        if live:  # the last frame is the result itself, printed below
            live.update(Text(""))
    texts = [_text(tokenizer, row, prompt_length) for row in filled.tolist()]
    for number, text in enumerate(texts, 1):
        if options.count > 1:
            console.print(f"--- {number} of {options.count}")
        console.print(text, markup=False, soft_wrap=True)
    return texts


def _row(options: SampleOptions, tokenizer: TextTokenizer, most: int, objective: Objective) -> tuple[torch.Tensor, int]:
    """(ids [L] int64 with mask tokens where the model is to write, tokens of the prompt); InputError if it cannot be filled."""
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise InputError("sample: the prompt is not valid text (it holds half of a surrogate pair)") from None
    prompt = tokenizer.encode_prompt(options.prompt).astype(np.int64) if options.prompt else np.zeros(0, np.int64)
    row = torch.from_numpy(np.concatenate([prompt, np.full(options.length, tokenizer.special.mask, np.int64)]))
    if not 0 < len(row) <= most:
        raise InputError(
            f"sample: prompt ({len(prompt)} tokens) + length ({options.length}) is {len(row)}; the model was trained on "
            f"1..{most} tokens: shorten the prompt or lower --length"
        )
    is_open = row == tokenizer.special.mask
    if not bool(is_open.any()):
        raise InputError("sample: nothing to fill in: give --length above 0, or a prompt that contains <|mask|>")
    if objective.kind == "autoregressive" and bool((is_open[:-1] & ~is_open[1:]).any()):
        raise InputError(
            "sample: this model writes from left to right and cannot see what follows a <|mask|>: end the prompt before the first"
        )
    if objective.shift and bool(is_open[0]):
        raise InputError(
            "sample: this model (objective.shift) predicts each token from the one before it: "
            "give a --prompt whose first token is known"
        )
    return row, len(prompt)


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
