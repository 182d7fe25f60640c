"""A small tokenizer, token documents, and shard sets made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import data.remote_fetch
from data.chunk_index import write_set_index
from data.manifest import TOKENIZER_FILE, TOTALS, Manifest, SourceCount
from data.shard_writer import ShardWriter
from data.tokenizer import TextTokenizer, prepare_tokenizer
from tests.data.fault_server import FaultServer
from tests.data.small_corpus import make_text


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    rng = np.random.default_rng(7)
    texts = [make_text(rng, 80) for _ in range(40)]
    return prepare_tokenizer(tmp_path_factory.mktemp("tokenizer") / TOKENIZER_FILE, texts=texts, vocab_size=300)


def write_shard_set(
    out: Path,
    tokenizer: TextTokenizer,
    documents: Sequence[np.ndarray],
    *,
    dtype: str = "uint16",
    vocab_size: int | None = None,
    chunk_tokens: int = 50,
    shard_tokens: int = 200,
    spans: Sequence[np.ndarray] | None = None,
    metas: Sequence[dict | None] | None = None,
) -> Path:
    """Documents (id arrays that end in EOS) as a complete shard set in the new folder `out`."""
    out.mkdir()
    (out / TOKENIZER_FILE).write_bytes(tokenizer.path.read_bytes())
    writer = ShardWriter(out, dtype=dtype, chunk_tokens=chunk_tokens, shard_tokens=shard_tokens)
    for i, document in enumerate(documents):
        more = {"spans": spans[i]} if spans else {}
        writer.add_document(document, utf8_bytes=3 * len(document), meta=metas[i] if metas else None, **more)
    shards = tuple(writer.close())
    counts = {total: sum(getattr(shard, total) for shard in shards) for total in TOTALS}
    manifest = Manifest(
        dtype=dtype,
        vocab_size=vocab_size or tokenizer.vocab_size,
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=tokenizer.sha256,
        index_sha256=write_set_index(out, shards),
        special=tokenizer.special,
        chunk_tokens=chunk_tokens,
        row_tokens=0,
        shards=shards,
        sources=(SourceCount("test", "CC0-1.0", counts["documents"], counts["utf8_bytes"], {}),),
        prepared_with={},
        **counts,
    )
    (out / "manifest.json").write_bytes(manifest.to_bytes())
    return out


@pytest.fixture
def write_set(tmp_path: Path, tokenizer: TextTokenizer) -> Callable[..., Path]:
    """write_shard_set in a folder of this test: write_set(documents, folder="set", **options)."""

    def write(documents: Sequence[np.ndarray], *, folder: str = "set", **options) -> Path:
        return write_shard_set(tmp_path / folder, tokenizer, documents, **options)

    return write


@pytest.fixture
def documents(tokenizer: TextTokenizer) -> list[np.ndarray]:
    """Sixty documents of 1 to 40 tokens and three far longer than a chunk, each ending in EOS and holding no other."""
    rng = np.random.default_rng(3)
    lengths = [int(n) for n in rng.integers(1, 40, size=60)]
    lengths[5], lengths[30], lengths[59] = 173, 100, 51
    eos = tokenizer.special.eos
    return [np.append(rng.integers(eos + 1, 300, size=n - 1), eos).astype(np.uint32) for n in lengths]


@pytest.fixture
def folder(write_set: Callable[..., Path], documents: list[np.ndarray]) -> Path:
    return write_set(documents)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(data.remote_fetch, "FIRST_PAUSE", 0.01)
    server = FaultServer(folder)
    yield server
    server.close()


@pytest.fixture
def flat(documents: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(documents)
