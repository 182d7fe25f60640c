"""Addresses as they may be stored, shown and tracked: without user, password and query."""

from __future__ import annotations

import re
from typing import Any


def without_credentials(value: Any) -> Any:
    """The same sections and keys, every address in them without user, password and query."""
    if isinstance(value, dict):
        return {key: without_credentials(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_credentials(inner) for inner in value]
    return plain_address(value) if isinstance(value, str) else value


def plain_address(text: str) -> str:
    """`text` with every address in it cut down to scheme, host and path."""
    text = re.sub(r"((?:sql|oracle)[\w+]*://)[^\s'\"]*@", r"\1", text)  # of a database: the password may hold a slash
    text = re.sub(r"(\w://)[^\s'\"/?#]*@", r"\1", text)
    return re.sub(r"(\w://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1", text)
