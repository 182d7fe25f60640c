"""One rank that fails brings all ranks down within seconds, and every rank's last word is the first cause.

Without this, the others sit in a collective until its timeout. The ranks share a key in the store where they met; the first
failure writes it, a thread of each rank looks at it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, Optional

import torch.distributed as dist

from data.errors import InputError
from parallel.errors import CheckpointError
from parallel.mesh import Mesh
from pretrain.watching.rank_log import log_path

POLL_SECONDS = 1.0
GRACE_SECONDS = (
    5.0  # for a rank's own last words, and for the rank that serves the store to outlive the others' look at it
)
_KEY, _SEEN = "first failure", "ranks that know"


@contextlib.contextmanager
def failing_together(mesh: Mesh, folder: Optional[Path] = None) -> Iterator[None]:
    """Runs the body; if it raises on any rank, every rank's process ends with the first failure's exit code.

    folder: of the run, where the ranks' logs are (the last word on a crash says where its traceback is).
    A user's mistake (InputError, CheckpointError) is one line and code 2, or 1 if it is a fault of the storage that may pass;
    anything else is a traceback and code 1. In a world of one process exceptions pass through as they are.
    """
    if mesh.store is None:
        yield
        return
    watch = _Watch(mesh, folder)
    try:
        yield
    except BaseException as error:
        watch.fail(error)
    watch.stop()


class _Watch:
    def __init__(self, mesh: Mesh, folder: Optional[Path]):
        assert mesh.store is not None
        self._rank, self._world, self._folder = mesh.rank, mesh.world_size, folder
        # A connection of its own: the main thread's may be blocked in a wait.
        store = mesh.store.clone() if hasattr(mesh.store, "clone") else mesh.store
        self._store = dist.PrefixStore("watch", store)
        self._store.add(_SEEN, 0)
        self._stopped = threading.Event()
        self._failing = threading.Event()  # this rank is already on its way out
        self._thread = threading.Thread(target=self._look, name="first-failure", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Says what went wrong here, tells the others, and ends this process."""
        self._failing.set()
        mistake = isinstance(error, (InputError, CheckpointError))
        if isinstance(error, (InputError, CheckpointError)):  # in full: types follow it
            code, cause = 1 if error.passing else 2, str(error)
        else:
            traceback.print_exception(error)
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
            cause = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        mine = {"rank": self._rank, "host": socket.gethostname(), "code": code, "cause": cause, "traced": not mistake}
        try:
            first = json.loads(self._store.compare_set(_KEY, "", json.dumps(mine)))
        except RuntimeError:  # the rank that serves the store is gone
            first = mine
        self._end(first)

    def _look(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            try:
                failed = self._store.check([_KEY])
            except RuntimeError:
                time.sleep(GRACE_SECONDS)  # the main thread usually says more about it
                first = {"rank": 0, "host": "?", "code": 1, "cause": "its process is gone (the store does not answer)"}
                failed = True
            else:
                first = json.loads(self._store.get(_KEY)) if failed else {}
            if failed and not self._stopped.is_set():
                if self._failing.wait(2 * POLL_SECONDS):
                    return
                self._end(first)

    def _end(self, first: dict) -> NoReturn:
        with contextlib.suppress(RuntimeError):
            seen = self._store.add(_SEEN, 1)
            deadline = time.monotonic() + GRACE_SECONDS
            while self._rank == 0 and seen < self._world and time.monotonic() < deadline:
                time.sleep(0.1)
                seen = self._store.add(_SEEN, 0)
        sys.stdout.flush()
        log = log_path(self._folder, first["rank"]) if self._folder else None
        where = f" ({log})" if log and first.get("traced") and log.exists() else ""
        print(f"error: rank {first['rank']} on {first['host']} failed first: {first['cause']}{where}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(first["code"])
