"""A rank that raises brings all down within 30 s, whatever the others are doing; the first cause is the last line of each."""

from __future__ import annotations

import socket
import time

import pytest

from pretrain.watching.rank_log import log_path
from tests.distributed.launch import start


@pytest.mark.parametrize(
    "who, how, code, cause",
    [
        (1, "raises", 1, "ZeroDivisionError: a bug"),
        # The rank that serves the store where they met.
        pytest.param(0, "raises", 1, "ZeroDivisionError: a bug", marks=pytest.mark.parity),
        (1, "input", 2, "shard-000003.tar is cut short"),
        # May pass: another start is worth a try.
        (1, "storage", 1, "shard-000003.tar: cannot be read (Input/output error)"),
        pytest.param(0, "checkpoint", 1, "checkpoint x cannot be read (Stale file handle)", marks=pytest.mark.parity),
        (0, "killed", 1, None),
    ],
)
@pytest.mark.fault(
    "an exception, a mistake or SIGKILL on one rank, without a watch",
    happens="all ranks end within 30 s; the last line of each is the first cause",
    lost="the steps since the newest complete checkpoint, which the next start takes again",
)
def test_all_ranks_end_soon_with_the_first_failure(who, how, code, cause, tmp_path):
    log = log_path(tmp_path, who)
    log.parent.mkdir()
    log.touch()
    ranks = start("tests.pretrain.failing_worker", [str(who), how, str(tmp_path)], 2)
    try:
        ranks[who].wait(timeout=60)
        failed = time.monotonic()
        said = [p.communicate(timeout=60)[0] for p in ranks]
        # Against a sleep of 300 and a collective timeout of 600 seconds.
        assert time.monotonic() - failed < 30
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [-9 if how == "killed" and rank == who else code for rank in range(2)], said
    for rank, text in enumerate(said):
        if (rank, how) == (who, "killed"):
            continue
        last = text.strip().splitlines()[-1]
        if cause:
            more = f" ({log})" if how == "raises" else ""  # only where a traceback is
            assert last == f"error: rank {who} on {socket.gethostname()} failed first: {cause}{more}"
        assert last.startswith("error: rank ") and " failed first: " in last
    if how in ("input", "storage", "checkpoint"):
        assert "Traceback" not in said[who]
