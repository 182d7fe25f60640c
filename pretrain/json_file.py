"""What a command writes for scripts: `--json FILE`."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, Optional

from data.errors import InputError


def write_json(file: str | Path, content: Any, called: str = "--json ") -> None:
    """Writes JSON to `file`, which is never seen half-written; what is not finite becomes null, for which JSON has no number.

    called: how a message names the file. InputError if it cannot be written.
    """
    text = json.dumps(plain(content), indent=1, allow_nan=False, default=str) + "\n"
    path = Path(file)
    temporary: Optional[Path] = None
    try:
        if path.absolute().parts[1:2] in (("dev",), ("proc",)) or (
            path.exists() and not path.is_file()
        ):  # /dev/stdout, a pipe
            path.write_text(text)
            return
        path = Path(os.path.realpath(path))  # a link stays one
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise InputError(f"{called}{file}: cannot be written ({error.strerror})") from None


def plain(value: Any) -> Any:
    """The same with text keys, lists, and None for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
