"""Small tokenizers of every kind, made here: no download."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.data.small_corpus import make_text


def sentences(count: int = 60) -> list[str]:
    rng = np.random.default_rng(11)
    return [line for _ in range(count) for line in make_text(rng, 30).split("\n") if line.strip()]


def sentencepiece_file(path: Path, *, model_type: str = "bpe", plain: bool = True, **options: object) -> Path:
    """`plain`: the normaliser changes nothing and unknown characters fall back to bytes."""
    if plain:
        options = {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "byte_fallback": True,
            "allow_whitespace_only_pieces": True,  # as Llama's: a run of spaces is a piece, so no cut may fall into one
        } | options
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences(), *("  x    y" * 30 for _ in range(40 * plain))]),
        model_writer=written,
        model_type=model_type,
        vocab_size=400 if plain else 90,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(written.getvalue())
    return path


def rank_file(path: Path, merges: int = 60) -> Path:
    """A tiktoken rank file from a byte-level BPE of the tokenizers library: bytes first, then the merged ones in their order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(), trainer)
    byte_of = _bytes_of_unicode()
    tokens = [bytes([byte]) for byte in range(256)]
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if len(token) > 1:
            tokens.append(bytes(byte_of[character] for character in token))
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def _bytes_of_unicode() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
