"""Tokenizers of the Hugging Face `tokenizers` library: tokenizer.json files, and the byte-level BPE that we train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer

from data import long_text
from data.errors import InputError


class HuggingFaceModel:
    """A `tokenizers.Tokenizer` that reads no special token out of text. Saved truncation and padding are switched off: they
    would cut documents silently."""

    kind = "huggingface"

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.special_tokens: Mapping[str, int] = {
            token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def from_bytes(cls, content: bytes, file: Path) -> HuggingFaceModel:
        try:
            return cls(Tokenizer.from_buffer(content))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise InputError(
                f"tokenizer: {file} is not a tokenizer.json ({' '.join(str(error).split()):.100})"
            ) from error

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.tokenizer.id_to_token(token_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if all(len(text) <= 2 * long_text.PART_CHARS for text in texts):
            return self._encode(texts)
        found = []
        for text in texts:
            pieces = [self._encode([part])[0] for part in long_text.parts(text, self._encode)]
            found.append(np.concatenate(pieces) if len(pieces) > 1 else pieces[0])
        return found

    def decode(self, ids: Sequence[int], show_special: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not show_special)

    def with_special(self, tokens: Iterable[str]) -> HuggingFaceModel:
        copy = Tokenizer.from_buffer(self.to_bytes())
        # Adding a token that exists keeps its id and marks it as special, which is what keeps it out of raw text.
        copy.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        vocabulary = copy.get_vocab(with_added_tokens=True)
        if len(set(vocabulary.values())) != len(vocabulary):
            raise InputError(
                f"two tokens share an id once {', '.join(map(repr, tokens))} are added; its vocabulary has holes"
            )
        return HuggingFaceModel(copy)

    def to_bytes(self) -> bytes:
        return self.tokenizer.to_str(pretty=True).encode("utf-8")

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
