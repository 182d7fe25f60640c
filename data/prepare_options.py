"""What `prepare` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data.chat import load_template
from data.encoding import Limit
from data.errors import InputError
from data.records import RecordFormat
from data.token_names import MASK_TOKEN
from data.tokenizer_training import DEFAULT_TRAIN_BYTES, SMALLEST_VOCAB


@dataclass
class PrepareOptions:
    """Text to tokenizer and shards.

    Args:
        out: Folder to write; it will hold train/ and val/, each complete in itself.
        inputs: Files (.txt, .md, .py, .jsonl, .jsonl.gz, .jsonl.zst, .parquet) and folders to read.
        source: "stdlib" reads the running Python's own standard library, which needs no download.
        tokenizer: An existing tokenizer.json, sentencepiece .model or .tiktoken file (or its folder) to use; left out, one is
            trained.
        tokenizer_pattern: How a .tiktoken file that is not a published one cuts text: gpt2, cl100k, o200k, qwen or a regular
            expression.
        vocab_size: Entries of a tokenizer to train, special tokens included.
        train_bytes: Bytes of text to train the tokenizer on, taken evenly over the documents.
        val_fraction: Share of documents held out for validation, chosen by name and seed; 0 makes no val/.
        shard_tokens: Tokens after which a new tar begins.
        chunk_tokens: Tokens after which a new chunk begins inside a tar.
        processes: Processes that encode; 0 takes all cores. Does not change the output.
        text_field: Field of a .jsonl line or .parquet row that holds the text.
        chat: Read conversations instead of text, written with this template: llada, chatml or a JSON file.
        chat_field: Field that holds the conversation, a list of {role, content}.
        chat_turns: "each" makes a document of every answer with all before it as its prompt, "all" one document of the whole
            conversation with loss on every answer.
        condition_fields: Fields, separated by commas, that are put before the text as conditions, such as title,source.
        max_document_tokens: Documents with more tokens are long; 0 sets no limit (rows always do).
        long_documents: What is done with long documents: cut off at the limit, split into several, or left out. All are counted.
        row_tokens: Lay documents out in rows of this many tokens, none across a row's end; 0 lays them end to end.
        row_packing: "fill" puts as many documents as fit into a row, "one" a single one.
        eos_token: Name of the end-of-text token, if it is none of the usual ones.
        licence: Licence to record for the inputs.
        limit_bytes: Stop after this much text, for a quick try.
        seed: Chooses which documents are held out.
    """

    out: str
    inputs: list[str] = field(default_factory=list)
    source: Literal["stdlib"] | None = None
    tokenizer: str | None = None
    tokenizer_pattern: str | None = None
    vocab_size: int = 32768
    train_bytes: int = DEFAULT_TRAIN_BYTES
    val_fraction: float = 0.01
    shard_tokens: int = 64 * 65536
    chunk_tokens: int = 65536
    processes: int = 0
    text_field: str = "text"
    chat: str | None = None
    chat_field: str = "messages"
    chat_turns: Literal["each", "all"] = "each"
    condition_fields: str = ""
    max_document_tokens: int = 0
    long_documents: Literal["truncate", "split", "drop"] = "truncate"
    row_tokens: int = 0
    row_packing: Literal["fill", "one"] = "fill"
    eos_token: str | None = None
    licence: str = "unspecified"
    limit_bytes: int | None = None
    seed: int = 0

    def limit(self) -> Limit | None:
        """What makes a document long and what is done with it; None when nothing does."""
        limits = [tokens for tokens in (self.max_document_tokens, self.row_tokens) if tokens]
        return Limit(min(limits), self.long_documents) if limits else None

    def form(self) -> RecordFormat:
        """How records are read. Raises InputError for a template that cannot be."""
        fields = tuple(dict.fromkeys(name for part in self.condition_fields.split(",") if (name := part.strip())))
        template = None if self.chat is None else load_template(self.chat)
        return RecordFormat(self.text_field, template, self.chat_field, self.chat_turns, fields)


_CHOICES = {
    "chat_turns": ("each", "all"),
    "long_documents": ("truncate", "split", "drop"),
    "row_packing": ("fill", "one"),
}


def check_options(options: PrepareOptions) -> None:
    """Raise InputError for the first option whose value cannot work."""
    least = {
        "vocab_size": SMALLEST_VOCAB,
        "train_bytes": 1,
        "shard_tokens": 1,
        "chunk_tokens": 1,
        "processes": 0,
        "max_document_tokens": 0,
        "row_tokens": 0,
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
    for name in ("max_document_tokens", "row_tokens"):
        if getattr(options, name) == 1:
            raise InputError(f"{name}: 1 leaves no room for a text and its end; allowed is 2 or more, or 0 for none")
    if options.row_tokens > options.chunk_tokens:
        raise InputError(
            f"row_tokens: {options.row_tokens} is more than chunk_tokens {options.chunk_tokens}; rows are packed inside a chunk"
        )
    for name, allowed in _CHOICES.items():
        if getattr(options, name) not in allowed:
            raise InputError(f"{name}: {getattr(options, name)!r} is unknown; allowed are {', '.join(allowed)}")
    form = options.form()
    if form.body_field in form.condition_fields:
        raise InputError(f"condition_fields: {form.body_field} is what conditions stand before; name other fields")
    if options.eos_token in ("", MASK_TOKEN):
        raise InputError(f"eos_token: {options.eos_token!r} cannot end a text; name another token")
    if options.chunk_tokens > 1 << 30:
        raise InputError(f"chunk_tokens: {options.chunk_tokens} is too large; allowed is up to {1 << 30}")
