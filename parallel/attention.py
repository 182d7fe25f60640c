"""Attention with rotary positions: one small interface over the kernels, whole samples or isolated documents, all tokens or some.

`find_documents` and `parallel.visibility.find_visibility` look at a microbatch once, on the host; `keep_apart` says how its tokens
are kept apart in all layers; `attention` then runs in each:

    one document a sample           scaled_dot_product_attention without a mask (the fused kernels), all tokens or causal
    CUDA, bf16 or fp16              varlen_attn (FlashAttention over the documents' bounds), if it gives the right numbers here;
                                    causal or some tokens ahead is its window
    CPU, not compiled               scaled_dot_product_attention of one document after the other, all tokens or causal
    anything else                   scaled_dot_product_attention with one mask [B or 1, 1, L, L] for all layers and heads

Shapes: B samples, L tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from parallel.visibility import Ahead, Rules, Visibility


class Documents(NamedTuple):
    """Which tokens of a microbatch belong together: those of one sample with the same id. Padding (-1) counts as a document.

    A named tuple of tensors and numbers, so that engines' hooks and torch.compile can look through it.
    """

    ids: Tensor  # [B, L] int32; [1, L] if all samples have the same
    # [number + 1] int32: document i is tokens [bounds[i], bounds[i + 1]) of the B x L tokens in order; the last ones are empty.
    # None if the tokens of a document are not next to each other.
    bounds: Optional[Tensor]
    longest: int  # at least the tokens of the longest document
    ahead: Optional[int] = None  # how many later tokens of its document a token sees; None: all

    def mask(self) -> Tensor:
        """[B or 1, 1, L, L] bool: query (third) and key (fourth) are of one document, the key not too far ahead."""
        mask = self.ids[:, None, :, None] == self.ids[:, None, None, :]
        if self.ahead is not None:
            column = torch.arange(self.ids.shape[1], device=self.ids.device)
            mask &= column <= column[:, None] + self.ahead
        return mask


# How tokens are kept apart: by documents' bounds; by a mask [B or 1, 1, L, L], bool or what is added to the scores; causal in each
# sample (an Ahead of 0 tokens); or None: each token sees its whole sample.
Isolation = Union[Documents, Tensor, Ahead, None]


def find_documents(document_ids_BL: Tensor, device: torch.device) -> Optional[Documents]:
    """The documents of a microbatch, on `device`; None if every sample is one document.

    Reads [B, L] ids on the host: given those that the loader made (CPU), nothing waits for the device.
    Numbers that become sizes in a compiled graph are rounded up to powers of two, so that few graphs serve all microbatches.
    """
    samples, length = document_ids_BL.shape
    ids = document_ids_BL.cpu().numpy()
    begins = np.ones((samples, length), bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(begins)
    if len(starts) == samples:
        return None
    on_device = document_ids_BL.to(device, torch.int32, non_blocking=True)
    runs = np.stack([starts // length, ids.reshape(-1)[starts]])
    if np.unique(runs, axis=1).shape[1] < len(starts):
        return Documents(on_device, None, length)
    bounds = np.full(_power_of_two(len(starts)) + 1, samples * length, np.int32)
    bounds[: len(starts)] = starts
    # At least 128, the tile of the kernels: for 1 they would take a path made for decoding.
    longest = max(128, _power_of_two(int(np.diff(bounds).max())))
    return Documents(on_device, torch.from_numpy(bounds).to(device, non_blocking=True), longest)


def _power_of_two(number: int) -> int:
    """The smallest one that is not less."""
    return 1 << (number - 1).bit_length()


def keep_apart(
    documents: Optional[Documents],
    visibility: Visibility,
    dtype: torch.dtype,
    head_dim: int,
    *,
    compiled: bool = False,
) -> Isolation:
    """How `attention` is to keep tokens apart in all layers of a microbatch, for queries of this dtype and head size.

    compiled: the layers are compiled. On a CPU a loop over documents would be compiled anew for every microbatch.
    """
    if isinstance(visibility, Rules):
        mask = visibility.mask()
        return _added(mask if documents is None else mask & documents.mask(), dtype)
    if visibility is not None:
        if documents is None and visibility.tokens == 0:
            return visibility
        documents = (documents or _whole_samples(visibility))._replace(ahead=visibility.tokens)
    if documents is None:
        return None
    device, window = documents.ids.device, documents.ahead is not None
    if device.type == "cpu":
        fits = not compiled and not documents.ahead
    else:
        fits = device.type == "cuda" and varlen_works(device, dtype, head_dim, window)
    return documents if fits and documents.bounds is not None else _added(documents.mask(), dtype)


def _whole_samples(visibility: Ahead) -> Documents:
    ids = torch.zeros(1, visibility.length, dtype=torch.int32, device=visibility.bounds.device)
    return Documents(ids, visibility.bounds, max(128, visibility.length))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to the scores: 0 or -inf.

    Given a boolean mask, scaled_dot_product_attention makes this of it in every layer and keeps each one for the backward pass:
    for a row of 2 x 4096 tokens in bf16, 128 MiB a layer. So it is made once here.
    """
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), float("-inf"))


