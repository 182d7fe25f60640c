"""Colours, on terminals only."""

from __future__ import annotations

import os
from typing import TextIO

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36", "alarm": "1;31"}


def coloured(stream: TextIO) -> bool:
    """Whether colours may be written to `stream` (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, on: bool) -> str:
    """`text` in one of STYLES ("": as it is)."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if on and style and text else text
