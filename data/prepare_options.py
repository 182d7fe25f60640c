"""What `prepare` can be told, and what it tells when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data.errors import InputError
from data.progress import duration
from data.tokenizer import DEFAULT_TRAIN_BYTES, MASK_TOKEN, SMALLEST_VOCAB


@dataclass
class PrepareOptions:
    """Text to tokenizer and shards.

    Args:
        out: Folder to write; it will hold train/ and val/, each complete in itself.
        inputs: Files (.txt, .md, .py, .jsonl, .jsonl.gz, .jsonl.zst) and folders to read.
        source: "stdlib" reads the running Python's own standard library, which needs no download.
        tokenizer: An existing tokenizer.json (or its folder) to use; left out, one is trained.
        vocab_size: Entries of a tokenizer to train, special tokens included.
        train_bytes: Bytes of text to train the tokenizer on, taken evenly over the documents.
        val_fraction: Share of documents held out for validation, chosen by name and seed; 0 makes no val/.
        shard_tokens: Tokens after which a new tar begins.
        chunk_tokens: Tokens after which a new chunk begins inside a tar.
        processes: Processes that encode; 0 takes all cores. Does not change the output.
        text_field: Field of a .jsonl line that holds the text.
        eos_token: Name of the end-of-text token, if it is none of the usual ones.
        licence: Licence to record for the inputs.
        limit_bytes: Stop after this much text, for a quick try.
        seed: Chooses which documents are held out.
    """

    out: str
    inputs: list[str] = field(default_factory=list)
    source: Literal["stdlib"] | None = None
    tokenizer: str | None = None
    vocab_size: int = 32768
    train_bytes: int = DEFAULT_TRAIN_BYTES
    val_fraction: float = 0.01
    shard_tokens: int = 64 * 65536
    chunk_tokens: int = 65536
    processes: int = 0
    text_field: str = "text"
    eos_token: str | None = None
    licence: str = "unspecified"
    limit_bytes: int | None = None
    seed: int = 0


def check_options(options: PrepareOptions) -> None:
    """Raise InputError for the first option whose value cannot work."""
    least = {
        "vocab_size": SMALLEST_VOCAB,
        "train_bytes": 1,
        "shard_tokens": 1,
        "chunk_tokens": 1,
        "processes": 0,
        "limit_bytes": 1,
    }
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise InputError(f"{name}: {value} is too small; allowed is {smallest} or more")
    if not 0 <= options.val_fraction < 1:
        raise InputError(
            f"val_fraction: {options.val_fraction} is outside [0, 1); 0.01 holds out one document in a hundred"
        )
    if options.eos_token in ("", MASK_TOKEN):
        raise InputError(f"eos_token: {options.eos_token!r} cannot end a text; name another token")
    if options.chunk_tokens > 1 << 30:
        raise InputError(f"chunk_tokens: {options.chunk_tokens} is too large; allowed is up to {1 << 30}")


@dataclass(frozen=True)
class SetReport:
    """One published set."""

    folder: Path
    documents: int
    tokens: int
    utf8_bytes: int
    shards: int


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` made or found; `resumed_shards` were finished by an earlier, interrupted run."""

    sets: dict[str, SetReport]
    vocab_size: int
    skipped: dict[str, int]
    seconds: float
    resumed_shards: int = 0
    already_complete: bool = False

    def lines(self) -> list[str]:
        """The report for a person, a line for each set and one for what was left out."""
        lines = [
            f"{name}: {s.documents:,} documents, {s.tokens:,} tokens ({s.utf8_bytes / s.tokens:.2f} bytes each) in"
            f" {s.shards} shard{'s' if s.shards > 1 else ''} at {s.folder}"
            for name, s in self.sets.items()
        ]
        if self.skipped:
            lines.append("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items()))
        done = (
            "nothing to do, it was complete already" if self.already_complete else f"done in {duration(self.seconds)}"
        )
        return [*lines, f"{done}; vocabulary {self.vocab_size:,}"]
