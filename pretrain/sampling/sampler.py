"""One way to sample text, whatever the model was trained for.

    masked, bert, block    mask tokens are revealed                   pretrain.sampling.unmasking
    uniform, flow          random tokens change until they fit        pretrain.sampling.uniform
    autoregressive         one token after the other                  pretrain.sampling.left_to_right

Every draw is a pure function of (seed, purpose, row, step), so ranks agree without talking and a row does not depend on the
batch that it is in. Shapes: B rows, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from data.errors import InputError
from pretrain.predictor import MASKED, Objective
from pretrain.sampling.left_to_right import write_left_to_right
from pretrain.sampling.logits import Guided, LogitsFn
from pretrain.sampling.options import SamplingOptions, check_blocks
from pretrain.sampling.uniform import denoise, renoise
from pretrain.sampling.unmasking import unmask

__all__ = ["LogitsFn", "SamplingOptions", "generate"]


@torch.no_grad()
def generate(
    predict: LogitsFn,
    ids: Tensor,
    prompt_mask: Tensor,
    *,
    mask_id: int,
    options: SamplingOptions,
    objective: Objective = MASKED,
    vocab_size: int = 0,
    signal: Callable[[float], float] | None = None,
    forbidden_ids: Iterable[int] = (),
    eos_id: int | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    first_row: int = 0,
) -> Tensor:
    """Fills every position of `ids` that holds `mask_id` and is not in the prompt; returns new ids [B, L].

    Args:
        predict: ids [B, L] int64 -> logits [B, L, V] of any float type, those of position i about token i (such as
            pretrain.predictor.Predictor); called once a step, twice with guidance, always with the same shape.
        ids: [B, L] int64; mask tokens may stand anywhere (continuation or in-filling).
        prompt_mask: [B, L] bool, the given positions that guidance hides in its unconditional input. They never
            change, and neither does any other position without a mask token.
        mask_id: never produced; only `uniform` and `flow` may pass through it on their way.
        vocab_size: N, the ids that noise may give; needed by `uniform` and `flow`, where it is V.
        signal: t -> what is left of a clean token at noise level t: alpha(t) of `uniform` and `flow`; by default
            Objective.signal.
        forbidden_ids: never produced either; the probability goes to the other tokens.
        eos_id: end-of-text. Revealed last in its block (mask tokens, `low_confidence`), the end of a row (autoregressive).
        on_step: called as (step, ids [B, L]) after each step that changed something.
        first_row: the row index of ids[0] in the draws: row i generated alone with first_row=i equals row i of a batch.

    Raises:
        InputError: the options do not go with the objective, or it cannot predict an open position.
        ValueError: shapes do not match, or the logits are not numbers.
    """
    if ids.ndim != 2 or ids.dtype != torch.int64 or prompt_mask.shape != ids.shape or prompt_mask.dtype != torch.bool:
        raise ValueError(
            f"generate needs ids [B, L] int64 and prompt_mask [B, L] bool, got {tuple(ids.shape)} {ids.dtype} and "
            f"{tuple(prompt_mask.shape)} {prompt_mask.dtype}"
        )
    check_blocks(objective, options)
    ids = ids.clone()
    still_open = ((ids == mask_id) & ~prompt_mask).cpu().numpy()
    if not still_open.any():
        return ids
    if objective.shift and still_open[:, 0].any():
        raise InputError(
            "the first token of a text is open, but this model (objective.shift) predicts each token from the one before it: "
            "give at least one token at the start"
        )
    guided = Guided(predict, prompt_mask, mask_id, forbidden_ids, options.cfg_scale)
    if objective.kind in ("masked", "bert", "block"):
        return unmask(
            guided,
            ids,
            still_open,
            options,
            block_size=objective.block_size,
            eos_id=eos_id,
            on_step=on_step,
            first_row=first_row,
        )
    if objective.kind == "autoregressive":
        return write_left_to_right(
            guided, ids, still_open, options, eos_id=eos_id, on_step=on_step, first_row=first_row
        )
    if vocab_size < 2:
        raise ValueError(f"kind {objective.kind} starts from random tokens: vocab_size is needed, at least 2")
    change = renoise if objective.kind == "flow" else denoise
    return change(
        guided,
        ids,
        still_open,
        options,
        vocab_size=vocab_size,
        signal=signal or objective.signal,
        on_step=on_step,
        first_row=first_row,
    )
