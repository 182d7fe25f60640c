"""Our own tokenizer.json, for kinds of tokenizers that have no single file of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FORMAT = "palimpsest-tokenizer"


def wrapper_bytes(kind: str, fields: Mapping[str, Any], special_tokens: Mapping[str, int]) -> bytes:
    """Our own tokenizer.json: the kind comes first, so that a reader knows it from the first bytes."""
    by_id = dict(sorted(special_tokens.items(), key=lambda item: item[1]))
    record = {"kind": kind, "format": FORMAT, **fields, "special_tokens": by_id}
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
