"""One record of a .jsonl line or a .parquet row -> documents: its text, or its conversation, behind its conditions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

from data.chat import ChatTemplate, Unusable, conversation_documents
from data.chunk_index import CONDITION
from data.document import Document, Segment, plain_document


@dataclass(frozen=True)
class RecordFormat:
    """Which fields of a record are read, and how.

    With a `chat` template the conversation in `chat_field` is taken, else the text in `text_field`. `condition_fields`
    become a prefix of the document, recorded as a condition.
    """

    text_field: str = "text"
    chat: Optional[ChatTemplate] = None
    chat_field: str = "messages"
    chat_turns: Literal["each", "all"] = "each"
    condition_fields: tuple[str, ...] = ()

    @property
    def body_field(self) -> str:
        return self.chat_field if self.chat else self.text_field

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that is read."""
        return (self.body_field, *self.condition_fields)


PLAIN_RECORDS = RecordFormat()


def record_documents(name: str, record: Any, form: RecordFormat, conditions: Counter[str]) -> list[Document]:
    """The documents of one record; `conditions` counts the fields that were found. Raises Unusable with the reason.

    A document is called after its record; the answers of a conversation add `#1`, `#2`, ...
    """
    body = record.get(form.body_field) if isinstance(record, dict) else None
    bodies: list[tuple[Segment, ...]]
    if form.chat:
        if body is None:
            raise Unusable("no_messages", _found(form.chat_field, record))
        bodies = conversation_documents(body, form.chat, form.chat_turns)
    elif not isinstance(body, str):
        raise Unusable("no_text_field", _found(form.text_field, record))
    elif not body:
        raise Unusable("empty")
    elif not form.condition_fields:
        if not _encodable(body):
            raise Unusable("invalid_utf8", "a lone surrogate")
        return [plain_document(name, body)]
    else:
        bodies = [(Segment(body),)]
    prefix, meta = condition_prefix(record, form.condition_fields)
    head = (Segment(prefix, CONDITION),) if prefix else ()
    known = json.dumps(meta, ensure_ascii=False) if meta else ""
    if not all(_encodable(text) for text in (known, prefix, *(segment.text for segment in bodies[-1]))):
        raise Unusable("invalid_utf8", "a lone surrogate")
    conditions.update(meta.keys() if meta else ())
    many = form.chat is not None and form.chat_turns == "each"
    return [
        Document(f"{name}#{number}" if many else name, (*head, *segments), name, meta)
        for number, segments in enumerate(bodies, start=1)
    ]


def condition_prefix(record: Mapping[str, Any], fields: tuple[str, ...]) -> tuple[str, Optional[dict[str, Any]]]:
    """("title: ...\\nsource: ...\\n\\n", the raw values) of the fields that the record has; ("", None) if it has none.

    White space inside a value becomes one space, so that a value stays on its line; numbers and lists are written as JSON.
    """
    lines, meta = [], {}
    for field in fields:
        value = record.get(field)
        if value is None:
            continue
        try:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError):  # a date, bytes, a number that JSON cannot say
            value = shown = str(value)
        if shown := " ".join(shown.split()):
            lines.append(f"{field}: {shown}\n")
            meta[field] = value
    return ("".join(lines) + "\n", meta) if lines else ("", None)


def _found(field: str, record: Any) -> str:
    if isinstance(record, dict) and field in record:
        return f"field {field!r} is {type(record[field]).__name__}"
    keys = ", ".join(sorted(map(str, record))[:5]) if isinstance(record, dict) else "not an object"
    return f"field {field!r} wanted, found: {keys:.200}"


def _encodable(text: str) -> bool:
    """False for lone surrogates: JSON can spell them as escapes, UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
