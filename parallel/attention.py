"""Non-causal attention with rotary positions: one small interface over scaled_dot_product_attention.

Shapes: B samples, L tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary_angles(position_ids_BL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, float32, each [B, 1, L, D] (Su et al., arXiv 2104.09864, half-split layout).

    The angles are formed in float64: in float32 the fastest one is off by 1e-4 at position 4096.
    """
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=position_ids_BL.device) / head_dim)
    angles = position_ids_BL[:, None, :, None] * inverse
    angles = torch.cat((angles, angles), -1)
    return angles.cos().float(), angles.sin().float()


def rotate(x_BNLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotation in float32 (or wider) and returns x's dtype."""
    wide = x_BNLD.to(torch.promote_types(x_BNLD.dtype, torch.float32))
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(x_BNLD.dtype)


def attention(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, document_ids_BL: Optional[Tensor] = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, every token seeing every token, [B, N, L, D].

    With `document_ids` a token sees only tokens of its own document (padding, -1, sees only padding). Without,
    no L x L tensor is built and the fused kernels are used; pass None whenever a microbatch has one document per sample.
    """
    groups = q_BNLD.shape[1] // k_BKLD.shape[1]
    if document_ids_BL is None:
        return F.scaled_dot_product_attention(q_BNLD, k_BKLD, v_BKLD, is_causal=False, enable_gqa=groups > 1)
    same_document = document_ids_BL[:, None, :, None] == document_ids_BL[:, None, None, :]
    if groups > 1:  # the fused CUDA kernels that take a mask do not take grouped heads
        k_BKLD, v_BKLD = (x.repeat_interleave(groups, dim=1) for x in (k_BKLD, v_BKLD))
    return F.scaled_dot_product_attention(q_BNLD, k_BKLD, v_BKLD, attn_mask=same_document, is_causal=False)
