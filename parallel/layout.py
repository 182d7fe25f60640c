"""How a model is spread over ranks: one value that the mesh, the legality table, the engines and the model all read.

A pipeline of P ranks runs C = P * chunks_per_rank chunks of consecutive layers; chunk 0 also embeds, chunk C - 1 also
holds the final norm, the head and the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

# Schedules of torch.distributed.pipelining, by our names. What a rank holds, and whether backward is split in two.
SINGLE = ("gpipe", "1f1b")  # one chunk a rank
LOOPED = ("interleaved", "interleaved_zb")  # two chunks a rank: r and r + P
V_SHAPED = ("zbv",)  # two chunks a rank: r and 2 P - 1 - r
ZERO_BUBBLE = ("interleaved_zb", "zbv")  # gradients of inputs and of weights in separate passes
SCHEDULES = SINGLE + LOOPED + V_SHAPED


@dataclass(frozen=True)
class Layout:
    """The parallel section of a config, without what does not change the layout.

    shard_group: data-parallel ranks that share one set of shards (0 = all of them); the groups hold replicas of each other.
    layers_per_stage: layers of each chunk in model order; empty = as even as they divide.
    """

    engine: str = "deepspeed"
    zero_stage: int = 3
    shard_group: int = 0
    tensor: int = 1
    pipeline: int = 1
    layers_per_stage: tuple[int, ...] = ()
    schedule: str = "1f1b"
    sequence_parallel: bool = False
    activation_checkpointing: str = "none"

    @property
    def chunks_per_rank(self) -> int:
        return 1 if self.pipeline == 1 or self.schedule in SINGLE else 2

    @property
    def chunks(self) -> int:
        """Chunks of the whole pipeline."""
        return self.pipeline * self.chunks_per_rank

    def chunks_of(self, pp_rank: int) -> list[int]:
        """Numbers of the chunks that one pipeline rank holds, ascending."""
        if self.chunks_per_rank == 1:
            return [pp_rank]
        second = 2 * self.pipeline - 1 - pp_rank if self.schedule in V_SHAPED else pp_rank + self.pipeline
        return [pp_rank, second]

    def rank_of(self, chunk: int) -> int:
        """The pipeline rank that holds `chunk`."""
        return next(rank for rank in range(self.pipeline) if chunk in self.chunks_of(rank))

    def layers(self, num_layers: int) -> list[range]:
        """Layers of every chunk. What does not divide goes to inner chunks first: the outer ones also embed or hold the head."""
        if self.layers_per_stage:
            counts = list(self.layers_per_stage)
        else:
            counts = [num_layers // self.chunks] * self.chunks
            inner_first = [*range(1, self.chunks - 1), 0, self.chunks - 1]
            for chunk in inner_first[: num_layers % self.chunks]:
                counts[chunk] += 1
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return [range(start, start + count) for start, count in zip(starts, counts)]


ONE_RANK = Layout()
