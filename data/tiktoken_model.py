"""Tiktoken rank files behind the same interface. Text comes back exactly, byte for byte."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import regex
import tiktoken

from data.errors import InputError
from data.token_wrapper import wrapper_bytes

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Source of gpt2, cl100k and o200k: tiktoken's openai_public.py; qwen: Qwen's tokenization_qwen.py.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",
    "qwen": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}",
}
# sha256 of a published rank file -> its pattern and its special tokens at their published ids.
KNOWN_FILES: dict[str, tuple[str, dict[str, int]]] = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": ("gpt2", {"<|endoftext|>": 50256}),  # r50k_base
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": ("gpt2", {"<|endoftext|>": 50256}),  # p50k_base
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": (  # cl100k_base
        "cl100k",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": (  # o200k_base
        "o200k",
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": (  # qwen
        "qwen",
        {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    ),
}


class TiktokenModel:
    """Ranks (the text of a .tiktoken file: base64 and rank a line), a pattern, and special tokens at ids of their own."""

    kind = "tiktoken"

    def __init__(self, ranks: bytes, pattern: str, special_tokens: Mapping[str, int], file: Path) -> None:
        self.ranks, self.pattern, self.file = ranks, pattern, file
        self.special_tokens = dict(special_tokens)
        mergeable = _parse(ranks, file)
        self._bytes_of = {rank: token for token, rank in mergeable.items()}
        taken = next((name for name, i in self.special_tokens.items() if i in self._bytes_of), None)
        if taken is not None:
            raise InputError(f"tokenizer: {file}: the id of the special token {taken!r} belongs to a rank as well")
        try:
            self.encoding = tiktoken.Encoding(
                file.name, pat_str=pattern, mergeable_ranks=mergeable, special_tokens=self.special_tokens
            )
            self._split = regex.compile(pattern)
        except (ValueError, regex.error) as error:
            raise InputError(
                f"tokenizer: {file}: the pattern is no regular expression ({' '.join(str(error).split()):.100})"
            ) from error
        self._names = {token_id: name for name, token_id in self.special_tokens.items()}
        self.size = max((*self._bytes_of, *self._names)) + 1

    def token_to_id(self, token: str) -> int | None:
        return self.special_tokens.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self._names:
            return self._names[token_id]
        token = self._bytes_of.get(token_id)
        return None if token is None else token.decode("utf-8", errors="replace")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def decode(self, ids: Sequence[int], show_special: bool) -> str:
        shown = (
            self._names[i].encode() if show_special and i in self._names else self._bytes_of.get(i, b"") for i in ids
        )
        return b"".join(shown).decode("utf-8", errors="replace")

    def with_special(self, tokens: Iterable[str]) -> TiktokenModel:
        special = dict(self.special_tokens)
        for token in tokens:
            special.setdefault(token, max((*self._bytes_of, *special.values())) + 1)
        return TiktokenModel(self.ranks, self.pattern, special, self.file)

    def to_bytes(self) -> bytes:
        fields = {"pattern": self.pattern, "ranks": self.ranks.decode("ascii")}
        return wrapper_bytes(self.kind, fields, self.special_tokens)

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # Its regular expressions give up on a hundred thousand spaces in a row. Another library does not.
            found: list[int] = []
            for piece in self._split.finditer(text):
                found.extend(self.encoding._encode_single_piece(piece[0].encode()))
            return np.array(found, dtype=np.uint32)


def read_rank_file(content: bytes, pattern: str | None, file: Path) -> TiktokenModel:
    """Open a .tiktoken file. A published one is known by its hash; any other needs a pattern: a known name or an expression.

    Raises InputError when the pattern is not said or the file holds no ranks.
    """
    known = KNOWN_FILES.get(hashlib.sha256(content).hexdigest())
    if known is None and pattern is None:
        raise InputError(
            f"tokenizer_pattern: {file} is not a rank file known here, so its pattern must be given:"
            f" {', '.join(PATTERNS)} or a regular expression"
        )
    chosen = pattern if pattern is not None else known[0] if known else ""
    ranks = b"".join(line.strip() + b"\n" for line in content.splitlines() if line.strip())
    return TiktokenModel(ranks, PATTERNS.get(chosen, chosen), known[1] if known else {}, file)


def _parse(ranks: bytes, file: Path) -> dict[bytes, int]:
    parsed: dict[bytes, int] = {}
    for number, line in enumerate(ranks.splitlines(), start=1):
        try:
            token, rank = line.split()
            parsed[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"tokenizer: {file} is no rank file: line {number} is not `base64 rank`") from None
    if len(set(parsed.values())) != len(parsed) or min(parsed.values(), default=-1) < 0:
        raise InputError(
            f"tokenizer: {file} is no rank file: it is empty, or two lines share a rank or have one below 0"
        )
    if lacking := [byte for byte in range(256) if bytes([byte]) not in parsed]:
        raise InputError(f"tokenizer: {file}: no rank for the byte {lacking[0]}, so not every text could be encoded")
    return parsed
