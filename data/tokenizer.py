"""Byte-level BPE: train it, take over an existing tokenizer.json, and turn text into ids and back.

Raw text never yields a special id: a document that contains the characters "<|mask|>" is encoded as those characters.
Only `encode_prompt` reads the mask literal as the mask, for in-filling.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.durable import write_durably
from data.errors import InputError
from data.manifest import SpecialIds

MASK_TOKEN = "<|mask|>"
EOS_TOKEN = "<|endoftext|>"
MASK_NAMES = (MASK_TOKEN, "<|mdm_mask|>", "[MASK]", "<mask>")
EOS_NAMES = (EOS_TOKEN, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
BOS_NAMES = ("<|startoftext|>", "<s>", "<bos>", "<|begin_of_text|>", "[CLS]")
SMALLEST_VOCAB = 256 + 2  # every byte, the mask, the end of text
DEFAULT_TRAIN_BYTES = 32 << 20


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with its special ids and the hash of the file it came from."""

    backend: Tokenizer
    special: SpecialIds
    sha256: str
    path: Path

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, so that every id is a valid row of an embedding even if ids have holes."""
        return _largest_id(self.backend) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, 1-D uint32; no special token is added and none is read out of the text."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids of a text in which the mask token's literal stands for positions to fill in."""
        literal = self.backend.id_to_token(self.special.mask)
        pieces = self.encode_batch(text.split(literal))
        mask = np.array([self.special.mask], dtype=np.uint32)
        return np.concatenate([part for piece in pieces for part in (piece, mask)][:-1])

    def decode(self, ids: Sequence[int] | np.ndarray, show_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 come out as U+FFFD, special tokens only if asked for."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not show_special)


def even_sample(texts: Iterable[str], total_bytes: int, budget_bytes: int) -> Iterator[str]:
    """Whole texts spread evenly over a stream of `total_bytes` UTF-8 bytes, about `budget_bytes` in all.

    A text is taken when what was taken so far lags behind the share that is due; only a text larger than what is left
    of the budget is cut. Depends on the texts and their order alone.
    """
    seen = taken = 0
    for text in texts:
        size = len(text.encode("utf-8"))
        if taken >= budget_bytes:
            return
        if total_bytes <= budget_bytes or taken * total_bytes <= seen * budget_bytes:
            room = budget_bytes - taken
            yield text if size <= room else text.encode("utf-8")[:room].decode("utf-8", errors="ignore")
            taken += min(size, room)
        seen += size


def train_bpe(texts: Iterable[str], vocab_size: int, *, eos_token: str = EOS_TOKEN) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` entries, the mask (id 0) and the end of text (id 1) included.

    All 256 bytes are in the vocabulary, so every text comes back exactly. Little text gives a smaller vocabulary.
    Raises InputError when `vocab_size` cannot hold the bytes and the two special tokens.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise InputError(
            f"vocab_size: {vocab_size} is too small; {SMALLEST_VOCAB} hold just the bytes, the mask and the end of text"
        )
    if eos_token == MASK_TOKEN:
        raise InputError(f"eos_token: {eos_token!r} is the mask token; name another one")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[MASK_TOKEN, eos_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def adopt_tokenizer(path: str | os.PathLike[str], *, eos_token: str | None = None) -> Tokenizer:
    """Load an existing tokenizer.json (or the folder that holds one) and give it a mask and an end of text if it
    lacks them.

    Truncation and padding saved in the file are switched off: they would cut documents silently.
    Raises InputError when the file is missing or is no tokenizer, or when two tokens share an id.
    """
    tokenizer = _read_backend(_tokenizer_file(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    eos = eos_token or _first_present(tokenizer, EOS_NAMES) or EOS_TOKEN
    mask = _first_present(tokenizer, [name for name in MASK_NAMES if name != eos]) or MASK_TOKEN
    if eos == mask:
        raise InputError(f"eos_token: {eos!r} is the mask token; name another one")
    bos = _first_present(tokenizer, [name for name in BOS_NAMES if name not in (eos, mask)])
    # Adding a token that exists keeps its id and marks it as special, which is what keeps it out of raw text.
    names = [name for name in (mask, eos, bos) if name is not None]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if len(set(vocabulary.values())) != len(vocabulary):
        raise InputError(
            f"tokenizer: in {path} two tokens share an id once {mask!r} and {eos!r} are added; its vocabulary has holes"
        )
    return tokenizer


def prepare_tokenizer(
    out_path: str | os.PathLike[str],
    existing: str | os.PathLike[str] | None = None,
    *,
    texts: Iterable[str] = (),
    vocab_size: int = 32768,
    eos_token: str | None = None,
) -> TextTokenizer:
    """Write the tokenizer.json that a shard set will use, in one step, and open it.

    Takes over `existing` when given (then `texts` and `vocab_size` are not used), else trains on `texts`.
    """
    if existing is None:
        backend = train_bpe(texts, vocab_size, eos_token=eos_token or EOS_TOKEN)
    else:
        backend = adopt_tokenizer(existing, eos_token=eos_token)
    special = find_special_ids(backend, str(existing or out_path), eos_token)
    write_durably(Path(out_path), backend.to_str(pretty=True).encode("utf-8"))
    return load_tokenizer(out_path, special=special)


def load_tokenizer(
    path: str | os.PathLike[str], special: SpecialIds | None = None, *, eos_token: str | None = None
) -> TextTokenizer:
    """Open a tokenizer.json for encoding.

    `special` comes from the manifest of a shard set. Without one the ids are found by the usual names, or `eos_token`.

    Raises InputError when the file is missing or damaged, a special id is not in it, the usual names are not in it,
    or when raw text could still produce a special id.
    """
    file = _tokenizer_file(path)
    backend = _read_backend(file)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
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


def find_special_ids(backend: Tokenizer, where: str, eos_token: str | None = None) -> SpecialIds:
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


def _refuse_special_ids_from_text(tokenizer: TextTokenizer) -> None:
    special = {i for i in (tokenizer.special.mask, tokenizer.special.eos, tokenizer.special.bos) if i is not None}
    for token_id in sorted(special):
        literal = tokenizer.backend.id_to_token(token_id) or ""
        for ids in tokenizer.encode_batch([literal, f"a{literal}b {literal}"]):
            if special & set(ids.tolist()):
                raise InputError(
                    f"tokenizer: {tokenizer.path} turns the plain text {literal!r} into a special id; use another one"
                )


def _tokenizer_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"tokenizer: {file} does not exist; give a tokenizer.json, or leave it out to train one")
    return file


def _read_backend(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise InputError(f"tokenizer: {file} is not a tokenizer.json ({str(error):.100})") from error


def _first_present(backend: Tokenizer, names: Iterable[str]) -> str | None:
    return next((name for name in names if backend.token_to_id(name) is not None), None)


def _largest_id(backend: Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values())
