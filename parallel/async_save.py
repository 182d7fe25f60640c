"""Saving behind training's back: one copy to the host, then everything `checkpoint.save` does, in a thread.

torch.distributed.checkpoint.async_save is not used: it ends with DCP's own files, while ours are complete only after hashes,
trainer.json and the rename, which have to be in the background and agreed by all ranks too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from parallel import checkpoint
from parallel.agreement import distributed
from parallel.boxes import Boxes


class AsyncSaver:
    """At most one save in flight. Its ranks talk over a gloo group that nothing else uses: collectives of two threads on
    one group would mix. (The question whether it is over goes over a second one.)
    """

    def __init__(self, timeout_seconds: int = 600):
        """Collective over all ranks, once. A rank that waits longer than `timeout_seconds` for another gives up."""
        self._group: Optional[dist.ProcessGroup] = None
        self._asking: Optional[dist.ProcessGroup] = None
        if distributed():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
            self._asking = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
            # gloo connects at the first use: now, so that a rank that dies later is noticed at once.
            dist.barrier(self._group)
            dist.barrier(self._asking)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Optional[Future[Path]] = None

    def start(
        self, root: Path, step: int, state: Mapping[str, Boxes], trainer: Mapping[str, Any], keep: int = 2
    ) -> Optional[Path]:
        """Copies `state` to the host and returns; the rest of `checkpoint.save` goes on behind. Collective.

        Before that it waits for the save in flight, whose folder it returns (None if there was none) and whose error it
        raises, as `wait` does; then nothing new is begun. The values may change as soon as this returns.
        """
        done = self.wait()
        copy = {name: host_copy(boxes) for name, boxes in state.items()}
        frozen = json.loads(json.dumps(dict(trainer)))
        self._saving = self._thread.submit(_save, root, step, copy, frozen, keep, self._group)
        return done

    def wait(self) -> Optional[Path]:
        """Waits for the save in flight and returns its folder; None if there is none.

        Raises what `checkpoint.save` raises, alike on all ranks, once; training's earlier checkpoints are untouched.
        """
        saving, self._saving = self._saving, None
        return saving.result() if saving else None

    def landed(self) -> bool:
        """Whether the save in flight is over, well or badly, on every rank (True if there is none). Collective; never waits
        for the save itself.
        """
        over = self._saving is None or self._saving.done()
        if self._asking is None:
            return over
        everywhere = torch.tensor(int(over))
        dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=self._asking)
        return bool(everywhere)

    def close(self) -> None:
        """Waits, leaves the thread and the groups. Collective."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            for group in (self._group, self._asking):
                if group is not None:
                    dist.destroy_process_group(group)


def host_copy(boxes: Boxes) -> Boxes:
    """The same boxes with values of their own in host memory. A copy from a GPU is complete on return."""
    parts = [(tuple(offset), view.detach().to("cpu", copy=True)) for offset, view in boxes.parts]
    return Boxes(boxes.shape, parts, boxes.dtype)


def _save(
    root: Path,
    step: int,
    copy: dict[str, Boxes],
    trainer: dict[str, Any],
    keep: int,
    group: Optional[dist.ProcessGroup],
) -> Path:
    try:
        return checkpoint.save(root, step, copy, trainer, keep, group)
    finally:
        copy.clear()  # the thread pool keeps its last call's arguments until the next
