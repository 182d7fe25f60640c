"""`python -m pretrain.study.running.ranks COUNT COMMAND ...`: torchrun on this machine that ends with what its ranks ended with.

torchrun itself ends with 1, whatever its ranks said. What a run leaves on disk does not tell either where the mistake is that
its folder cannot be written. So the codes are taken from torchrun's own account of its ranks.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence

from pretrain.watching.faults import INTERRUPTED, LEAVES

FINAL = (2, 77)  # a mistake, given up: others may end of it in the same moment, with codes that pass


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
        rank, code = cause({rank: one.exitcode for rank, one in error.failures.items()}, error.get_first_failure()[0])
        print(f"launcher: rank {rank} of {count} ended first, with code {code}", file=sys.stderr, flush=True)
        return code
    except SignalException as error:
        return INTERRUPTED if error.sigval == signal.SIGINT else LEAVES
    return 0


def cause(codes: Mapping[int, int], first: int) -> tuple[int, int]:
    """(rank, its code) of the failure that counts: what no other start would change, else that of the rank `first`."""
    for final in FINAL:
        for rank, code in sorted(codes.items()):
            if code == final:
                return rank, code
    return first, codes[first] if codes[first] >= 0 else 128 - codes[first]


if __name__ == "__main__":
    sys.exit(ranks(int(sys.argv[1]), sys.argv[2:]))
