"""How many bytes of text tokens stand for, exactly, also where a cut goes through a character."""

from __future__ import annotations

import json
import re

import numpy as np

from data.errors import InputError
from data.huggingface_model import HuggingFaceModel
from data.tiktoken_model import TiktokenModel
from data.tokenizer import TextTokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BROKEN = "\ufffd"


class TokenBytes:
    """UTF-8 bytes of each id of a tokenizer: at the start of a text and inside one.

    The two differ where a tokenizer puts a space before every text that is not in it (sentencepiece). Special tokens, end-of-text
    among them, stand for no text. The sum over a text's tokens is the length of what they decode to, which is the text itself
    unless its tokenizer changes texts.
    """

    def __init__(self, tokenizer: TextTokenizer):
        model, special = tokenizer.backend, tokenizer.special
        size = tokenizer.vocab_size
        self.special = np.zeros(size, bool)
        ids = (special.mask, special.eos, special.pad, special.bos, *model.special_tokens.values())
        self.special[[i for i in ids if i is not None]] = True
        self.inside = np.zeros(size, np.int64)
        self.at_start = np.zeros(size, np.int64)
        ordinary = np.flatnonzero(~self.special).tolist()
        if isinstance(model, TiktokenModel):
            known = [i for i in ordinary if model.id_to_token(i) is not None]
            self.inside[known] = [len(model.encoding.decode_single_token_bytes(i)) for i in known]
        elif isinstance(model, HuggingFaceModel) and _of_bytes(model):
            added = model.tokenizer.get_added_tokens_decoder()
            for i in ordinary:
                token = model.id_to_token(i) or ""
                self.inside[i] = len(token.encode()) if i in added else len(token)  # one character a byte
        else:
            self._by_decoding(tokenizer, ordinary)
            return
        self.at_start = self.inside

    def count(self, tokens: np.ndarray, counted: np.ndarray, prompt: np.ndarray | None, before: int | None) -> int:
        """Bytes of the tokens [L] where `counted` ([L] bool).

        prompt: [L] bool or None; a text begins at its borders, as in data.encoding. before: the token before the first one; None:
        there is none.
        """
        if self.at_start is self.inside:
            return int(self.inside[tokens[counted]].sum())
        starts = np.zeros(len(tokens), bool)
        starts[0] = before is None or bool(self.special[before])
        starts[1:] = self.special[tokens[:-1]]
        if prompt is not None:
            starts[1:] |= prompt[1:] != prompt[:-1]
        return int(np.where(starts, self.at_start[tokens], self.inside[tokens])[counted].sum())

    def _by_decoding(self, tokenizer: TextTokenizer, ids: list[int]) -> None:
        """What decoding a token alone gives, and what it adds behind another one."""
        first = tokenizer.encode_batch(["a"])[0]
        alone = len(tokenizer.decode(first).encode())
        for i in ids:
            piece = tokenizer.backend.id_to_token(i) or ""
            if _BYTE_PIECE.fullmatch(piece):
                self.inside[i] = self.at_start[i] = 1
                continue
            text, behind = tokenizer.decode([i]), tokenizer.decode([*first, i])
            if _BROKEN in behind and _BROKEN not in piece:
                raise InputError(
                    f"tokenizer: {tokenizer.path}: the bytes of token {i} ({piece!r}) cannot be told, so bits per byte are not "
                    "available"
                )
            self.at_start[i] = len(text.encode())
            self.inside[i] = len(behind.encode()) - alone


def _of_bytes(model: HuggingFaceModel) -> bool:
    """Whether tokens are strings of GPT-2's 256 characters that stand for bytes."""
    decoder = json.loads(model.tokenizer.to_str()).get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return [step.get("type") for step in steps] == ["ByteLevel"]
