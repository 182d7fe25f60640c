"""Read all inputs once:

count them, hash them, and decide which document goes to the train set and which to the val set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from data.errors import InputError
from data.manifest import SourceCount
from data.sources import Document, SkipLog, Source, no_documents_error

SETS = ("train", "val")


@dataclass(frozen=True)
class Survey:
    """What the inputs hold.

    `sources[set]` counts what each source gives to a set. `forced` moves one document (by its index in the stream)
    into a set that chance left empty. `input_sha256` covers names and texts in order, so it changes with any change
    of the input.
    """

    sources: dict[str, list[SourceCount]]
    forced: dict[int, str]
    input_sha256: str
    val_fraction: float
    seed: int

    def set_of(self, index: int, name: str) -> str:
        """The set of the document with this place in the stream and this name."""
        return self.forced.get(index) or ("val" if split_value(name, self.seed) < self.val_fraction else "train")

    def documents(self, set_name: str) -> int:
        return sum(source.documents for source in self.sources[set_name])

    def utf8_bytes(self, set_name: str) -> int:
        return sum(source.utf8_bytes for source in self.sources[set_name])


class InputHash:
    """Running sha256 over documents; equal only for the same documents in the same order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, text: bytes) -> None:
        encoded = name.encode("utf-8", "surrogateescape")
        self._hash.update(b"%d %d\0" % (len(encoded), len(text)))
        self._hash.update(encoded)
        self._hash.update(text)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def split_value(name: str, seed: int) -> float:
    """A number in [0, 1) drawn from name and seed alone: adding documents never moves another from set to set."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def document_stream(
    sources: Sequence[Source], limit_bytes: int | None, skips: Sequence[SkipLog] | None = None
) -> Iterator[tuple[int, Document, bytes]]:
    """Yield (source number, document, its UTF-8 bytes) over all sources, ending after the document that reaches the
    limit.

    `skips` has one log for each source.
    """
    total = 0
    for number, source in enumerate(sources):
        for document in source.documents(skips[number] if skips else None):
            text = document.text.encode("utf-8")
            yield number, document, text
            total += len(text)
            if limit_bytes is not None and total >= limit_bytes:
                return


def survey_inputs(
    sources: Sequence[Source],
    *,
    val_fraction: float,
    seed: int,
    limit_bytes: int | None,
    advance: Callable[[int], None],
) -> Survey:
    """Read every document once. `advance` is told the bytes read.

    Each set gets at least one document, except val at a `val_fraction` of 0. Raises InputError when there are too few.
    """
    skips = [SkipLog() for _ in sources]
    counted = {set_name: [[0, 0] for _ in sources] for set_name in SETS}
    input_hash = InputHash()
    lowest = highest = None  # the documents nearest to changing sets: (value, index, source, bytes)
    total = 0
    for index, (number, document, text) in enumerate(document_stream(sources, limit_bytes, skips)):
        value = split_value(document.name, seed)
        place = counted["val" if value < val_fraction else "train"][number]
        place[0] += 1
        place[1] += len(text)
        this = (value, index, number, len(text))
        lowest, highest = min(lowest or this, this), max(highest or this, this)
        input_hash.add(document.name, text)
        advance(len(text))
        total += 1
    if total == 0:
        raise no_documents_error(sources, sum((skip.counts for skip in skips), SkipLog().counts))
    forced: dict[int, str] = {}
    if val_fraction > 0:
        if total == 1:
            raise InputError(
                "inputs: only one document, but train and val need one each; give more, or set --val_fraction 0"
            )
        for empty, full, nearest in (("val", "train", lowest), ("train", "val", highest)):
            if not any(documents for documents, _ in counted[empty]):
                assert nearest is not None, "there are at least two documents"
                _, index, number, size = nearest
                forced[index] = empty
                for set_name, sign in ((empty, 1), (full, -1)):
                    counted[set_name][number][0] += sign
                    counted[set_name][number][1] += sign * size
    per_source = {
        set_name: [
            SourceCount(source.name, source.licence, documents, size, dict(sorted(skip.counts.items())))
            for source, skip, (documents, size) in zip(sources, skips, counted[set_name], strict=True)
        ]
        for set_name in SETS
    }
    return Survey(per_source, forced, input_hash.hexdigest(), val_fraction, seed)
