"""What a shard set holds, in numbers: counts of its manifest, and lengths and spans from its chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

import numpy as np

from data.chunk_index import PADDING, SPAN_KINDS
from data.remote_options import CacheOptions
from data.shard_set import ShardSet

BAR = 40  # characters of the longest bar of the histogram


def describe(location: str, most_chunks: int = 1000, cache: Optional[CacheOptions] = None) -> dict[str, Any]:
    """Counts of a set, and the lengths of pieces and spans of at most `most_chunks` chunks spread evenly over it.

    A piece is a document, or a part of one that is stored in several. Raises InputError, ShardError.
    """
    shards = ShardSet.open(location, "size", cache=cache)
    manifest = shards.manifest
    found: dict[str, Any] = {
        "location": shards.location,
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "split_documents": manifest.split_documents,
        "truncated_documents": manifest.truncated_documents,
        "shards": len(shards.shards),
        "chunks": manifest.chunks,
        "bytes_on_disk": sum(shard.bytes for shard in shards.shards),
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "utf8_bytes": manifest.utf8_bytes,
        "bytes_per_token": manifest.utf8_bytes / max(manifest.tokens - manifest.padding_tokens, 1),
        "tokens_per_document": (manifest.tokens - manifest.padding_tokens) / max(manifest.documents, 1),
        "row_tokens": manifest.row_tokens,
        "padding_tokens": manifest.padding_tokens,
        "fill_rate": 1 - manifest.padding_tokens / manifest.tokens,
        "sources": [
            {
                "name": s.name,
                "licence": s.licence,
                "documents": s.documents,
                "utf8_bytes": s.utf8_bytes,
                "skipped": s.skipped,
            }
            for s in manifest.sources
        ],
    }
    chunks = np.unique(np.linspace(0, manifest.chunks - 1, min(most_chunks, manifest.chunks)).astype(np.int64))
    lengths, spans = [], np.zeros((len(SPAN_KINDS), 2), np.int64)
    for start, tokens in shards.chunk_ranges(chunks.tolist()):
        begins, here = shards.read_pieces(start, tokens), shards.read_spans(start, tokens)
        filler = here[here[:, 2] == PADDING, 0]
        sizes = np.diff(begins, append=tokens)
        lengths.append(sizes[~np.isin(begins, filler)])
        for kind in range(len(SPAN_KINDS)):
            of_kind = here[here[:, 2] == kind]
            spans[kind] += len(of_kind), int(of_kind[:, 1].sum())
    sizes = np.concatenate(lengths)
    found["looked_into"] = {"chunks": len(chunks), "pieces": len(sizes), "tokens": int(sizes.sum())}
    found["spans"] = {name: {"count": int(n), "tokens": int(t)} for name, (n, t) in zip(SPAN_KINDS, spans)}
    found["piece_lengths"] = [
        {"from": int(low), "below": int(high), "pieces": int(count)} for low, high, count in _histogram(sizes)
    ]
    if len(sizes):
        marks = np.percentile(sizes, [5, 50, 95], method="lower")
        found["piece_length_marks"] = dict(zip(("5%", "median", "95%"), map(int, marks))) | {
            "longest": int(sizes.max())
        }
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The same for people to read."""
    yield found["location"]
    yield f"  tokens           {found['tokens']:,} ({found['dtype']}, vocabulary {found['vocab_size']:,})"
    yield f"  documents        {found['documents']:,}, {found['tokens_per_document']:,.1f} tokens each"
    for name, what in (("split_documents", "stored in several pieces"), ("truncated_documents", "without their end")):
        if found[name]:
            yield f"                   {found[name]:,} {what}"
    yield f"  text             {found['utf8_bytes'] / 1e6:,.1f} MB of UTF-8, {found['bytes_per_token']:.2f} bytes a token"
    size = found["bytes_on_disk"]
    yield f"  on disk          {found['shards']:,} shards, {found['chunks']:,} chunks, {size / 1e6:,.1f} MB"
    if found["row_tokens"]:
        padding = f"{found['padding_tokens']:,} padding tokens, {100 * found['fill_rate']:.1f}% filled"
        yield f"  rows             of {found['row_tokens']:,} tokens, {padding}"
    for source in found["sources"]:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(source["skipped"].items()) if count)
        what = f"{source['documents']:,} documents, {source['utf8_bytes'] / 1e6:,.1f} MB, licence {source['licence']}"
        yield f"  source           {source['name']}: {what}" + (f"; skipped {skipped}" if skipped else "")
    looked = found["looked_into"]
    share = "all" if looked["chunks"] == found["chunks"] else f"{looked['chunks']:,} of {found['chunks']:,}"
    yield f"\nFrom {share} chunks ({looked['pieces']:,} pieces, {looked['tokens']:,} tokens):"
    for name, span in found["spans"].items():
        if span["count"]:
            yield f"  {name:<16} {span['count']:,} spans, {span['tokens']:,} tokens"
    if "piece_length_marks" in found:
        yield "  piece length     " + ", ".join(
            f"{mark} {value:,}" for mark, value in found["piece_length_marks"].items()
        )
    most = max((row["pieces"] for row in found["piece_lengths"]), default=1)
    for row in found["piece_lengths"]:
        name = f"{row['from']:,} - {row['below'] - 1:,}" if row["below"] - row["from"] > 1 else f"{row['from']:,}"
        bar = "█" * max(1, round(BAR * row["pieces"] / most)) if row["pieces"] else ""
        yield f"  {name:>18} {row['pieces']:>12,}  {bar}".rstrip()


def _histogram(sizes: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(from, below, count) of the powers of two between the shortest and the longest."""
    if not len(sizes):
        return
    powers = np.floor(np.log2(sizes)).astype(np.int64)
    counts = np.bincount(powers)
    for power in range(int(powers.min()), len(counts)):
        yield 1 << power, 1 << (power + 1), counts[power]
