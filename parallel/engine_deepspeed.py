"""The DeepSpeed engine: ZeRO-0 to 3 over the data-parallel ranks, with tensor and pipeline parallelism.

Proven equal to one process: loss, gradients, norm, weights (tests/distributed). What it takes:
- every tensor-parallel parameter is tagged, or the global norm silently counts it wrong;
- the loss is multiplied by the number of ranks that ZeRO averages gradients over, since the loss is a sum over the global
  batch by a denominator known beforehand;
- in a pipeline the schedule calls the chunks themselves; parallel.deepspeed_fixes says why, and what else it takes;
- on a CPU: the client's AdamW, and no op that would be compiled at start-up.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from parallel import deepspeed_fixes, deepspeed_state
from parallel.boxes import Boxes, boxes_of_flat_range
from parallel.engine import AdamWOptions, LossOutput, Microbatch, StepResult, model_inputs
from parallel.grad_norm import clip_, global_grad_norm
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.optimizer import MOMENTS, build_optimizer
from parallel.pipeline import Pipeline
from parallel.shape import ModelShape, parameter_table
from parallel.whole_parameters import by_unit, gathered_by_zero3


def import_deepspeed() -> Any:
    """DeepSpeed, made to work on a machine without GPUs or compiler."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    import deepspeed
    from deepspeed.utils import logger

    # Else init_distributed compiles a C++ op for 40 s; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel("WARNING")
    return deepspeed


