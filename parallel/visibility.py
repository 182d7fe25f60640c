"""Who sees whom in attention, beyond documents: causal, some tokens ahead, or blocks.

A microbatch may carry int32 [B, L, 3], for every token (rank, reach, group). Query i sees key j of its document if and only if
rank[j] <= reach[i], or group[j] == group[i] >= 0. The cases that training and sampling make:

    causal                       rank = reach = column; group -1
    from causal to full          rank = column, reach = column + w, the same w for all; group -1
    block diffusion, sampling    rank = reach = position // block size; group -1
    block diffusion, training    a row is [noisy copy, clean copy] (Arriola et al., arXiv 2503.09573);
                                 block b of the noisy copy: rank 2^30, reach b - 1, group b;
                                 block b of the clean copy: rank = reach = b, group -1

`find_visibility` looks at it once a microbatch, on the host: the first two need no mask where a kernel knows them (`Ahead`), the
others one for all layers and heads (`Rules`).
"""

from __future__ import annotations

from typing import NamedTuple, Union

import numpy as np
import torch
from torch import Tensor


class Ahead(NamedTuple):
    """Every token sees all that come before it, itself, and `tokens` that come after it; with 0, causal attention.

    A named tuple of tensors and numbers, so that engines' hooks and torch.compile can look through it.
    """

    tokens: int
    bounds: Tensor  # [B + 1] int32: where each of the B samples begins in the B x L tokens in order
    length: int  # L


class Rules(NamedTuple):
    """Visibility that no kernel knows."""

    fields: Tensor  # [B, L, 3] int32: rank, reach, group; [1, L, 3] if all samples have the same

    def mask(self) -> Tensor:
        """[B or 1, 1, L, L] bool: the query (third) sees the key (fourth), documents aside.

        For block diffusion rows of 2 x 4096 tokens that is 64 MiB, and as much again while it is made; what the layers then share
        (parallel.attention.keep_apart) takes 128 MiB in bf16. This for each sample, or once if all samples are alike.
        """
        rank, reach, group = self.fields.unbind(-1)
        same = group[:, :, None] == group[:, None, :]
        same &= (group >= 0)[:, :, None]
        same |= rank[:, None, :] <= reach[:, :, None]
        return same[:, None]


# None: every token sees every token.
Visibility = Union[Ahead, Rules, None]


def find_visibility(visibility_BL3: Tensor, device: torch.device) -> Visibility:
    """What a microbatch's (rank, reach, group) amount to, on `device`.

    Reads [B, L, 3] numbers on the host: given those that the loader made (CPU), nothing waits for the device.
    ValueError: a token that does not even see itself, for which softmax has no value.
    """
    if visibility_BL3.dim() != 3 or visibility_BL3.shape[-1] != 3:
        raise ValueError(
            f"visibility is {list(visibility_BL3.shape)}; it must be [samples, tokens, 3]: rank, reach, group"
        )
    samples, length, _ = visibility_BL3.shape
    fields = visibility_BL3.cpu().numpy()
    rank, reach, group = np.moveaxis(fields, -1, 0)
    blind = (rank > reach) & (group < 0)
    if blind.any():
        sample, position = np.argwhere(blind)[0]
        raise ValueError(
            f"visibility of sample {sample}, position {position}: rank {rank[sample, position]} is above reach "
            f"{reach[sample, position]} and group is negative, so the token does not see itself; every token must"
        )
    if (rank.max(1) <= reach.min(1)).all():
        return None
    ahead = int(reach[0, 0] - rank[0, 0])
    column = np.arange(length)
    if (group < 0).all() and (rank == column).all() and (reach == column + ahead).all():
        return Ahead(ahead, torch.arange(samples + 1, dtype=torch.int32, device=device) * length, length)
    alike = visibility_BL3[:1] if (fields == fields[:1]).all() else visibility_BL3
    return Rules(alike.to(device, torch.int32, non_blocking=True))
