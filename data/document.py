"""One document on its way from a file to tokens: text in segments, some of which are shown clean and carry no loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional


class Segment(NamedTuple):
    """A stretch of text. `kind`: a span kind of data.chunk_index (prompt, condition), or None where the loss is.

    In a `template` segment the literals of special tokens stand for their ids; in any other segment they are plain text.
    """

    text: str
    kind: Optional[int] = None
    template: bool = False

    @property
    def plain(self) -> bool:
        """Just text, all of it loss: most documents are one such segment, and short ones come by the million."""
        return self.kind is None and not self.template


class Document(NamedTuple):
    """`name` stays the same when other inputs are added. Documents of one `record` always go to the same set."""

    name: str
    segments: tuple[Segment, ...]
    record: str
    meta: Optional[Mapping[str, Any]] = None

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    @property
    def raw_text(self) -> str:
        """The text without the template's own words: what a tokenizer should learn from."""
        return "".join(segment.text for segment in self.segments if not segment.template)


def plain_document(name: str, text: str) -> Document:
    """A document of one segment that is all loss."""
    return Document(name, (Segment(text),), name)