def attention(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, isolation: Isolation = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the tokens that each token sees, [B, N, L, D].

    isolation: what `keep_apart` gave; None if every token sees its whole sample (the fast path).
    """
    if isolation is None:
        return _attend(q_BNLD, k_BKLD, v_BKLD)
    if isinstance(isolation, Tensor):
        return _attend_masked(q_BNLD, k_BKLD, v_BKLD, isolation)
    if isinstance(isolation, Ahead):
        if isolation.tokens:
            raise ValueError("tokens that see some ahead need what keep_apart makes of it")
        return _attend(q_BNLD, k_BKLD, v_BKLD, causal=True)
    return _attend_within(q_BNLD, k_BKLD, v_BKLD, isolation, _varlen if q_BNLD.is_cuda else _one_by_one)


def _attend(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, causal: bool = False) -> Tensor:
    grouped = q_BNLD.shape[1] != k_BKLD.shape[1]
    return F.scaled_dot_product_attention(q_BNLD, k_BKLD, v_BKLD, is_causal=causal, enable_gqa=grouped)


def _attend_masked(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_B1LL: Tensor) -> Tensor:
    groups = q_BNLD.shape[1] // k_BKLD.shape[1]
    if groups > 1:  # the fused CUDA kernels that take a mask do not take grouped heads
        k_BKLD, v_BKLD = (x.repeat_interleave(groups, dim=1) for x in (k_BKLD, v_BKLD))
    return F.scaled_dot_product_attention(q_BNLD, k_BKLD, v_BKLD, attn_mask=mask_B1LL, is_causal=False)


# (q [T, N, D], k and v [T, K, D], bounds, longest, ahead) -> [T, N, D]; T = B x L tokens end to end
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, Optional[int]], Tensor]


def _attend_within(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, documents: Documents, kernel: Kernel) -> Tensor:
    """By a kernel that takes bounds. No copy of what a projection made: its heads lie behind its tokens in memory."""
    assert documents.bounds is not None, "scattered documents need a mask"
    q_TND, k_TKD, v_TKD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNLD, k_BKLD, v_BKLD))
    out_TND = kernel(q_TND, k_TKD, v_TKD, documents.bounds, documents.longest, documents.ahead)
    return out_TND.unflatten(0, (q_BNLD.shape[0], -1)).transpose(1, 2)


def _one_by_one(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, bounds: Tensor, longest: int, ahead: Optional[int]
) -> Tensor:
    """The cost is the sum of squares of the documents' lengths. No mask is built but for some tokens ahead (in `kernel_fault`)."""
    sizes = [size for size in bounds.diff().tolist() if size]
    outputs = []
    for document in zip(*(x.split(sizes) for x in (q_TND, k_TKD, v_TKD))):
        q, k, v = (part.transpose(0, 1)[None] for part in document)
        if ahead:
            seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(ahead)
            outputs.append(_attend_masked(q, k, v, seen))
        else:
            outputs.append(_attend(q, k, v, causal=ahead == 0))
    return torch.cat([output[0].transpose(0, 1) for output in outputs])


# Older releases have no such word: there the kernel takes grouped heads unasked.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _varlen(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, bounds: Tensor, longest: int, ahead: Optional[int]) -> Tensor:
    options = _GROUPED if q_TND.shape[1] != k_TKD.shape[1] else {}
    if ahead is not None:  # where the kernel has no such word, kernel_fault says so
        options = options | {"window_size": (-1, ahead)}
    output = varlen_attn(q_TND, k_TKD, v_TKD, bounds, bounds, longest, longest, **options)
    assert isinstance(output, Tensor)
    return output


@functools.cache
def varlen_works(device: torch.device, dtype: torch.dtype, head_dim: int, window: bool = False) -> bool:
    """Whether varlen_attn takes such queries on this GPU and gives what one document after the other gives. Asked once.

    window: whether it does where tokens see none ahead, or only some. It needs 16-bit floats and a head size that is a multiple
    of 8, at most 256; that it lacks these is no surprise. Any other reason is a warning of one line: training goes on with a
    mask, which is slower.
    """
    if dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return False
    for ahead in (0, 1, 40) if window else (None,):
        if wrong := kernel_fault(_varlen, device, dtype, head_dim, ahead):
            what = "documents" if ahead is None else f"tokens that see {ahead} ahead"
            warnings.warn(f"{what} are kept apart by a mask, which is slower: varlen_attn {wrong}", stacklevel=2)
            return False
    return True


@torch.inference_mode(False)
@torch.enable_grad()
def kernel_fault(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, ahead: Optional[int] = None
) -> str:
    """What is wrong with a kernel's output or gradients on a few short documents with grouped heads; "" if nothing is."""
    bounds = torch.tensor(
        [0, 1, 70, 199, 200, 330, 330, 330], dtype=torch.int32, device=device
    )  # also of 1 token, and of none
    tokens = torch.arange(330 * 4 * head_dim, dtype=torch.float64).view(330, 4, head_dim)
    query, upstream = ((tokens * a).sin().to(device, dtype) for a in (0.7, 1.3))
    key, value = ((tokens[:, :2] * a).cos().to(device, dtype) for a in (1.1, 1.7))
    results = []
    for attend, kind in ((kernel, dtype), (_one_by_one, torch.float64)):
        q, k, v = (x.to(kind).requires_grad_() for x in (query, key, value))
        try:
            output = attend(q, k, v, bounds, 256, ahead)
            results.append([output.detach(), *torch.autograd.grad(output, (q, k, v), upstream.to(kind))])
        except (ImportError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            return f"cannot run here: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    for name, found, truth in zip(("its output", "dq", "dk", "dv"), *results, strict=True):
        off = float((found.double() - truth).norm() / truth.norm())
        if not off < 4 * torch.finfo(dtype).eps:  # a NaN is wrong too
            return f"is off by {off:.1e} in {name}"
    return ""


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
