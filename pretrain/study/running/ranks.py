"""`python -m pretrain.study.running.ranks COUNT COMMAND ...`: torchrun on this machine that ends with what its ranks ended with.

torchrun itself ends with 1, whatever its ranks said. What a run leaves on disk does not tell either where the mistake is that
its folder cannot be written. So the codes are taken from torchrun's own account of its ranks.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from pretrain.watching.faults import INTERRUPTED, LEAVES


def ranks(count: int, command: Sequence[str]) -> int:
    """Runs `python COMMAND ...` as `count` ranks; 0, or the exit code of the rank that failed first (128 + a signal's number if one
    killed it). Asked to leave by a signal: 75, 130 for Ctrl-C.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(["--standalone", f"--nproc-per-node={count}", *command])
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        code = first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
        print(f"launcher: rank {rank} of {count} ended first, with code {code}", file=sys.stderr, flush=True)
        return code
    except SignalException as error:
        return INTERRUPTED if error.sigval == signal.SIGINT else LEAVES
    return 0


if __name__ == "__main__":
    sys.exit(ranks(int(sys.argv[1]), sys.argv[2:]))
