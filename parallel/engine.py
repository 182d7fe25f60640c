"""What the training loop asks of an engine, whatever shards the parameters underneath."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Protocol

import torch
from torch import Tensor, nn

from parallel.attention import find_documents
from parallel.boxes import Boxes
from parallel.mesh import Mesh
from parallel.visibility import find_visibility

Microbatch = dict[str, Tensor]

# The tensors of a microbatch that the model's forward takes (the rest is for metrics).
MODEL_INPUTS = (
    *("noisy_ids", "soft_ids", "soft_weights", "position_ids", "document_ids", "visibility"),
    *("target_ids", "masked", "weight", "current_ids", "alpha"),
)

# Of these, what is looked at on the host before it goes to the device.
ON_HOST = ("document_ids", "visibility")


class LossOutput(NamedTuple):
    """What the model gives when it knows the targets. Only `loss` carries a gradient."""

    loss: Tensor  # scalar: sum(weight * value) / normalizer of the microbatch
    value: Tensor  # [B, L]: the row loss of counted tokens, without their weight, else 0
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

    def train_step(
        self,
        microbatches: Sequence[Microbatch],
        normalizer: float,
        lr: float,
        before_update: Optional[Callable[[], object]] = None,
    ) -> StepResult:
        """Forward and backward of every microbatch, one clipped optimizer step.

        The gradient is that of sum(weight * value) / normalizer over ALL microbatches of ALL data-parallel ranks:
        `normalizer` is the global denominator, nothing is averaged. before_update: called behind the backward, when `state()`
        is still as the step before left it.
        """
        ...

    def forward(self, microbatch: Microbatch) -> Any:
        """The model's output without gradients (loss normalised by 1)."""
        ...

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, this rank's tensor-parallel share, whole over the data-parallel ranks, vocabulary padding included) of every
        parameter in this rank's chunks, in the dtype and with the bits that a forward computes with.

        One block in memory at a time: a tensor is good until the next is asked for, and is not to be written to. Taken to its
        end or left early, the engine goes on as if nobody had looked; leaving early is up to all ranks alike.
        """
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


def model_inputs(microbatch: Microbatch, device: torch.device, normalizer: Tensor) -> dict[str, Any]:
    """The model's keyword arguments on `device`; document_ids and visibility as find_documents and find_visibility give them."""
    inputs: dict[str, Any] = {k: microbatch[k].to(device) for k in MODEL_INPUTS if k in microbatch and k not in ON_HOST}
    inputs["inputs"] = inputs.pop("noisy_ids")
    if "target_ids" in inputs:
        inputs["normalizer"] = normalizer
    if "document_ids" in microbatch:
        inputs["document_ids"] = find_documents(microbatch["document_ids"], device)
    if "visibility" in microbatch:
        inputs["visibility"] = find_visibility(microbatch["visibility"], device)
    return inputs


def joined_inputs(microbatches: Sequence[Microbatch], device: torch.device) -> Microbatch:
    """The inputs of all microbatches end to end, without normalizer; what is `ON_HOST` where it is, for each stage to look at."""
    joined = {k: torch.cat([m[k] for m in microbatches]) for k in MODEL_INPUTS if k in microbatches[0]}
    joined["inputs"] = joined.pop("noisy_ids")
    return {k: tensor if k in ON_HOST else tensor.to(device) for k, tensor in joined.items()}
