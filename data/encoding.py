"""Documents to token ids: special ids from templates alone, spans for what carries no loss, long documents cut or left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Optional

import numpy as np

from data.document import Segment
from data.manifest import token_dtype
from data.shard_writer import NO_SPANS, clip_spans
from data.tokenizer import TextTokenizer

DROP_REASONS = TOO_LONG, TOO_LONG_PROMPT = ("too_long", "too_long_prompt")


class Limit(NamedTuple):
    """Documents of more than `tokens` tokens: cut short, left out, or kept whole here and split by the writer."""

    tokens: int
    policy: Literal["split", "truncate", "drop"]


class Encoded(NamedTuple):
    """A document as the writer takes it, or the reason (`dropped`) why it is left out.

    kept_bytes: UTF-8 bytes of what is left of a text that was cut short; None if nothing was cut.
    """

    tokens: np.ndarray
    spans: np.ndarray
    kept_bytes: Optional[int] = None
    dropped: Optional[str] = None


def encode_documents(
    tokenizer: TextTokenizer, documents: Sequence[Sequence[Segment]], limit: Optional[Limit] = None
) -> list[Encoded]:
    """Ids of each document with EOS at the end, in the narrowest type that holds the vocabulary, and its spans.

    Neighbouring text of one kind is encoded together, as a sampler would encode the whole prompt; nothing is encoded
    across the border of a prompt or condition.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    plans = [_plan(tokenizer, segments) for segments in documents]
    texts = [part for plan in plans for part, _ in plan if isinstance(part, str)]
    ids = iter(tokenizer.encode_batch(texts))
    found = []
    for plan in plans:
        parts = [[part] if isinstance(part, int) else next(ids) for part, _ in plan]
        lengths = [len(part) for part in parts]
        tokens = np.empty(sum(lengths) + 1, dtype)
        start = 0
        for part, length in zip(parts, lengths, strict=True):
            tokens[start : start + length] = part
            start += length
        tokens[-1] = tokenizer.special.eos
        encoded = Encoded(tokens, _spans([kind for _, kind in plan], lengths))
        found.append(_limited(tokenizer, encoded, limit) if limit and len(tokens) > limit.tokens else encoded)
    return found


def _plan(tokenizer: TextTokenizer, segments: Sequence[Segment]) -> list[tuple[str | int, Optional[int]]]:
    """What to encode and the ids that a template fixes, each with its span kind."""
    if len(segments) == 1 and segments[0].plain:
        return [(segments[0].text, None)]
    plan: list[tuple[str | int, Optional[int]]] = []
    for text, kind, template in segments:
        for part in tokenizer.split_special(text) if template else [text]:
            if isinstance(part, str) and plan and isinstance(plan[-1][0], str) and plan[-1][1] == kind:
                plan[-1] = (plan[-1][0] + part, kind)
            else:
                plan.append((part, kind))
    return plan


def _spans(kinds: Sequence[Optional[int]], lengths: Sequence[int]) -> np.ndarray:
    """int32 [k, 3] (start, length, kind) of the stretches with a kind; neighbours of one kind are one span."""
    spans: list[list[int]] = []
    start = 0
    for kind, length in zip(kinds, lengths, strict=True):
        if kind is not None and length:
            if spans and spans[-1][2] == kind and sum(spans[-1][:2]) == start:
                spans[-1][1] += length
            else:
                spans.append([start, length, kind])
        start += length
    return np.array(spans, np.int32) if spans else NO_SPANS


def _limited(tokenizer: TextTokenizer, encoded: Encoded, limit: Limit) -> Encoded:
    if limit.policy == "split":
        return encoded
    if limit.policy == "drop":
        return encoded._replace(tokens=encoded.tokens[:0], spans=NO_SPANS, dropped=TOO_LONG)
    tokens, spans = encoded.tokens[: limit.tokens], clip_spans(encoded.spans, 0, limit.tokens)
    if int(spans[:, 1].sum()) == limit.tokens:
        return encoded._replace(tokens=tokens[:0], spans=NO_SPANS, dropped=TOO_LONG_PROMPT)
    return Encoded(tokens, spans, kept_bytes=len(tokenizer.decode(tokens, show_special=True).encode("utf-8")))
