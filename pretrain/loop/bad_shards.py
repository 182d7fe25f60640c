"""Shards that a run goes on without (data.max_bad_shards): the same ones on every rank at every step, and after a resume.

A loader's worker finds out on one rank that a shard cannot be read. At the step that would have used it all ranks hear of it,
before anything is computed; from that step on every sample that touches the shard counts for nothing on every rank, whether that
rank could read it or not. Nothing is renumbered. The list is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.compact import CompactBatch
from data.errors import InputError, ShardError
from data.mixture import Mixture
from data.stream import BlockStream
from parallel.mesh import Mesh
from pretrain.training_data import Shard, TrainingData


class BadShards:
    """limit: most shards that may be bad (0: none, and nothing here costs anything)."""

    def __init__(
        self,
        limit: int,
        data: TrainingData,
        blocks: BlockStream | Mixture,
        mesh: Mesh,
        say: Callable[[str], None],
    ):
        self.limit = limit
        self.lost = 0  # samples of this rank that counted for nothing in the last step
        self._data, self._blocks, self._mesh, self._say = data, blocks, mesh, say
        self._since: dict[Shard, int] = {}
        self._why: dict[Shard, str] = {}

    def __len__(self) -> int:
        return len(self._since)

    def begin(self, step: int, saved: Sequence[dict[str, Any]]) -> None:
        """The shards of a checkpoint's list, and those that any rank found bad when it opened the data. Collective."""
        for entry in saved:
            if (shard := self._find(entry)) is not None:
                self._since[shard], self._why[shard] = entry["step"], entry["reason"]
                self._say(
                    f"going on without {self._data.file_of(shard)}, bad since step {entry['step']}: {entry['reason']} "
                    "(so the checkpoint says; mended or not, it stays out of this run)"
                )
        if self.limit or self._since:
            self._agree(step, self._data.bad())

    def settle(self, step: int, batches: Sequence[CompactBatch]) -> list[CompactBatch]:
        """The microbatches of this rank, in which nothing counts that touches a bad shard. Collective if there is a limit.

        Raises InputError, alike on all ranks, once more shards are bad than the limit allows.
        """
        if not self.limit:
            return list(batches)
        fresh = {
            (int(source), int(shard))
            for batch in batches
            for source, shard in zip(batch.source, batch.bad_shard)
            if shard >= 0
        } - self._since.keys()
        anywhere = torch.tensor(len(fresh), device=self._mesh.device)
        if self._mesh.world_size > 1:
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        if int(anywhere):
            self._agree(step, {shard: self._reason(shard, batches) for shard in fresh})
        return self._without(batches) if self._since else list(batches)

    def saved(self) -> list[dict[str, Any]]:
        """For the checkpoint."""
        return [
            {
                "source": self._data.names[source],
                "shard": self._data.sets[source].shards[number].file,
                "sha256": self._data.sets[source].shards[number].sha256,
                "reason": self._why[source, number],
                "step": step,
            }
            for (source, number), step in sorted(self._since.items())
        ]

    def _find(self, entry: dict[str, Any]) -> Shard | None:
        """The shard with the content that the entry names, wherever it lies now."""
        for source, one in enumerate(self._data.sets):
            for number, shard in enumerate(one.shards):
                if shard.sha256 == entry["sha256"]:
                    return source, number
        return None

    def _reason(self, shard: Shard, batches: Sequence[CompactBatch]) -> str:
        """What is wrong with a shard that a worker could not read: asked again, since a worker ships no words."""
        for batch in batches:
            for g, source, number in zip(batch.sample_ids, batch.source, batch.bad_shard):
                if (int(source), int(number)) == shard:
                    try:
                        self._blocks.block(int(g))
                    except ShardError as error:
                        return error.reason
        return "could not be read for a while"

    def _agree(self, step: int, found: dict[Shard, str]) -> None:
        everyone: list[Any] = [found]
        if self._mesh.world_size > 1:
            everyone = [None] * self._mesh.world_size
            dist.all_gather_object(everyone, found)
        for rank, theirs in enumerate(everyone):
            for shard, why in sorted(theirs.items()):
                if shard in self._since:
                    continue
                self._since[shard], self._why[shard] = step, why
                self._say(
                    f"WARNING: step {step}: {self._data.file_of(shard)} {why} (rank {rank}); its samples count for nothing from "
                    f"here on ({len(self)} of data.max_bad_shards {self.limit})"
                )
        if len(self) > self.limit:
            named = "; ".join(f"{self._data.file_of(shard)}: {self._why[shard]}" for shard in sorted(self._since)[:5])
            raise InputError(
                f"data.shards: {len(self)} shards are bad, data.max_bad_shards allows {self.limit} ({named}): copy them again, or "
                "raise data.max_bad_shards"
            )

    def _without(self, batches: Sequence[CompactBatch]) -> list[CompactBatch]:
        self.lost = 0
        kept = []
        for batch in batches:
            lost = np.array(
                [not self._since.keys().isdisjoint(self._blocks.shards_of(int(g))) for g in batch.sample_ids]
            )
            self.lost += int(lost.sum())
            kept.append(batch.without(lost) if lost.any() else batch)
        return kept
