"""The torch-native engine: ZeRO-3 by `fully_shard` (FSDP2), with tensor and pipeline parallelism under every schedule.

Without a pipeline each block is gathered for its forward and again for its backward, and gradients are reduced with every
microbatch: the memory of one block, and float32 sums of shards. With one, a chunk is gathered once a step and its gradients,
summed in float32 over the microbatches, are reduced once: more passes over the network would cost more than the pipeline saves.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from parallel.block import DiffusionHead, TransformerBlock
from parallel.boxes import Boxes, boxes_of_flat_range
from parallel.engine import AdamWOptions, LossOutput, Microbatch, StepResult, model_inputs
from parallel.grad_norm import clip_, global_grad_norm
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.optimizer import MOMENTS, build_optimizer, create_moments, set_steps
from parallel.pipeline import Pipeline, Stage
from parallel.shape import ModelShape, parameter_table

# True of the embedding, and harmless: nothing writes into what it returns (parallel.block and pretrain.model add out of place).
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPTokenEmbedding\) returned a view")


class _SummingStage(Stage):
    """A stage whose microbatches add up their gradients in float32, whatever the weights are gathered in.

    Split backwards put weight gradients into `.grad` behind FSDP's back, several microbatches in a row: they would add up in
    bf16. With float32 zeros to begin with, every path adds in float32, and no parameter is left without a gradient.
    """

    def backward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        for parameter in self.submod.parameters():
            if parameter.grad is None:
                parameter.grad_dtype = torch.float32
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        return super().backward_maybe_with_nosync(*args, **kwargs)


class Fsdp2Engine:
    """An `Engine` (parallel.engine) over FSDP2. Raises ValueError for an optimizer that cannot work on its parameters."""

    # In a pipeline a chunk stays gathered from its first forward to its last backward. If a block were dropped after its forward,
    # a split backward (zero bubble) would look for weights that are not there, and lose their gradients without a word.
    reshard_with_pipeline = False

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        shape: ModelShape,
        mesh: Mesh,
        layout: Layout,
        *,
        optimizer: AdamWOptions,
        micro_batch_size: int,
        accumulation: int,
        sequence_length: int,
        grad_clip: float,
        bf16: bool,
    ):
        if optimizer.impl == "apex":
            raise ValueError(
                "optimizer.impl apex with parallel.engine fsdp2: apex's FusedAdam cannot step sharded parameters (DTensor); use "
                "optimizer.impl=torch or parallel.engine=deepspeed"
            )
        self.mesh, self.chunks = mesh, list(chunks)
        self.vocab_size = shape.vocab_size
        self._accumulation, self._grad_clip = accumulation, grad_clip
        self._table = parameter_table(shape)
        self._padded_vocab = shape.padded_vocab(mesh.tp)
        device_mesh = _device_mesh(mesh)
        reshard = self.reshard_with_pipeline if mesh.pp > 1 else None  # None: all but the root
        units = [(chunk, _shard(chunk, device_mesh, reshard, bf16)) for chunk in self.chunks]
        self._units = [unit for _, of_chunk in units for unit in of_chunk]
        self._names = [(chunk, names) for chunk, of_chunk in units for names in _names(chunk, of_chunk)]
        self._parameters = {n: p for chunk in self.chunks for n, p in chunk.named_parameters()}
        decayed = {name for name in self._parameters if self._table[name].decayed}
        self._optimizer = build_optimizer(self._parameters, optimizer, decayed)
        create_moments(self._optimizer)
        self._pipeline: Optional[Pipeline] = None
        if mesh.pp > 1:
            self._pipeline = Pipeline(
                dict(zip(layout.chunks_of(mesh.pp_rank), self.chunks)),
                layout,
                mesh,
                micro_batch_size=micro_batch_size,
                accumulation=accumulation,
                sequence_length=sequence_length,
                hidden_size=shape.hidden_size,
                dtype=torch.bfloat16 if bf16 else torch.float32,
                stage_class=_SummingStage,
            )

    def train_step(
        self,
        microbatches: Sequence[Microbatch],
        normalizer: float,
        lr: float,
        before_update: Optional[Callable[[], object]] = None,
    ) -> StepResult:
        if len(microbatches) != self._accumulation:
            raise ValueError(f"{len(microbatches)} microbatches, engine built for {self._accumulation}")
        outputs = self._backward(microbatches, normalizer)
        if before_update:
            before_update()
        norm, applied = self._apply(lr)
        return StepResult(outputs, norm, applied)

    @torch.no_grad()
    def forward(self, microbatch: Microbatch) -> Any:
        try:
            if self._pipeline:
                return self._pipeline.forward(microbatch)
            return self.chunks[0](**model_inputs(microbatch, self.mesh.device, torch.ones((), device=self.mesh.device)))
        finally:  # what is still gathered would outlive a load or an optimizer step
            for unit in self._units:
                unit.reshard()

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for unit, (chunk, names) in zip(self._units, self._names):
            unit.unshard()
            try:
                for name in names:
                    yield name, chunk.get_parameter(name).detach()
            finally:
                unit.reshard()

    def state(self) -> dict[str, Boxes]:
        """`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` -> boxes that view the live float32 values."""
        boxes = {
            f"weight/{name}": self._boxes(name, _shard_of(parameter)) for name, parameter in self._parameters.items()
        }
        for moment in MOMENTS:
            for name, parameter in self._parameters.items():
                boxes[f"{moment}/{name}"] = self._boxes(name, _shard_of(self._optimizer.state[parameter][moment]))
        return boxes

    def state_written(self, optimizer_steps: int) -> None:
        """Called after values were written into `state()`: Adam's step counters follow. Forwards gather what is there."""
        set_steps(self._optimizer, optimizer_steps)

    def local_gradients(self) -> dict[str, Boxes]:
        """`gradient/NAME` -> boxes of what this rank holds of the reduced, unclipped gradient, between backward and step."""
        return {f"gradient/{name}": self._boxes(name, gradient) for name, gradient in self._gradients()}

    def close(self) -> None:
        """Lets go of model and optimizer; the engine cannot be used again."""
        self._pipeline = None
        del self.chunks, self._units, self._names, self._parameters, self._optimizer

    def _backward(self, microbatches: Sequence[Microbatch], normalizer: float) -> list[LossOutput]:
        """Forward and backward of all microbatches; after it the gradients are reduced."""
        denominator = torch.tensor(normalizer, dtype=torch.float64, device=self.mesh.device)
        if self._pipeline:
            return self._pipeline.train(microbatches, denominator)
        return [
            self._backward_one(microbatch, denominator, last=microbatch is microbatches[-1])
            for microbatch in microbatches
        ]

    def _backward_one(self, microbatch: Microbatch, denominator: Tensor, last: bool) -> LossOutput:
        for unit in self._units:
            unit.set_requires_all_reduce(last, recurse=False)  # over replicas: their shards add up first
        output = self.chunks[0](**model_inputs(microbatch, self.mesh.device, denominator))
        output.loss.backward()
        return LossOutput(*(x.detach() for x in output))

    def _apply(self, lr: float) -> tuple[float, bool]:
        """Clips and steps, or skips; (norm before clipping, applied)."""
        gradients = self._gradients()
        norm = float(global_grad_norm(gradients, self._table, self.mesh))
        applied = math.isfinite(norm)
        if applied:
            clip_([gradient for _, gradient in gradients], norm, self._grad_clip)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm, applied

    def _gradients(self) -> list[tuple[str, Tensor]]:
        """This rank's shards, by name."""
        missing = [name for name, parameter in self._parameters.items() if parameter.grad is None]
        if missing:
            raise RuntimeError(f"no gradient arrived at {', '.join(missing)}")
        return [(name, _shard_of(parameter.grad)) for name, parameter in self._parameters.items()]

    def _boxes(self, name: str, shard: Tensor) -> Boxes:
        """Of a shard: FSDP cuts the rows of the tensor-parallel share into equal parts, the last ones shorter or empty."""
        spec, local = self._table[name], self._table[name].local_shape(self.mesh.tp, self._padded_vocab)
        first_row = min(self.mesh.shard_rank * -(-local[0] // self.mesh.shard), local[0])
        start = first_row * math.prod(local[1:])
        return boxes_of_flat_range(spec.shape, local, spec.tp_dim, self.mesh.tp_rank, shard.view(-1), start)


def _shard_of(tensor: Optional[Tensor]) -> Tensor:
    """The values that this rank holds; they alias the sharded tensor's."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


def _device_mesh(mesh: Mesh) -> DeviceMesh:
    """The ranks that share one set of shards; with replicas of the set, (replica, shard)."""
    kind = mesh.device.type
    assert mesh.shard_group is not None
    if mesh.replica_group is None:
        return DeviceMesh.from_group(mesh.shard_group, kind, mesh_dim_names=("shard",))
    first = mesh.pp_rank * mesh.dp * mesh.tp + mesh.tp_rank
    ranks = torch.arange(first, first + mesh.dp * mesh.tp, mesh.tp).view(mesh.replicas, mesh.shard)
    groups = [mesh.replica_group, mesh.shard_group]
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=("replica", "shard"))


def _shard(chunk: nn.Module, device_mesh: DeviceMesh, reshard: Optional[bool], bf16: bool) -> list[Any]:
    """`fully_shard` of what is gathered together: each block, the embedding, the head, and the rest of the chunk, its root.

    reshard: drop what was gathered after the forward (None: but for the root). Parameters become float32 shards. What they share
    of their values with another unit (tied embeddings) stays with the root. Inputs keep their dtype: a weight of the loss, a
    normaliser and rotary angles are no activations.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    parts = [m for m in chunk.modules() if isinstance(m, (TransformerBlock, VocabParallelEmbedding, DiffusionHead))]
    owners = Counter(id(parameter) for part in parts for parameter in part.parameters())
    units = [part for part in parts if all(owners[id(parameter)] == 1 for parameter in part.parameters())]
    for unit in [*units, chunk]:
        fully_shard(unit, mesh=device_mesh, reshard_after_forward=reshard, mp_policy=policy)
        assert isinstance(unit, FSDPModule)
        # A sum, as the loss is one over the global batch. Plain sums also because gloo has no pre-multiplied ones.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if not isinstance(unit, TransformerBlock) and unit is not chunk:
            unit.set_unshard_in_backward(False)  # neither a look-up nor the loss (parallel.loss) reads its matrix again
    return [*units, chunk]


def _names(chunk: nn.Module, units: Sequence[nn.Module]) -> list[list[str]]:
    """The names within the chunk of what each unit gathers: the last, the chunk itself, what the others leave."""
    names = {id(parameter): name for name, parameter in chunk.named_parameters()}
    return [[names.pop(id(p)) for p in unit.parameters() if id(p) in names] for unit in units]
