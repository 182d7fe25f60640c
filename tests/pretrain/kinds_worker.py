"""Runs several commands of the product in one process (imports cost more than they do): python -m ... FILE.

FILE: a JSON list of command lines. Ends with the exit code of the first that fails.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from parallel.mesh import leave
from pretrain.cli import execute


def main() -> None:
    for command in json.loads(Path(sys.argv[1]).read_text()):
        print("$", *command, flush=True)
        if code := execute(command):
            leave(code)
    leave(0)


if __name__ == "__main__":
    main()
