"""Planted faults in how the two engines are driven: tags, scales, dtypes, norms, groups."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests.distributed.matrix_faults import mutant

# The DeepSpeed engine.


def _deepspeed_config(**changes: Any):
    """Patches what DeepSpeed is told; keys of zero_optimization as ZERO_key."""
    from parallel import engine_deepspeed

    config = engine_deepspeed._config

    def changed(*args):
        told = config(*args)
        for key, value in changes.items():
            section, key = (told["zero_optimization"], key[5:]) if key.startswith("ZERO_") else (told, key)
            assert key in told or key in section
            section[key] = value
        return told

    return patch.object(engine_deepspeed, "_config", changed)


def _tags(choose: Callable[[bool], bool]):
    """Patches the marks by which DeepSpeed knows tensor-parallel parameters."""
    from parallel import engine_deepspeed

    def mark(parameter, name, sharded):
        setattr(parameter, name, choose(sharded))

    return patch.object(engine_deepspeed, "setattr", mark, create=True)


@mutant("tensor-parallel parameters are not tagged", "z3 tp2 x2", "z1 tp2 x2", "z3 pp2 tp2 1f1b x4")
def tensor_parallel_parameters_untagged():
    with _tags(lambda sharded: False):
        yield


@mutant("replicated parameters count once for each tensor-parallel rank", "z3 tp2 x2", "z2 pp2 tp2 gpipe x4")
def replicated_parameters_counted_tp_times():
    with _tags(lambda sharded: True):
        yield


@mutant("gradients are averaged over data-parallel ranks", "z3 dp2 x2", "z1 dp2 x2", "z0 dp2 x2")
def deepspeed_gradients_averaged():
    from deepspeed.runtime.engine import DeepSpeedEngine

    backward = DeepSpeedEngine.backward

    def averaged(self, loss, **options):
        return backward(self, loss / self.dp_world_size, **options)

    with patch.object(DeepSpeedEngine, "backward", averaged):
        yield


@mutant("gradients are averaged over data-parallel ranks", "z3 pp2 dp2 1f1b x4", "z0 pp2 dp2 gpipe x4")
def deepspeed_pipeline_gradients_averaged():
    from parallel import pipeline

    train = pipeline.Pipeline.train

    def averaged(self, microbatches, normalizer, loss_scale=1.0):
        return train(self, microbatches, normalizer, 1.0)

    with patch.object(pipeline.Pipeline, "train", averaged):
        yield


@mutant("gradients travel in bf16", "z3 dp2 x2", "z1 dp2 x2", "z3 pp2 dp2 interleaved x4")
def deepspeed_reduces_in_bf16():
    with _deepspeed_config(communication_data_type="bf16"):
        yield


@mutant("nothing is clipped", "z3 dp2 x2", "z2 pp2 dp2 1f1b x4")
def deepspeed_does_not_clip():
    with _deepspeed_config(gradient_clipping=0.0):
        yield


@mutant("each stage clips by its own norm", "z3 pp2 dp2 1f1b x4", "z1 pp4 1f1b stages 1-1-2-1 x4")
def deepspeed_stage_norms():
    from parallel import deepspeed_fixes

    with patch.object(deepspeed_fixes, "norm_group", lambda mesh: mesh.tp_group):
        yield


@mutant("replicas of a shard keep their own gradients", "z3 dp4 shard 2 x2", "z3 pp2 dp4 1f1b shard 2 x2")
def deepspeed_replicas_not_summed():
    from parallel import deepspeed_fixes

    with patch.object(deepspeed_fixes, "sum_over_replicas", lambda zero, mesh: None):
        yield


@mutant("microbatches of a pipeline are reduced one by one", "z3 pp2 dp2 interleaved x4")
def deepspeed_pipeline_not_coalesced():
    from parallel import engine_deepspeed

    with patch.object(engine_deepspeed.DeepSpeedEngine, "_reduced_once", lambda self: contextlib.nullcontext()):
        yield


@mutant("stages have different numbers of ZeRO sub-groups", "z3 pp2 dp2 1f1b x4", hangs=True)
def deepspeed_small_sub_groups():
    from parallel import engine_deepspeed

    unchecked = patch.object(engine_deepspeed.DeepSpeedEngine, "_check_sub_groups", lambda self: None)
    with _deepspeed_config(ZERO_sub_group_size=8000), unchecked:
        yield


# The FSDP2 engine.


def _fsdp2_policy(**changes: Any):
    """Patches the dtypes in which FSDP2 gathers and reduces."""
    from parallel import engine_fsdp2

    policy = engine_fsdp2.MixedPrecisionPolicy
    return patch.object(engine_fsdp2, "MixedPrecisionPolicy", lambda **told: policy(**told | changes))


@mutant(
    "blocks are dropped between the halves of a split backward",
    "fsdp2 pp2 dp2 zbv x4",
    "fsdp2 pp2 dp2 interleaved_zb x4",
)
def fsdp2_reshards_with_zero_bubble():
    from parallel.engine_fsdp2 import Fsdp2Engine

    with patch.object(Fsdp2Engine, "reshard_with_pipeline", True):
        yield


@mutant("gradients are averaged over data-parallel ranks", "fsdp2 dp2 x2", "fsdp2 pp2 dp2 gpipe x4")
def fsdp2_gradients_averaged():
    from torch.distributed.fsdp import FSDPModule

    factor = FSDPModule.set_gradient_divide_factor

    def averaged(self, _sum):
        factor(self, 2.0)

    with patch.object(FSDPModule, "set_gradient_divide_factor", averaged):
        yield


@mutant("gradients travel in bf16", "fsdp2 dp2 x2", "fsdp2 pp2 dp2 zbv x4")
def fsdp2_reduces_in_bf16():
    with _fsdp2_policy(reduce_dtype=torch.bfloat16):
        yield


@mutant("each rank clips by the norm of what it holds", "fsdp2 dp2 x2", "fsdp2 pp2 dp2 1f1b x4", "z0 pp2 dp2 gpipe x4")
def norms_of_one_rank():
    from parallel import grad_norm

    with patch.object(grad_norm, "dist", SimpleNamespace(all_reduce=lambda tensor: None)):
        yield


@mutant("replicated parameters count once for each tensor-parallel rank", "fsdp2 tp2 x2", "fsdp2 pp2 tp2 zbv x4")
def fsdp2_replicated_parameters_counted_tp_times():
    from parallel import engine_fsdp2

    norm = engine_fsdp2.global_grad_norm

    def counted(gradients, table, mesh):
        return norm(gradients, {name: replace(spec, tp_dim=0) for name, spec in table.items()}, mesh)

    with patch.object(engine_fsdp2, "global_grad_norm", counted):
        yield


@mutant("nothing is clipped", "fsdp2 dp2 x2", "fsdp2 pp2 dp2 zbv x4")
def fsdp2_does_not_clip():
    from parallel import engine_fsdp2

    with patch.object(engine_fsdp2, "clip_", lambda gradients, norm, limit: None):
        yield


@mutant("replicas of a shard keep their own gradients", "fsdp2 dp4 shard 2 x2", "fsdp2 pp2 dp4 1f1b shard 2 x2")
def fsdp2_replicas_not_summed():
    from torch.distributed.device_mesh import DeviceMesh

    from parallel import engine_fsdp2

    def shards_only(mesh):
        return DeviceMesh.from_group(mesh.shard_group, mesh.device.type, mesh_dim_names=("shard",))

    with patch.object(engine_fsdp2, "_device_mesh", shards_only):
        yield
