"""Sentencepiece models behind the same interface.

What is guaranteed: no special id out of text, and ids equal to the library's own. Text comes back as the model normalises
it: exactly, if the model has the identity normaliser, keeps white space and has byte fallback, but for U+2581, which
sentencepiece uses for the space; without byte fallback unknown characters become the unknown token.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as protocol

from data import long_text
from data.errors import InputError
from data.token_wrapper import wrapper_bytes

SPACE = "▁"  # U+2581


class SentencePieceModel:
    """A sentencepiece model with special tokens added behind its pieces."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, added: Mapping[str, int], file: Path) -> None:
        self.model, self.added, self.file = model, dict(added), file
        self.processor = _processor(model, file)
        self.pieces = self.processor.get_piece_size()
        if sorted(self.added.values()) != list(range(self.pieces, self.pieces + len(self.added))):
            raise InputError(f"tokenizer: {file}: ids of special tokens must follow the model's {self.pieces} pieces")
        self._added_names = {token_id: token for token, token_id in self.added.items()}
        controls = {self.processor.id_to_piece(i): i for i in range(self.pieces) if self.processor.is_control(i)}
        self.special_tokens: Mapping[str, int] = controls | self.added
        self._special_ids = frozenset(self.special_tokens.values())
        self._normalised: sentencepiece.SentencePieceProcessor | None = None

    @property
    def size(self) -> int:
        return self.pieces + len(self.added)

    def token_to_id(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]
        token_id = self.processor.piece_to_id(token)  # the unknown id, for what it does not know
        return token_id if self.processor.id_to_piece(token_id) == token else None

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self._added_names:
            return self._added_names[token_id]
        return self.processor.id_to_piece(token_id) if 0 <= token_id < self.pieces else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if all(len(text) <= 2 * long_text.PART_CHARS for text in texts):
            return [np.array(ids, dtype=np.uint32) for ids in self.processor.encode(list(texts), num_threads=1)]
        return [np.concatenate([*self._encode_parts(text), np.zeros(0, np.uint32)]) for text in texts]

    def decode(self, ids: Sequence[int], show_special: bool) -> str:
        known = [i for i in ids if 0 <= i < self.size]
        if not show_special:
            return self.processor.decode([i for i in known if i not in self._special_ids])
        shown = []
        for special, group in itertools.groupby(known, self._special_ids.__contains__):
            run = list(group)
            shown.append("".join(self.id_to_token(i) or "" for i in run) if special else self.processor.decode(run))
        return "".join(shown)

    def with_special(self, tokens: Iterable[str]) -> SentencePieceModel:
        """Pieces of these names become control pieces, which the library never reads out of text; others are added."""
        proto = _parse(self.model, self.file)
        by_name = {piece.piece: piece for piece in proto.pieces}
        added, changed = dict(self.added), False
        for token in tokens:
            piece = by_name.get(token)
            if piece is None:
                added.setdefault(token, self.pieces + len(added))
            elif piece.type in (piece.UNKNOWN, piece.BYTE):
                raise InputError(f"{token!r} stands for unknown text in this model; name another token")
            elif piece.type != piece.CONTROL:
                piece.type, changed = piece.CONTROL, True
        return SentencePieceModel(proto.SerializeToString() if changed else self.model, added, self.file)

    def to_bytes(self) -> bytes:
        return wrapper_bytes(self.kind, {"model": base64.b64encode(self.model).decode()}, self.added)

    def _encode_parts(self, text: str) -> Iterator[np.ndarray]:
        """Normalise the whole, then encode parts that begin with a space: no piece reaches over such a cut."""
        if self._normalised is None:
            self._normalised = _without_normaliser(self.model, self.file)
        if self._normalised is None:  # the model has pieces that reach over spaces
            yield np.array(self.processor.encode(text), dtype=np.uint32)
            return
        text, start = self.processor.normalize(text), 0
        while len(text) - start > 2 * long_text.PART_CHARS:
            cut = text.find(SPACE, start + long_text.PART_CHARS)
            while cut > 0 and text[cut - 1] == SPACE:
                cut = text.find(SPACE, cut + 1)
            if cut < 0:
                break
            yield np.array(self._normalised.encode(text[start:cut]), dtype=np.uint32)
            start = cut
        yield np.array(self._normalised.encode(text[start:]), dtype=np.uint32)


def from_wrapper(model: str, special_tokens: Mapping[str, int], file: Path) -> SentencePieceModel:
    """Open the model that our own tokenizer.json holds."""
    try:
        content = base64.b64decode(model, validate=True)
    except binascii.Error as error:
        raise InputError(f"tokenizer: {file}: model is not base64 ({error})") from error
    return SentencePieceModel(content, special_tokens, file)


def _without_normaliser(model: bytes, file: Path) -> sentencepiece.SentencePieceProcessor | None:
    proto = _parse(model, file)
    if any(SPACE in piece.piece.lstrip(SPACE) for piece in proto.pieces):
        return None
    spec = proto.normalizer_spec
    spec.name, spec.precompiled_charsmap = "identity", b""
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
    return _processor(proto.SerializeToString(), file)


def _processor(model: bytes, file: Path) -> sentencepiece.SentencePieceProcessor:
    _parse(model, file)  # the library crashes on some damaged files that this refuses
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"tokenizer: {file} is not a sentencepiece model ({' '.join(str(error).split()):.100})"
        ) from error


def _parse(model: bytes, file: Path) -> Any:
    try:
        proto = protocol.ModelProto.FromString(model)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise InputError(f"tokenizer: {file} is not a sentencepiece model ({str(error):.100})") from error
    if not proto.pieces:
        raise InputError(f"tokenizer: {file} is not a sentencepiece model (it has no pieces)")
    return proto