class _ModelParallelUnit:
    """What DeepSpeed asks of `mpu`, answered by the mesh."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def get_model_parallel_group(self):
        return deepspeed_fixes.norm_group(self._mesh)

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp

    def get_data_parallel_group(self):
        return self._mesh.shard_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.shard_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.shard

    def get_tensor_model_parallel_group(self):
        return self._mesh.tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class _Stage(nn.Module):
    """The chunks of one pipeline rank under one root: one engine, one norm, one step for all of them. Never called."""

    def __init__(self, chunks: Sequence[nn.Module]):
        super().__init__()
        self.chunks = nn.ModuleList(chunks)


class DeepSpeedEngine:
    """An `Engine` (parallel.engine) over DeepSpeed. Raises ValueError for layouts that DeepSpeed cannot do."""

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
        deepspeed = import_deepspeed()
        if mesh.pp > 1 or mesh.replicas > 1:
            deepspeed_fixes.require_version(deepspeed.__version__)
        if bf16 and layout.zero_stage == 0:
            raise ValueError(
                "parallel.zero_stage 0 with train.precision bf16: DeepSpeed has no such optimizer that accumulates gradients in "
                "fp32; use parallel.zero_stage=1"
            )
        if mesh.replicas > 1 and layout.zero_stage != 3:
            raise ValueError("parallel.shard_group needs parallel.zero_stage 3")
        self.mesh, self.chunks = mesh, list(chunks)
        self.vocab_size = shape.vocab_size
        self._stage, self._impl, self._grad_clip = layout.zero_stage, optimizer.impl, grad_clip
        self._accumulation = accumulation
        self._table = parameter_table(shape)
        self._padded_vocab = shape.padded_vocab(mesh.tp)
        self._parameters = {n: p for chunk in self.chunks for n, p in chunk.named_parameters()}
        for name, parameter in self._parameters.items():
            setattr(parameter, "tensor_model_parallel", self._table[name].tp_dim is not None)  # noqa: B010
        root = _Stage(self.chunks) if mesh.pp > 1 else self.chunks[0]
        # A block is fetched as a whole: one all-gather, and no hook inside the region that train.compile traces.
        from parallel.block import TransformerBlock

        deepspeed.utils.set_z3_leaf_modules(root, [TransformerBlock])
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
        deepspeed_fixes.number_alike()
        exact = {n: p.data for n, p in self._parameters.items()} if bf16 else {}
        self._engine, *_ = deepspeed.initialize(
            model=root,
            optimizer=build_optimizer(
                self._parameters, optimizer, {n for n, spec in self._table.items() if spec.decayed}
            ),
            mpu=_ModelParallelUnit(mesh),
            dist_init_required=False,
            config=_config(list(self._parameters.values()), layout, micro_batch_size, accumulation, grad_clip, bf16),
        )
        self._zero = self._engine.optimizer
        self._check_sub_groups()
        if mesh.replicas > 1:
            deepspeed_fixes.one_norm_for_replicas(self._zero, mesh)
        deepspeed_state.create_moments(self._zero)
        self._restore_masters(exact)
        self._pipeline: Optional[Pipeline] = None
        if mesh.pp > 1:
            if bf16:
                deepspeed_fixes.accumulate_in_float32(self._parameters.values())
            self._pipeline = Pipeline(
                dict(zip(layout.chunks_of(mesh.pp_rank), self.chunks)),
                layout,
                mesh,
                micro_batch_size=micro_batch_size,
                accumulation=accumulation,
                sequence_length=sequence_length,
                hidden_size=shape.hidden_size,
                dtype=torch.bfloat16 if bf16 else torch.float32,
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
        self._engine.eval()
        if self._pipeline:
            return self._pipeline.forward(microbatch)
        return self._engine(**model_inputs(microbatch, self.mesh.device, torch.ones((), device=self.mesh.device)))

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for unit in by_unit(self._parameters):
            with gathered_by_zero3(unit.values()) if self._stage == 3 else contextlib.nullcontext():
                for name, parameter in unit.items():
                    yield name, parameter.data

    def state(self) -> dict[str, Boxes]:
        """`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` -> boxes that view the live float32 values."""
        return {
            f"{kind}/{name}": self._boxes(name, self._values(parameter, kind))
            for name, parameter in self._parameters.items()
            for kind in ("weight", *MOMENTS)
        }

    def state_written(self, optimizer_steps: int) -> None:
        """Called after values were written into `state()`: the forward's copies and Adam's step counters follow."""
        shard_rank = self.mesh.shard_rank
        deepspeed_state.copy_to_forward(self._zero, self._stage, list(self._parameters.values()), shard_rank)
        deepspeed_state.set_step(self._zero, optimizer_steps, self._impl)

    def local_gradients(self) -> dict[str, Boxes]:
        """`gradient/NAME` -> boxes of what this rank holds of the reduced, unclipped gradient, between backward and step."""
        names = {parameter: name for name, parameter in self._parameters.items()}
        return {
            f"gradient/{names[parameter]}": self._boxes(names[parameter], held)
            for parameter, held in deepspeed_state.gradients(self._zero, self._stage, self.mesh.shard_rank)
        }

    def close(self) -> None:
        """Removes every hook and reference that DeepSpeed keeps; the engine cannot be used again."""
        from deepspeed.utils import groups

        root = self._engine.module
        self._engine.destroy()
        deepspeed_fixes.forget(root)
        groups.mpu = None
        self._pipeline = None
        del self._engine, self._zero, self.chunks, self._parameters

    def _backward(self, microbatches: Sequence[Microbatch], normalizer: float) -> list[LossOutput]:
        """Forward and backward of all microbatches; after it the gradients are reduced."""
        self._engine.train()
        denominator = torch.tensor(normalizer, dtype=torch.float64, device=self.mesh.device)
        if self._pipeline:
            with self._reduced_once(), self._gathered_once():
                outputs = self._pipeline.train(microbatches, denominator, loss_scale=float(self.mesh.shard))
        else:
            outputs = [
                self._backward_one(microbatch, denominator, last=microbatch is microbatches[-1])
                for microbatch in microbatches
            ]
        if self.mesh.replicas > 1:
            deepspeed_fixes.sum_over_replicas(self._zero, self.mesh)
        return outputs

    def _backward_one(self, microbatch: Microbatch, denominator: Tensor, last: bool) -> LossOutput:
        self._engine.set_gradient_accumulation_boundary(last)
        output = self._engine(**model_inputs(microbatch, self.mesh.device, denominator))
        self._engine.backward(output.loss * self.mesh.shard, scale_wrt_gas=False)
        return type(output)(*(x.detach() for x in output))

    def _gathered_once(self) -> contextlib.AbstractContextManager:
        return deepspeed_fixes.gathered_once(self._zero, self.chunks) if self._stage == 3 else contextlib.nullcontext()

    @contextlib.contextmanager
    def _reduced_once(self) -> Iterator[None]:
        """Inside, gradients add up on this rank; at the end they are reduced over the ranks, once."""
        if hasattr(self._zero, "_coalesce_grad_reduction"):  # its marker of optimizers that the public method takes
            with self._engine.coalesce_grad_reduction():
                yield
            return
        yield
        if self._stage:  # BF16_Optimizer: into its float32 buffers
            self._zero.backward_epilogue()
            self._zero.clear_lp_grads(set_to_none=True)
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()

    def _apply(self, lr: float) -> tuple[float, bool]:
        """Clips and steps, or skips; (norm before clipping, applied)."""
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.set_gradient_accumulation_boundary(True)
        if self._stage:
            self._engine.step()
            return float(self._engine.get_global_grad_norm()), not self._zero.overflow
        return self._step_plain()

    def _step_plain(self) -> tuple[float, bool]:
        """ZeRO-0 is no optimizer of DeepSpeed's: nobody else takes the norm, clips, or looks for gradients that are not finite."""
        gradients = {name: parameter.grad for name, parameter in self._parameters.items() if parameter.grad is not None}
        norm = float(global_grad_norm(gradients.items(), self._table, self.mesh, sharded=False))
        if not math.isfinite(norm):
            self._engine.zero_grad()
            return norm, False
        clip_(list(gradients.values()), norm, self._grad_clip)
        self._engine.step()
        return norm, True

    def _values(self, parameter: nn.Parameter, kind: str) -> deepspeed_state.Range:
        return deepspeed_state.values(self._zero, self._stage, parameter, kind, self.mesh.shard_rank)

    def _boxes(self, name: str, held: deepspeed_state.Range) -> Boxes:
        spec, (start, values) = self._table[name], held
        local = spec.local_shape(self.mesh.tp, self._padded_vocab)
        return boxes_of_flat_range(spec.shape, local, spec.tp_dim, self.mesh.tp_rank, values, start)

    def _check_sub_groups(self) -> None:
        """ZeRO-3 takes the norm once per sub-group: stages with different numbers of them would wait for each other."""
        if self._stage == 3 and len(self._zero.fp16_groups) != len(self._zero.param_groups):
            raise RuntimeError("ZeRO-3 has cut this rank's parameters into sub-groups; sub_group_size is too small")

    def _restore_masters(self, exact: dict[str, Tensor]) -> None:
        """DeepSpeed makes its float32 weights from the bf16 ones; here they begin at the exact initial values."""
        for name, whole in exact.items():
            start, held = self._values(self._parameters[name], "weight")
            part = whole.view(-1)[start : start + held.numel()]
            held[: part.numel()].copy_(part)


def _config(
    parameters: Sequence[nn.Parameter],
    layout: Layout,
    micro: int,
    accumulation: int,
    grad_clip: float,
    bf16: bool,
) -> dict[str, Any]:
    largest = max(p.numel() for p in parameters)
    total = sum(p.numel() for p in parameters)
    # ZeRO-2's contiguous buffer is of the weights' type: float32 sums would be rounded to bf16 on their way through it.
    rounding_buffer = bf16 and layout.zero_stage == 2
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": grad_clip if layout.zero_stage else 0.0,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every forward
        "bf16": {"enabled": bf16, "check_grad_overflow": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": layout.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": not rounding_buffer,
            # Every parameter is sharded, norm gains too: one rule, and the checkpoint's boxes cover each once.
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": largest,
            "stage3_max_live_parameters": max(2 * largest, total // 8),
            "stage3_max_reuse_distance": max(2 * largest, total // 8),
            "reduce_bucket_size": max(largest, 50_000_000),
            "sub_group_size": 10**12,
        },
    }
