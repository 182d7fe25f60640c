"""Turn text into ids and back, with a tokenizer of any kind: train one, take one over, open the one of a shard set.

Raw text never yields a special id: a document that contains the characters "<|mask|>" is encoded as those characters.
Only `encode_prompt` reads the mask literal as the mask, for in-filling, and `encode_template` the literals of a template.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from data.durable import write_durably
from data.errors import InputError
from data.huggingface_model import HuggingFaceModel
from data.manifest import TOKENIZER_FILE, SpecialIds
from data.token_model import TokenModel, read_model
from data.token_names import BOS_NAMES, EOS_NAMES, EOS_TOKEN, MASK_NAMES, MASK_TOKEN, UNKNOWN_NAMES
from data.tokenizer_training import train_bpe

TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer.model", "*.tiktoken")  # looked for in a folder, in this order


class Names(Protocol):
    def token_to_id(self, token: str) -> int | None: ...


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with its special ids and the hash of the file it came from."""

    backend: TokenModel
    special: SpecialIds
    sha256: str
    path: Path

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, so that every id is a valid row of an embedding even if ids have holes."""
        return self.backend.size

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, 1-D uint32; no special token is added and none is read out of the text."""
        return self.backend.encode_batch(texts)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids of a text in which the mask token's literal stands for positions to fill in."""
        literal = self.backend.id_to_token(self.special.mask)
        assert literal is not None, "load_tokenizer checked it"
        pieces = self.encode_batch(text.split(literal))
        mask = np.array([self.special.mask], dtype=np.uint32)
        return np.concatenate([part for piece in pieces for part in (piece, mask)][:-1])

    def split_special(self, text: str) -> list[str | int]:
        """A template's text cut at the literals of special tokens, these as their ids; the longest literal wins."""
        cut = self._special_literal.split(text)
        return [self.backend.special_tokens[part] if at % 2 else part for at, part in enumerate(cut) if part]

    @cached_property
    def _special_literal(self) -> re.Pattern[str]:
        literals = sorted(self.backend.special_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, literals)) + ")")

    def decode(self, ids: Sequence[int] | np.ndarray, show_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 come out as U+FFFD, special tokens only if asked for."""
        return self.backend.decode([int(i) for i in ids], show_special)


def adopt_tokenizer(
    path: str | os.PathLike[str],
    *,
    eos_token: str | None = None,
    pattern: str | None = None,
    more_special: Sequence[str] = (),
) -> TokenModel:
    """Open an existing tokenizer of any kind (`read_model`; or the folder that holds one) and give it a mask, an end of text
    and `more_special` where it lacks them.

    Raises InputError when the file is missing or is no tokenizer, or when two tokens share an id.
    """
    model = read_model(tokenizer_file(path), pattern)
    eos = eos_token or _first_present(model, EOS_NAMES) or EOS_TOKEN
    mask = _first_present(model, [name for name in MASK_NAMES if name != eos]) or MASK_TOKEN
    if eos == mask:
        raise InputError(f"eos_token: {eos!r} is the mask token; name another one")
    bos = _first_present(model, [name for name in BOS_NAMES if name not in (eos, mask)])
    names = dict.fromkeys(name for name in (mask, eos, bos, *more_special) if name is not None)
    try:
        return model.with_special(names)
    except InputError as error:
        raise InputError(f"tokenizer: in {path} {error}") from error


def prepare_tokenizer(
    out_path: str | os.PathLike[str],
    existing: str | os.PathLike[str] | None = None,
    *,
    texts: Iterable[str] = (),
    vocab_size: int = 32768,
    eos_token: str | None = None,
    pattern: str | None = None,
    more_special: Sequence[str] = (),
) -> TextTokenizer:
    """Write the tokenizer.json that a shard set will use, in one step, and open it.

    Takes over `existing` when given (then `texts` and `vocab_size` are not used), else trains on `texts`. `more_special`:
    literals of a chat template that get ids of their own.
    """
    backend: TokenModel
    if existing is None:
        backend = HuggingFaceModel(
            train_bpe(texts, vocab_size, eos_token=eos_token or EOS_TOKEN, more_special=more_special)
        )
    else:
        backend = adopt_tokenizer(existing, eos_token=eos_token, pattern=pattern, more_special=more_special)
    special = find_special_ids(backend, str(existing or out_path), eos_token)
    write_durably(Path(out_path), backend.to_bytes())
    return load_tokenizer(out_path, special=special)


def load_tokenizer(
    path: str | os.PathLike[str], special: SpecialIds | None = None, *, eos_token: str | None = None
) -> TextTokenizer:
    """Open a tokenizer file for encoding; its kind is read from it.

    `special` comes from the manifest of a shard set. Without one the ids are found by the usual names, or `eos_token`.

    Raises InputError when the file is missing or damaged, a special id is not in it, the usual names are not in it,
    or when raw text could still produce a special id.
    """
    file = tokenizer_file(path)
    backend = read_model(file)
    special = special or find_special_ids(backend, str(file), eos_token)
    for name in ("mask", "eos", "pad", "bos"):
        token_id = getattr(special, name)
        if token_id is not None and backend.id_to_token(token_id) is None:
            raise InputError(
                f"tokenizer: {file} has no token with the {name} id {token_id}; it belongs to another shard set"
            )
    tokenizer = TextTokenizer(backend, special, hashlib.sha256(file.read_bytes()).hexdigest(), file)
    _refuse_special_ids_from_text(tokenizer)
    return tokenizer


def find_special_ids(backend: Names, where: str, eos_token: str | None = None) -> SpecialIds:
    """Special ids by the usual names; `pad` is `eos`. Raises InputError when mask or end of text is not found."""
    eos = eos_token or _first_present(backend, EOS_NAMES)
    mask = _first_present(backend, [name for name in MASK_NAMES if name != eos])
    bos = _first_present(backend, [name for name in BOS_NAMES if name not in (eos, mask)])
    if mask is None or eos is None or backend.token_to_id(eos) is None:
        lacking, names = ("mask", MASK_NAMES) if mask is None else ("end-of-text", EOS_NAMES)
        raise InputError(
            f"tokenizer: {where} has no {lacking} token ({', '.join(names)}); `prepare --tokenizer` adds it to a copy"
        )
    mask_id, eos_id = backend.token_to_id(mask), backend.token_to_id(eos)
    assert mask_id is not None and eos_id is not None
    return SpecialIds(mask_id, eos_id, eos_id, None if bos is None else backend.token_to_id(bos))


def tokenizer_file(path: str | os.PathLike[str]) -> Path:
    """The tokenizer file that a path names, or that lies in the folder it names. Raises InputError when there is none."""
    file = Path(path)
    if file.is_dir():
        found = [match for name in TOKENIZER_FILES for match in sorted(file.glob(name))]
        file = found[0] if found else file / TOKENIZER_FILE
    if not file.is_file():
        raise InputError(
            f"tokenizer: {file} does not exist; give a tokenizer.json, a sentencepiece .model or a .tiktoken file"
        )
    return file


def _refuse_special_ids_from_text(tokenizer: TextTokenizer) -> None:
    """Try every special literal. The unknown token is the one that text may yield."""
    core = {i for i in (tokenizer.special.mask, tokenizer.special.eos, tokenizer.special.bos) if i is not None}
    others = {i for token, i in tokenizer.backend.special_tokens.items() if token not in UNKNOWN_NAMES}
    special = core | others
    for literal in sorted({tokenizer.backend.id_to_token(i) or "" for i in special}):
        for ids in tokenizer.encode_batch([literal, f"a{literal}b {literal}"]):
            if special & set(ids.tolist()):
                raise InputError(
                    f"tokenizer: {tokenizer.path} turns the plain text {literal!r} into a special id; use another one"
                )


def _first_present(backend: Names, names: Iterable[str]) -> str | None:
    return next((name for name in names if backend.token_to_id(name) is not None), None)
