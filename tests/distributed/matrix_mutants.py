"""Planted faults that are the same under every engine: in the step, the block, the loss and the pipeline."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests.distributed.matrix_faults import mutant


def _rank() -> int:
    return int(os.environ["RANK"])


# The step.


@mutant("every rank divides by its own count of eligible tokens", "z3 dp2 x2", "fsdp2 dp2 x2")
def per_rank_denominators():
    from pretrain import metrics

    with patch.object(metrics, "sum_over_ranks", lambda values, mesh: values.cpu()):
        yield


@mutant("masks are drawn from a seed of the rank", "z3 dp2 x2", "fsdp2 tp2 x2", "z0 pp2 tp2 1f1b x4")
def masks_seeded_by_rank():
    from data import masking

    draw = masking.draw_mask

    def drawn(sample_id, length, prompt, size, options, units=None):
        return draw(sample_id, length, prompt, size, replace(options, seed=options.seed + _rank()), units)

    with patch.object(masking, "draw_mask", drawn):
        yield


@mutant("nothing is decayed", "z3 dp2 x2", "z0 dp2 x2", "fsdp2 dp2 x2")
def weight_decay_skipped():
    from parallel.shape import ParameterSpec

    with patch.object(ParameterSpec, "decayed", property(lambda spec: False)):
        yield


@mutant("norm gains are decayed too", "z3 dp2 x2", "z1 dp2 x2", "fsdp2 dp2 x2")
def norm_gains_decayed():
    from parallel.shape import ParameterSpec

    with patch.object(ParameterSpec, "decayed", property(lambda spec: True)):
        yield


@mutant("each rank starts with the first tensor-parallel rank's share", "z3 tp2 x2", "fsdp2 tp2 x2")
def one_share_for_all_tensor_parallel_ranks():
    from parallel import initialise

    share = initialise.local_share

    def first(name, spec, seed, tp, tp_rank, padded_vocab):
        return share(name, spec, seed, tp, 0, padded_vocab)

    with patch.object(initialise, "local_share", first):
        yield


# The block and the loss.


@mutant("rows of the vocabulary's padding take part in the softmax", "z3 dp2 x2", "fsdp2 tp2 x2")
def padded_vocabulary_not_masked():
    from parallel.row_loss import VocabShard

    with patch.object(VocabShard, "real_rows", property(lambda shard: shard.rows)):
        yield


@mutant("gradients of the tensor-parallel region's input are not summed", "z3 tp2 x2", "fsdp2 pp2 tp2 1f1b x4")
def tensor_parallel_input_gradient_not_summed():
    from parallel import block

    with patch.object(block, "copy_to_tensor_model_parallel_region", lambda x, group: x):
        yield


@mutant(
    "gradients of norm gains stay those of one share of the tokens",
    "z3 sp2 recompute full x2",
    "fsdp2 sp2 recompute full x2",
)
def sequence_parallel_norm_gradients_not_summed():
    from parallel import block

    with patch.object(block, "copy_to_tensor_model_parallel_region", lambda x, group: x):
        yield


@mutant("the gathered sequence's gradient is cut and not summed", "z3 sp2 recompute full x2")
def sequence_parallel_gather_backward_only_cuts():
    from parallel import sequence

    backward = staticmethod(lambda ctx, gradient: (sequence._share(gradient, ctx.group), None))
    with patch.object(sequence._GatherSequence, "backward", backward):
        yield


@mutant("the head's hidden gradient, already summed, is summed again", "fsdp2 sp2 recompute full x2")
def sequence_parallel_head_gradient_summed_twice():
    from parallel import sequence

    backward = staticmethod(lambda ctx, gradient: (sequence._reduce_scatter(gradient, ctx.group), None))
    with patch.object(sequence._JoinSequence, "backward", backward):
        yield


@mutant(
    "the backward pass recomputes a block from other inputs",
    "z3 sp2 recompute full x2",
    "fsdp2 pp2 sp2 interleaved recompute full x4",
)
def recompute_from_other_inputs():
    from parallel import recompute

    checkpoint = recompute.checkpoint

    def other(compute: Callable, x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        calls = 0

        def run(x, *rest):
            nonlocal calls
            calls += 1
            return compute(x if calls == 1 else x * 1.01, *rest)

        return checkpoint(run, x, *rest, **options)

    with patch.object(recompute, "checkpoint", other):
        yield


@mutant("a chunk runs its layers backwards", "z3 dp2 x2", "fsdp2 pp2 dp2 interleaved x4")
def layers_in_the_wrong_order():
    from pretrain import model

    build = model.DiffusionTransformer.__init__

    def reversed_build(self, *args, **options):
        build(self, *args, **options)
        self.blocks._modules = dict(reversed(self.blocks._modules.items()))

    with patch.object(model.DiffusionTransformer, "__init__", reversed_build):
        yield


# The pipeline.


def _stage_inputs(change: Callable[[Any, dict], None]):
    """Patches what a stage passes on to its chunk."""
    from parallel import pipeline

    forward = pipeline.Stage.forward_maybe_with_nosync

    def changed(self, *args, **kwargs):
        change(self, kwargs)
        return forward(self, *args, **kwargs)

    return patch.object(pipeline.Stage, "forward_maybe_with_nosync", changed)


@mutant("later stages do not know which tokens belong together", "z3 pp2 dp2 1f1b x4", "fsdp2 pp2 dp2 zbv x4")
def document_mask_ignored_by_later_stages():
    def drop(stage, kwargs):
        if not stage.is_first:
            kwargs.pop("document_ids", None)

    with _stage_inputs(drop):
        yield


@mutant("later stages count positions from the sample's start", "z1 pp2 dp2 1f1b x4", "fsdp2 pp2 dp2 interleaved x4")
def positions_not_passed_to_later_stages():
    def count(stage, kwargs):
        if not stage.is_first:
            positions = kwargs["position_ids"]
            kwargs["position_ids"] = torch.arange(positions.shape[1], dtype=positions.dtype).expand(positions.shape)

    with _stage_inputs(count):
        yield


# Isolated documents.

PACKED = ("z3 tp2 packed x2", "fsdp2 pp2 1f1b packed x4")


def _documents(change: Callable[[Any], Any]):
    """Patches what engine and pipeline find out about the documents of a microbatch."""
    from parallel import attention, engine, pipeline

    def changed(ids, device):
        return change(attention.find_documents(ids, device))

    with contextlib.ExitStack() as stack:
        for module in (engine, pipeline):
            stack.enter_context(patch.object(module, "find_documents", changed))
        yield


@mutant("tokens see the other documents of their sample", *PACKED)
def documents_not_isolated():
    yield from _documents(lambda found: None)


@mutant("every document ends one token late", *PACKED)
def documents_end_one_token_late():
    def late(found):
        if found is None:
            return None
        return found._replace(bounds=(found.bounds + (found.bounds > 0)).clamp(max=found.ids.numel()))

    yield from _documents(late)


@mutant("all microbatches are isolated like the first", *reversed(PACKED))
def documents_of_the_first_microbatch():
    first: list[Any] = []

    def kept(found):
        first.append(found)
        return first[0]

    yield from _documents(kept)


@mutant(
    "stages divide their gradients by the number of microbatches", "fsdp2 pp2 dp2 interleaved x4", "z0 pp2 dp2 gpipe x4"
)
def stage_gradients_averaged_over_microbatches():
    from parallel import pipeline

    with patch.object(
        pipeline.Pipeline, "_scaled_loss", lambda self, out, _: out[0].sum() * self._loss_scale / self.accumulation
    ):
        yield


@mutant("only the last stage learns the loss", "z3 pp2 dp2 1f1b x4", "fsdp2 pp2 tp2 gpipe x4")
def losses_not_shared_with_other_stages():
    from parallel import pipeline

    def kept(tensor, source, group):
        if _rank() != source:
            tensor.zero_()

    with patch.object(pipeline, "dist", SimpleNamespace(**vars(pipeline.dist) | {"broadcast": kept})):
        yield
