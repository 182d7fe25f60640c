"""Read all inputs once:

count them, hash them, and decide which document goes to the train set and which to the val set.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

from data.document import Document
from data.errors import InputError
from data.manifest import SourceCount
from data.sources import SkipLog, Source, no_documents_error

SETS = ("train", "val")


@dataclass(frozen=True)
class Survey:
    """What the inputs hold.

    `sources[set]` counts what each source gives to a set. `forced` moves one record (by its index in the stream)
    into a set that chance left empty. `input_sha256` covers names and texts in order, so it changes with any change
    of the input.
    """

    sources: dict[str, list[SourceCount]]
    forced: dict[int, str]
    input_sha256: str
    val_fraction: float
    seed: int

    def set_of(self, index: int, record: str) -> str:
        """The set of the record with this place in the stream and this name."""
        return self.forced.get(index) or ("val" if split_value(record, self.seed) < self.val_fraction else "train")

    def documents(self, set_name: str) -> int:
        return sum(source.documents for source in self.sources[set_name])

    def utf8_bytes(self, set_name: str) -> int:
        return sum(source.utf8_bytes for source in self.sources[set_name])


class InputHash:
    """Running sha256 over documents; equal only for the same documents in the same order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, document: Document) -> int:
        """Take in one document: name, segments and what is known about it. Gives its text's size in UTF-8 bytes."""
        name = document.name.encode("utf-8", "surrogateescape")
        if len(document.segments) == 1 and document.segments[0].plain and not document.meta:
            text = document.segments[0].text.encode("utf-8")
            self._hash.update(b"text %d %d\0%b" % (len(name), len(text), name))
            self._hash.update(text)
            return len(text)
        texts = [segment.text.encode("utf-8") for segment in document.segments]
        parts = [f"{segment.kind} {segment.template:d}".encode() for segment in document.segments]
        meta = json.dumps(document.meta, sort_keys=True).encode() if document.meta else b""
        self._hash.update(b"parts %d\0" % len(texts))
        for part in (name, meta, b",".join(parts), *texts):
            self._hash.update(b"%d\0" % len(part))
            self._hash.update(part)
        return sum(map(len, texts))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def split_value(name: str, seed: int) -> float:
    """A number in [0, 1) drawn from name and seed alone: adding records never moves another from set to set."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


class Placed(NamedTuple):
    """A document in the stream: the number of its source, the index of its record, its size in UTF-8 bytes."""

    source: int
    record: int
    document: Document
    utf8_bytes: int


def document_stream(
    sources: Sequence[Source],
    limit_bytes: int | None,
    skips: Sequence[SkipLog] | None = None,
    input_hash: InputHash | None = None,
) -> Iterator[Placed]:
    """Yield every document of all sources, ending after the document that reaches the limit.

    `skips` has one log for each source; `input_hash` takes in every document before it is given out.
    """
    input_hash = input_hash or InputHash()
    total, index = 0, -1
    last: tuple[int, str] | None = None
    for number, source in enumerate(sources):
        for document in source.documents(skips[number] if skips else None):
            index += last != (number, document.record)
            last = (number, document.record)
            size = input_hash.add(document)
            yield Placed(number, index, document, size)
            total += size
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

    Each set gets at least one record, except val at a `val_fraction` of 0. Raises InputError when there are too few, or when
    not one record has a field that conditions were wanted from.
    """
    skips = [SkipLog() for _ in sources]
    counted = {set_name: [[0, 0] for _ in sources] for set_name in SETS}
    input_hash = InputHash()
    # The records nearest to changing sets, and what each holds by source: (value, index), documents, bytes.
    lowest: _Nearest = None
    highest: _Nearest = None
    records = 0
    for record in _records(document_stream(sources, limit_bytes, skips, input_hash)):
        value = split_value(record.name, seed)
        place = counted["val" if value < val_fraction else "train"][record.source]
        place[0] += record.documents
        place[1] += record.utf8_bytes
        lowest = min(lowest or (value, records, record), (value, records, record))
        highest = max(highest or (value, records, record), (value, records, record))
        advance(record.utf8_bytes)
        records += 1
    if records == 0:
        raise no_documents_error(sources, sum((skip.counts for skip in skips), SkipLog().counts))
    for field in {field: None for source in sources for field in source.form.condition_fields}:
        if not any(skip.conditions[field] for skip in skips):
            raise InputError(
                f"condition_fields: no record has a value in the field {field!r}; name fields of the records"
            )
    forced: dict[int, str] = {}
    if val_fraction > 0:
        if records == 1:
            raise InputError(
                "inputs: only one document, but train and val need one each; give more, or set --val_fraction 0"
            )
        for empty, full, nearest in (("val", "train", lowest), ("train", "val", highest)):
            if not any(documents for documents, _ in counted[empty]):
                assert nearest is not None, "there are at least two records"
                _, index, record = nearest
                forced[index] = empty
                for set_name, sign in ((empty, 1), (full, -1)):
                    counted[set_name][record.source][0] += sign * record.documents
                    counted[set_name][record.source][1] += sign * record.utf8_bytes
    per_source = {
        set_name: [
            SourceCount(source.name, source.licence, documents, size, dict(sorted(skip.counts.items())))
            for source, skip, (documents, size) in zip(sources, skips, counted[set_name], strict=True)
        ]
        for set_name in SETS
    }
    return Survey(per_source, forced, input_hash.hexdigest(), val_fraction, seed)


class _Record(NamedTuple):
    name: str
    source: int
    documents: int
    utf8_bytes: int


_Nearest = Optional[tuple[float, int, _Record]]


def _records(stream: Iterator[Placed]) -> Iterator[_Record]:
    """Documents counted record by record; each record's come one after the other."""
    for (source, _), group in itertools.groupby(stream, key=lambda placed: (placed.source, placed.record)):
        documents = utf8_bytes = 0
        for placed in group:
            documents, utf8_bytes, name = documents + 1, utf8_bytes + placed.utf8_bytes, placed.document.record
        yield _Record(name, source, documents, utf8_bytes)
