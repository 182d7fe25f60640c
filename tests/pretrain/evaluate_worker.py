"""One rank that runs several commands after each other in one process group: FILE holds a JSON list of their arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from parallel.mesh import leave
from pretrain.cli import execute

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        if code := execute(arguments):
            leave(code)
    leave(0)
