"""What the engine benchmark runs: one model, one batch, and the contenders that train it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Optional

from bench.gpu_correct import random_batch
from parallel.engine import AdamWOptions, Microbatch
from parallel.layout import Layout
from parallel.legality import check_layout
from parallel.mesh import Mesh
from parallel.shape import VOCAB_MULTIPLE
from pretrain.config import ModelConfig
from pretrain.model import model_shape

# An epsilon well above the rounding of gradients: else Adam makes whole steps out of rounding, and losses part.
ADAMW = AdamWOptions(eps=1e-6)
CLIP, RATE, SEED = 1.0, 1e-4, 0
HEAD_SIZE, LEAST_HEADS = 64, 4
YARDSTICK = "ddp"


@dataclass(frozen=True)
class Sizes:
    """micro_batch: samples. accumulation: microbatches a rank where all ranks are data-parallel; every layout gets that batch."""

    ranks: int
    hidden: int
    layers: int
    sequence: int
    micro_batch: int
    accumulation: int
    vocab: int
    steps: int

    @property
    def global_batch(self) -> int:
        return self.ranks * self.micro_batch * self.accumulation

    @property
    def model(self) -> ModelConfig:
        """Inner size 8/3 of the hidden one, in whole tiles; as many key/value heads as heads."""
        heads = max(LEAST_HEADS, self.hidden // HEAD_SIZE)
        inner = -(-self.hidden * 8 // 3 // HEAD_SIZE) * HEAD_SIZE
        return ModelConfig(self.layers, self.hidden, heads, heads, inner, self.vocab)


@dataclass(frozen=True)
class Contender:
    """plain: torch alone (DistributedDataParallel), else the layout's engine. traced: a further step shows where time goes."""

    name: str
    layout: Layout
    plain: bool = False
    traced: bool = False


def _zero(stage: int) -> Contender:
    return Contender(f"z{stage}", Layout(zero_stage=stage), traced=stage == 3)


def _both(name: str, **layout: Any) -> list[Contender]:
    return [
        Contender(f"z3-{name}", Layout("deepspeed", **layout)),
        Contender(f"fsdp2-{name}", Layout("fsdp2", **layout)),
    ]


ON_ONE_RANK = (
    Contender("plain", Layout(), plain=True),
    *map(_zero, range(4)),
    Contender("fsdp2", Layout("fsdp2"), traced=True),
)
ON_MANY = (
    Contender(YARDSTICK, Layout(), plain=True),
    *ON_ONE_RANK[1:],
    *_both("tp2", tensor=2),
    *_both("tp2-sp", tensor=2, sequence_parallel=True),
    *_both("pp2", pipeline=2),
    Contender("fsdp2-pp2-zbv", Layout("fsdp2", pipeline=2, schedule="zbv")),
    Contender("fsdp2-pp2-izb", Layout("fsdp2", pipeline=2, schedule="interleaved_zb")),
    *_both("pp2-tp2", pipeline=2, tensor=2),
    *_both("hybrid", shard_group=2),
    *_both("full", activation_checkpointing="full"),
    Contender("ddp-again", Layout(), plain=True),  # far from 1.00 x ddp: the machine was not quiet
)


def why_not(contender: Contender, sizes: Sizes) -> Optional[str]:
    """None, or why the contender cannot run at these sizes."""
    layout = contender.layout
    refused = check_layout(
        model_shape(sizes.model),
        sizes.ranks,
        layout,
        global_batch_size=sizes.global_batch,
        micro_batch_size=sizes.micro_batch,
        sequence_length=sizes.sequence,
    )
    if refused:
        return refused.reason
    if sizes.vocab % (VOCAB_MULTIPLE * layout.tensor):
        return (
            f"--vocab {sizes.vocab}: must be a multiple of {VOCAB_MULTIPLE * layout.tensor}, or padding is counted too"
        )
    if layout.shard_group == sizes.ranks:
        return f"{sizes.ranks} ranks are one shard group: the row without it"
    return None


def microbatches(sizes: Sizes, mesh: Mesh) -> tuple[list[Microbatch], float]:
    """(this rank's share of the one random batch, cut; the global denominator)."""
    batch = random_batch(sizes.global_batch, sizes.sequence, sizes.vocab, SEED)
    share = sizes.global_batch // mesh.dp
    first = mesh.dp_rank * share
    starts = range(first, first + share, sizes.micro_batch)
    cut = [{k: x[s : s + sizes.micro_batch] for k, x in batch.tensors().items()} for s in starts]
    return cut, float(batch.eligible.sum())


def sizes_from(values: dict[str, Any]) -> Sizes:
    """Sizes from a dict that may hold more."""
    return Sizes(**{f.name: values[f.name] for f in fields(Sizes)})
