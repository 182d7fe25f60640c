"""A small tokenizer, token documents, and shard sets made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data.manifest import TOKENIZER_FILE, Manifest, SourceCount
from data.shard_writer import ShardWriter
from data.tokenizer import TextTokenizer, prepare_tokenizer
from tests.data.small_corpus import make_text


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    rng = np.random.default_rng(7)
    texts = [make_text(rng, 80) for _ in range(40)]
    return prepare_tokenizer(tmp_path_factory.mktemp("tokenizer") / TOKENIZER_FILE, texts=texts, vocab_size=300)


@pytest.fixture
def write_set(tmp_path: Path, tokenizer: TextTokenizer) -> Callable[..., Path]:
    """A function that writes documents (id arrays that end in EOS) as a complete shard set."""

    def write(
        documents: Sequence[np.ndarray],
        *,
        dtype: str = "uint16",
        vocab_size: int | None = None,
        chunk_tokens: int = 50,
        shard_tokens: int = 200,
        folder: str = "set",
    ) -> Path:
        out = tmp_path / folder
        out.mkdir()
        (out / TOKENIZER_FILE).write_bytes(tokenizer.path.read_bytes())
        writer = ShardWriter(out, dtype=dtype, chunk_tokens=chunk_tokens, shard_tokens=shard_tokens)
        for document in documents:
            writer.add_document(document, utf8_bytes=3 * len(document))
        shards = tuple(writer.close())
        totals = ("tokens", "documents", "split_documents", "utf8_bytes", "chunks")
        counts = {total: sum(getattr(shard, total) for shard in shards) for total in totals}
        manifest = Manifest(
            dtype=dtype,
            vocab_size=vocab_size or tokenizer.vocab_size,
            tokenizer_file=TOKENIZER_FILE,
            tokenizer_sha256=tokenizer.sha256,
            special=tokenizer.special,
            chunk_tokens=chunk_tokens,
            shards=shards,
            sources=(SourceCount("test", "CC0-1.0", counts["documents"], counts["utf8_bytes"], {}),),
            prepared_with={},
            **counts,
        )
        (out / "manifest.json").write_bytes(manifest.to_bytes())
        return out

    return write


@pytest.fixture
def documents(tokenizer: TextTokenizer) -> list[np.ndarray]:
    """Sixty documents of 1 to 40 tokens and three far longer than a chunk, each ending in EOS and holding no other."""
    rng = np.random.default_rng(3)
    lengths = [int(n) for n in rng.integers(1, 40, size=60)]
    lengths[5], lengths[30], lengths[59] = 173, 100, 51
    eos = tokenizer.special.eos
    return [np.append(rng.integers(eos + 1, 300, size=n - 1), eos).astype(np.uint32) for n in lengths]
