"""Which folders of a run are complete checkpoints. Without torch, for whatever looks at a run from outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Optional

TRAINER = "trainer.json"
REPLACED = ".replaced-"  # before the name of a checkpoint while a new one of the same step takes it
_NAME = re.compile(r"step-(\d{8})")


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its folder's name."""
    return int(checkpoint.name.removeprefix(REPLACED).removeprefix("step-"))


def complete_checkpoints(root: Path) -> list[Path]:
    """All complete checkpoints, oldest first. A folder has its final name only when it is complete.

    A save that was killed while it replaced a checkpoint of the same step may have left that one under another name.
    """
    if not root.is_dir():
        return []
    found: dict[str, Path] = {}
    for path in root.iterdir():
        name = path.name.removeprefix(REPLACED)
        if _NAME.fullmatch(name) and (path / TRAINER).is_file():
            found[name] = path if name == path.name else found.get(name, path)
    return [found[name] for name in sorted(found)]


def latest(root: Path) -> Optional[Path]:
    """The newest complete checkpoint, or None."""
    found = complete_checkpoints(root)
    return found[-1] if found else None
