"""Train a byte-level BPE on an even sample of the texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.errors import InputError
from data.token_names import EOS_TOKEN, MASK_TOKEN

SMALLEST_VOCAB = 256 + 2  # every byte, the mask, the end of text
DEFAULT_TRAIN_BYTES = 32 << 20


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


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, eos_token: str = EOS_TOKEN, more_special: Sequence[str] = ()
) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` entries: mask (id 0), end of text (id 1) and `more_special` included.

    All 256 bytes are in the vocabulary, so every text comes back exactly. Little text gives a smaller vocabulary.
    Raises InputError when `vocab_size` cannot hold the bytes and the special tokens.
    """
    special = list(dict.fromkeys([MASK_TOKEN, eos_token, *more_special]))
    if vocab_size < 256 + len(special):
        raise InputError(
            f"vocab_size: {vocab_size} is too small; {256 + len(special)} hold just the bytes and the special tokens"
        )
    if eos_token == MASK_TOKEN:
        raise InputError(f"eos_token: {eos_token!r} is the mask token; name another one")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
