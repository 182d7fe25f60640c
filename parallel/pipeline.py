"""A pipeline of chunks, driven by the schedules of torch.distributed.pipelining through its public API.

Every rank of a pipeline reads the same microbatches (the data is a pure function of the sample number), so only hidden states
and their gradients travel; positions, documents and targets do not. The last chunk computes the loss inside its module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from parallel.attention import find_documents
from parallel.engine import LossOutput, Microbatch, joined_inputs, model_inputs
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.visibility import find_visibility

SCHEDULE_CLASSES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved_zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Stage(PipelineStage):
    """One chunk as the schedules see it: plain tuples of tensors with a first dimension to cut or join at."""

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["normalizer"] = kwargs["normalizer"].reshape(())
        if "document_ids" in kwargs:
            kwargs["document_ids"] = find_documents(kwargs["document_ids"], self.device)
        if "visibility" in kwargs:
            kwargs["visibility"] = find_visibility(kwargs["visibility"], self.device)
        output = super().forward_maybe_with_nosync(*args, **kwargs)
        return (torch.stack([output.loss]), *output[1:]) if self.is_last else output


class Pipeline:
    """The chunks of this rank, and how microbatches pass through all chunks of all pipeline ranks.

    modules: chunk number -> what is called for it (a chunk, or an engine's wrapper of one). dtype: of the hidden states.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        layout: Layout,
        mesh: Mesh,
        *,
        micro_batch_size: int,
        accumulation: int,
        sequence_length: int,
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        stage_class: type[Stage] = Stage,
    ):
        self.modules, self.layout, self.mesh = dict(modules), layout, mesh
        self.accumulation = accumulation
        self._hidden_size, self._dtype = hidden_size, dtype
        self._loss_scale = 1.0
        ids = torch.empty(micro_batch_size, sequence_length, dtype=torch.long, device="meta")
        hidden = torch.empty(self._hidden_shape(ids), dtype=dtype, device="meta", requires_grad=True)
        value = torch.empty(ids.shape, device="meta")
        losses = (torch.empty(1, device="meta", requires_grad=True), value, value, value.bool())
        self.stages = [
            stage_class(
                module,
                chunk,
                layout.chunks,
                mesh.device,
                input_args=(ids if chunk == 0 else hidden,),
                output_args=losses if chunk == layout.chunks - 1 else (hidden,),
                group=mesh.pp_group,
            )
            for chunk, module in self.modules.items()
        ]
        several = layout.chunks_per_rank > 1
        self._schedule = SCHEDULE_CLASSES[layout.schedule](
            self.stages if several else self.stages[0], accumulation, loss_fn=self._scaled_loss, scale_grads=False
        )
        self._last_rank = mesh.peer(layout.rank_of(layout.chunks - 1))

    def _hidden_shape(self, ids_BL: Tensor) -> tuple[int, int, int]:
        share = self.mesh.tp if self.layout.sequence_parallel else 1
        return ids_BL.shape[0], ids_BL.shape[1] // share, self._hidden_size

    def _scaled_loss(self, output: tuple[Tensor, ...], _target: Tensor) -> Tensor:
        return output[0].sum() * self._loss_scale

    def train(
        self, microbatches: Sequence[Microbatch], normalizer: Tensor, loss_scale: float = 1.0
    ) -> list[LossOutput]:
        """Forward and backward of all microbatches; their outputs (without gradients), the same on every pipeline rank.

        Gradients are those of loss * loss_scale, added up over the microbatches.
        """
        self._loss_scale = loss_scale
        inputs = joined_inputs(microbatches, self.mesh.device)
        inputs["normalizer"] = normalizer.expand(len(microbatches))
        ids = inputs.pop("inputs")
        first, last = 0 in self.modules, self.layout.chunks - 1 in self.modules
        merged = self._schedule.step(*([ids] if first else []), **({"target": ids} if last else {}), **inputs)
        return self._share_losses(merged, ids, len(microbatches))

    def _share_losses(self, output: Optional[tuple[Tensor, ...]], ids: Tensor, count: int) -> list[LossOutput]:
        """The outputs of `count` microbatches on every pipeline rank: one broadcast from the rank of the last chunk."""
        packed = torch.empty(count + 3 * ids.numel(), device=ids.device)
        if output is not None:
            torch.cat([x.detach().flatten().float() for x in output], out=packed)
        dist.broadcast(packed, self._last_rank, group=self.mesh.pp_group)
        loss, tokens = packed[:count], packed[count:]
        value, ce, correct = tokens.view(3, count, ids.shape[0] // count, ids.shape[1])
        return [LossOutput(*parts) for parts in zip(loss, value, ce, correct.bool())]

    @torch.no_grad()
    def forward(self, microbatch: Microbatch) -> LossOutput | Tensor:
        """One microbatch of any size through all chunks; the output is the same on every pipeline rank."""
        inputs = model_inputs(microbatch, self.mesh.device, torch.ones((), device=self.mesh.device))
        ids: Tensor = inputs.pop("inputs")
        x: Any = ids
        for chunk in range(self.layout.chunks):
            here, before = self.layout.rank_of(chunk), self.layout.rank_of(max(chunk - 1, 0))
            if chunk and here != before:
                x = self._pass_on(x, ids, before, here)
            if chunk in self.modules:
                x = self.modules[chunk](x, **inputs)
        return self._share_last(x, ids, "target_ids" in inputs)

    def _pass_on(self, x: Any, ids: Tensor, before: int, here: int) -> Any:
        """The hidden states, from the rank of one chunk to that of the next."""
        if self.mesh.pp_rank == before:
            dist.send(x.contiguous(), self.mesh.peer(here), group=self.mesh.pp_group)
        elif self.mesh.pp_rank == here:
            x = torch.empty(self._hidden_shape(ids), dtype=self._dtype, device=ids.device)
            dist.recv(x, self.mesh.peer(before), group=self.mesh.pp_group)
        return x

    def _share_last(self, output: Any, ids: Tensor, with_loss: bool) -> LossOutput | Tensor:
        have = self.layout.chunks - 1 in self.modules
        if with_loss:
            single = (torch.stack([output.loss]), *output[1:]) if have else None
            return self._share_losses(single, ids, 1)[0]
        width = torch.tensor([output.shape[-1] if have else 0], device=ids.device)
        dist.broadcast(width, self._last_rank, group=self.mesh.pp_group)
        logits = output.float().contiguous() if have else torch.empty(*ids.shape, int(width), device=ids.device)
        dist.broadcast(logits, self._last_rank, group=self.mesh.pp_group)
        return logits
