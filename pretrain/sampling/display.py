"""One row of a live display while text is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text


def render_progress(
    ids: Sequence[int], previous: Sequence[int] | None, mask_id: int, decode: Callable[[list[int]], str]
) -> Text:
    """Masked tokens as dim blocks, tokens that are others than in `previous` highlighted.

    Neighbours of one kind are decoded together, since one token may be only part of a character. Control characters
    (a model can write terminal escapes) are shown as the replacement character.
    """
    text = Text()
    before = previous if previous is not None else ids
    pairs = zip(ids, before, strict=True)
    kinds = ["masked" if new == mask_id else "new" if old != new else "known" for new, old in pairs]
    start = 0
    for stop in range(1, len(kinds) + 1):
        if stop < len(kinds) and kinds[stop] == kinds[start]:
            continue
        if kinds[start] == "masked":
            text.append("░" * (stop - start), style="dim")
        else:
            shown = _printable(decode([int(i) for i in ids[start:stop]]))
            text.append(shown, style="bold green" if kinds[start] == "new" else None)
        start = stop
    return text


def _printable(text: str) -> str:
    """`text` with control characters other than newline and tab replaced."""
    return "".join("\ufffd" if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 else c for c in text)
