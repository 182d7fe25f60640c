"""Activation checkpointing of one block: what is kept for the backward pass, and what is computed again."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")

# The fused attention kernels. Attention is the one part of a block whose cost grows with the sequence squared while its
# output does not. (The unfused "math" kernel is many small operations; with it `selective` recomputes everything.)
_ATTENTION = [
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if hasattr(torch.ops.aten, name)
]
try:
    import torch.nn.attention.varlen  # registers the operator

    _ATTENTION.append(torch.ops.torch_attn._varlen_attn.default)
except (ImportError, AttributeError):  # an older torch
    pass


def recomputed(compute: Callable, mode: str) -> Callable:
    """`compute` with its activations dropped after the forward: `full` keeps its inputs, `selective` attention outputs too."""
    if mode == "none":
        return compute
    options: dict = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _ATTENTION)

    @functools.wraps(compute)
    def run(*inputs):
        return checkpoint(compute, *inputs, **options) if torch.is_grad_enabled() else compute(*inputs)

    return run
