"""What every kind of tokenizer can do, and the one file that keeps it.

Three kinds: Hugging Face tokenizers (data.huggingface_model), sentencepiece and tiktoken. The first has a file format of its
own; the other two are kept in a JSON file of ours, so that a shard set is complete with one tokenizer.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from data.errors import InputError

_KIND = re.compile(rb'\A\s*\{\s*"kind"\s*:\s*"(\w+)"')


class TokenModel(Protocol):
    """Text to ids and back. `special_tokens` are ids that text can never produce, whatever it contains."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Literal -> id."""

    @property
    def size(self) -> int:
        """One more than the largest id."""

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, token_id: int) -> str | None: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, 1-D uint32, without any special id."""

    def decode(self, ids: Sequence[int], show_special: bool) -> str:
        """Text of ids; ids that stand for nothing are left out."""

    def with_special(self, tokens: Iterable[str]) -> TokenModel:
        """The same model with these literals as special tokens; those that it has keep their ids."""

    def to_bytes(self) -> bytes:
        """The file that `read_model` opens again; equal models give equal bytes."""


def read_model(file: Path, pattern: str | None = None) -> TokenModel:
    """Open a tokenizer.json (of Hugging Face or ours), a sentencepiece `.model` or a `.tiktoken` rank file.

    `pattern` belongs to a rank file: a known name or a regular expression. Raises InputError for anything else.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"tokenizer: {file} cannot be read ({error.strerror})") from error
    ours = _KIND.match(content[:200])
    if pattern is not None and file.suffix != ".tiktoken":
        raise InputError(f"tokenizer_pattern: {file} is no .tiktoken file and needs none; leave the option out")
    if file.suffix == ".model":
        from data.sentencepiece_model import SentencePieceModel

        return SentencePieceModel(content, {}, file)
    if file.suffix == ".tiktoken":
        from data.tiktoken_model import read_rank_file

        return read_rank_file(content, pattern, file)
    if ours:
        return _read_wrapper(content, file)
    from data.huggingface_model import HuggingFaceModel

    return HuggingFaceModel.from_bytes(content, file)


def _read_wrapper(content: bytes, file: Path) -> TokenModel:
    def refuse(what: str) -> InputError:
        return InputError(f"tokenizer: {file}: {what}; make the file again with `prepare --tokenizer`")

    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise refuse(f"not JSON ({str(error):.80})") from error
    special = record.get("special_tokens", {})
    if not isinstance(special, dict) or not all(type(i) is int and 0 <= i < 1 << 32 for i in special.values()):
        raise refuse("special_tokens must give an id for every literal")
    if len(set(special.values())) != len(special):
        raise refuse("two special tokens share an id")
    texts = {"sentencepiece": ("model",), "tiktoken": ("ranks", "pattern")}.get(record["kind"])
    if texts is None:
        raise refuse(f"kind {record['kind']!r} is unknown; allowed are sentencepiece and tiktoken")
    for key in texts:
        if not isinstance(record.get(key), str):
            raise refuse(f"{key} must be a string")
    if record["kind"] == "sentencepiece":
        from data.sentencepiece_model import from_wrapper

        return from_wrapper(record["model"], special, file)
    from data.tiktoken_model import TiktokenModel

    return TiktokenModel(record["ranks"].encode(), record["pattern"], special, file)
