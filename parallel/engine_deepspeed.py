"""The DeepSpeed engine: ZeRO-3 over the data-parallel ranks, tensor parallelism through `mpu=`; public API only.

Proven equal to one process: loss, gradient norm, parameters (tests/distributed). What it takes:
- every tensor-parallel parameter is tagged, or the global norm silently counts it wrong;
- the loss is multiplied by the data-parallel size, since ZeRO averages gradients over the ranks and the loss is a sum
  over the global batch by a denominator known beforehand;
- on a CPU: the client's AdamW, and no op that would be compiled at start-up.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.boxes import Boxes, boxes_of_flat_partition
from parallel.engine import AdamWOptions, Microbatch, StepResult, model_inputs
from parallel.mesh import Mesh
from parallel.shape import ModelShape, parameter_table

MOMENTS = ("exp_avg", "exp_avg_sq")


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
        return self._mesh.tp_group

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp

    def get_data_parallel_group(self):
        return self._mesh.dp_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def _optimizer(module: nn.Module, options: AdamWOptions, decayed: set[str]) -> torch.optim.Optimizer:
    """AdamW over two groups: matrices with weight decay, norm gains without."""
    named = list(module.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": options.weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    if options.impl == "apex":
        from parallel.apex_support import require_apex

        require_apex("optimizer.impl")
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, lr=0.0, betas=options.betas, eps=options.eps, adam_w_mode=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps, fused=torch.cuda.is_available())


class DeepSpeedEngine:
    """An `Engine` (parallel.engine) over DeepSpeed ZeRO-3."""

    def __init__(
        self,
        module: nn.Module,
        shape: ModelShape,
        mesh: Mesh,
        *,
        optimizer: AdamWOptions,
        micro_batch_size: int,
        accumulation: int,
        grad_clip: float,
        bf16: bool,
    ):
        deepspeed = import_deepspeed()
        self.mesh = mesh
        self.module = module
        self.vocab_size = shape.vocab_size
        self._impl = optimizer.impl
        self._table = parameter_table(shape)
        self._padded_vocab = shape.padded_vocab(mesh.tp)
        for name, parameter in module.named_parameters():
            setattr(parameter, "tensor_model_parallel", self._table[name].tp_dim is not None)  # noqa: B010
        # A block is fetched as a whole: one all-gather, and no hook inside the region that train.compile traces.
        from parallel.block import TransformerBlock

        deepspeed.utils.set_z3_leaf_modules(module, [TransformerBlock])
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
        client = _optimizer(module, optimizer, {n for n, spec in self._table.items() if spec.decayed})
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=client,
            mpu=_ModelParallelUnit(mesh),
            dist_init_required=False,
            config=_config(module, mesh, micro_batch_size, accumulation, grad_clip, bf16),
        )
        self._zero = self._engine.optimizer
        self._create_moments()

    def train_step(self, microbatches: Sequence[Microbatch], normalizer: float, lr: float) -> StepResult:
        if len(microbatches) != self._engine.gradient_accumulation_steps():
            raise ValueError(
                f"{len(microbatches)} microbatches, engine built for {self._engine.gradient_accumulation_steps()}"
            )
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.train()
        denominator = torch.tensor(normalizer, dtype=torch.float64, device=self.mesh.device)
        outputs = []
        for microbatch in microbatches:
            output = self._engine(**model_inputs(microbatch, self.mesh.device, denominator))
            self._engine.backward(output.loss * self.mesh.dp, scale_wrt_gas=False)
            self._engine.step()
            outputs.append(type(output)(*(x.detach() for x in output)))
        return StepResult(outputs, float(self._engine.get_global_grad_norm()), not self._zero.overflow)

    @torch.no_grad()
    def forward(self, microbatch: Microbatch) -> Any:
        self._engine.eval()
        return self._engine(**model_inputs(microbatch, self.mesh.device, torch.ones((), device=self.mesh.device)))

    def state(self) -> dict[str, Boxes]:
        """`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` -> boxes that view the live float32 values."""
        boxes = {}
        for name, parameter in self.module.named_parameters():
            spec = self._table[name]
            local = spec.local_shape(self.mesh.tp, self._padded_vocab)
            for kind in ("weight", *MOMENTS):
                boxes[f"{kind}/{name}"] = boxes_of_flat_partition(
                    spec.shape,
                    local,
                    spec.tp_dim,
                    self.mesh.tp_rank,
                    self._partition(parameter, kind),
                    self.mesh.dp_rank,
                )
        return boxes

    def state_written(self, optimizer_steps: int) -> None:
        """Called after values were written into `state()`: the forward's copies and Adam's step counters follow."""
        for parameter in self.module.parameters():
            sharded: Any = parameter
            sharded.ds_tensor.data.copy_(self._partition(parameter, "weight"))
        for group in self._zero.optimizer.param_groups:
            if "step" in group or self._impl == "apex":  # NVIDIA's FusedAdam counts steps by group
                group["step"] = optimizer_steps
        for moments in self._zero.optimizer.state.values():
            if isinstance(moments["step"], Tensor):
                moments["step"].fill_(optimizer_steps)
            else:
                moments["step"] = optimizer_steps

    def _partition(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """This rank's flat float32 partition (a view; nothing is offloaded)."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        return (
            safe_get_local_fp32_param(parameter)
            if kind == "weight"
            else safe_get_local_optimizer_state(parameter, kind)
        )

    def _create_moments(self) -> None:
        """DeepSpeed leaves Adam's state empty until the first step; a load before it needs somewhere to write."""
        inner = self._zero.optimizer
        for flat in self._zero.fp32_partitioned_groups_flat:
            if not inner.state[flat]:
                inner.state[flat].update(
                    step=torch.zeros(
                        (), dtype=torch.float32, device=flat.device if torch.cuda.is_available() else "cpu"
                    ),
                    exp_avg=torch.zeros_like(flat.data),
                    exp_avg_sq=torch.zeros_like(flat.data),
                )


def _config(
    module: nn.Module, mesh: Mesh, micro: int, accumulation: int, grad_clip: float, bf16: bool
) -> dict[str, Any]:
    largest = max(p.numel() for p in module.parameters())
    total = sum(p.numel() for p in module.parameters())
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": grad_clip,
        "steps_per_print": 10**9,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            # Every parameter is sharded, norm gains too: one rule, and the checkpoint's boxes cover each once.
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": largest,
            "stage3_max_live_parameters": max(2 * largest, total // 8),
            "stage3_max_reuse_distance": max(2 * largest, total // 8),
            "reduce_bucket_size": max(largest, 50_000_000),
            "sub_group_size": 10**12,
        },
    }
