"""One cell of a study for slurm/study.sbatch: a line of a file as words, and the run folder that they name.

    python -m pretrain.submission.slurm_cell CELLS NUMBER          prints RUN, CONFIG, OVERRIDE ..., each ended by a NUL byte

The words are split as a shell would, but no shell ever sees them.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from data.errors import InputError
from pretrain.load_config import load_config


def cell(cells: Path, number: int) -> list[str]:
    """[run folder, config file, overrides ...] of line `number` (from 1). InputError if there is none, or it is none."""
    lines = cells.read_text().splitlines()
    if not 1 <= number <= len(lines):
        raise InputError(f"{cells}: there is no line {number}, it has {len(lines)}")
    try:
        words = shlex.split(lines[number - 1])
    except ValueError as error:
        raise InputError(f"{cells}: line {number} cannot be read ({error})") from None
    if not words or words[0].startswith("--"):
        raise InputError(f"{cells}: line {number} must begin with a config file, overrides follow it")
    if not Path(words[0]).is_file():
        raise InputError(f"{cells}: line {number}: no config file {words[0]}")
    config = load_config(["--config", *words])
    return [str((Path(config.run.dir) / config.run.name).absolute()), *words]


def main(arguments: list[str]) -> int:
    try:
        words = cell(Path(arguments[0]), int(arguments[1]))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.write("".join(f"{word}\0" for word in words))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
