"""What the training loop asks of an engine, whatever shards the parameters underneath."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from parallel.boxes import Boxes
from parallel.mesh import Mesh

Microbatch = dict[str, Tensor]

# The tensors of a microbatch that the model's forward takes (the rest is for metrics).
MODEL_INPUTS = ("noisy_ids", "position_ids", "document_ids", "target_ids", "masked", "weight")


class LossOutput(NamedTuple):
    """What the model gives when it knows the targets. Only `loss` carries a gradient."""

    loss: Tensor  # scalar: sum(weight * ce) / normalizer of the microbatch
    ce: Tensor  # [B, L]: cross-entropy in nats of counted tokens, else 0
    correct: Tensor  # [B, L] bool


@dataclass(frozen=True)
class AdamWOptions:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); the learning rate is set before each step."""

    impl: str = "torch"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass
class StepResult:
    """One optimizer step. outputs: of each microbatch in order, gradient-free, the same on all pipeline ranks.

    grad_norm: global, before clipping, every parameter counted once. applied: False if the step was skipped because a
    gradient was not finite.
    """

    outputs: list[LossOutput]
    grad_norm: float
    applied: bool


class Engine(Protocol):
    """A sharded model with its optimizer. Every method is collective: all ranks call it alike, in the same order."""

    mesh: Mesh
    vocab_size: int

    @property
    def chunks(self) -> Sequence[nn.Module]:
        """The chunks of the model that this rank holds."""
        ...

    def train_step(self, microbatches: Sequence[Microbatch], normalizer: float, lr: float) -> StepResult:
        """Forward and backward of every microbatch, one clipped optimizer step.

        The gradient is that of sum(weight * ce) / normalizer over ALL microbatches of ALL data-parallel ranks:
        `normalizer` is the global denominator, nothing is averaged.
        """
        ...

    def forward(self, microbatch: Microbatch) -> Any:
        """The model's output without gradients (loss normalised by 1)."""
        ...

    def state(self) -> dict[str, Boxes]:
        """Logical name (`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`) -> boxes viewing this rank's float32 values."""
        ...

    def state_written(self, optimizer_steps: int) -> None:
        """Called after values were written into `state()`, e.g. by a checkpoint load taken after `optimizer_steps`."""
        ...

    def close(self) -> None:
        """Lets go of what the engine holds outside of itself, so that another may be built in this process."""
        ...


def model_inputs(microbatch: Microbatch, device: torch.device, normalizer: Tensor) -> dict[str, Tensor | None]:
    """The model's keyword arguments. document_ids is dropped when no attention mask is needed."""
    inputs: dict[str, Tensor | None] = {k: microbatch[k].to(device) for k in MODEL_INPUTS if k in microbatch}
    inputs["inputs"] = inputs.pop("noisy_ids")
    if "target_ids" in inputs:
        inputs["normalizer"] = normalizer
    documents = microbatch.get("document_ids")
    if documents is not None and bool((documents == documents[:, :1]).all()):
        inputs["document_ids"] = None
    return inputs


def joined_inputs(microbatches: Sequence[Microbatch], device: torch.device) -> Microbatch:
    """The inputs of all microbatches end to end, without document_ids where no microbatch needs a mask, without normalizer."""
    joined = {k: torch.cat([m[k] for m in microbatches]) for k in MODEL_INPUTS if k in microbatches[0]}
    documents = joined.get("document_ids")
    if documents is not None and bool((documents == documents[:, :1]).all()):
        del joined["document_ids"]
    joined["inputs"] = joined.pop("noisy_ids")
    return {k: tensor.to(device) for k, tensor in joined.items()}
