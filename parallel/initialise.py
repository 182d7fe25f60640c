"""Initial weights from (seed, parameter name, row) alone: the same full weights at every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from parallel.boxes import Boxes
from parallel.mesh import Mesh
from parallel.shape import ModelShape, ParameterSpec, parameter_table


def rows(name: str, spec: ParameterSpec, seed: int, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the full parameter, float32. Rows behind the real vocabulary are zero.

    Each row is one Philox stream keyed by (seed, name) with the row number in the counter.
    """
    if spec.std is None:
        return torch.ones(stop - start)
    digest = hashlib.blake2b(f"{seed}/parameter/{name}".encode(), digest_size=16).digest()
    key = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))
    out = np.zeros((stop - start, spec.shape[1]), np.float32)
    for row in range(start, min(stop, spec.shape[0])):
        generator = np.random.Generator(np.random.Philox(key=key, counter=(0, row, 0, 0)))
        generator.standard_normal(out=out[row - start], dtype=np.float32)
    return torch.from_numpy(out) * spec.std


def local_share(name: str, spec: ParameterSpec, seed: int, tp: int, tp_rank: int, padded_vocab: int) -> Tensor:
    """One tensor-parallel rank's share of the initial parameter, float32, vocabulary padding included (zeros)."""
    if spec.tp_dim == 0:
        count = spec.local_shape(tp, padded_vocab)[0]
        return rows(name, spec, seed, tp_rank * count, (tp_rank + 1) * count)
    full = rows(name, spec, seed, 0, spec.shape[0])
    return full if spec.tp_dim is None else full.chunk(tp, spec.tp_dim)[tp_rank]


@torch.no_grad()
def initialise(module: nn.Module, shape: ModelShape, mesh: Mesh, seed: int) -> None:
    """Fills every parameter of `module` (named as in parameter_table) in place."""
    table = parameter_table(shape)
    padded = shape.padded_vocab(mesh.tp)
    for name, parameter in module.named_parameters():
        parameter.copy_(local_share(name, table[name], seed, mesh.tp, mesh.tp_rank, padded))


@torch.no_grad()
def clear_padding(module: nn.Module, shape: ModelShape, mesh: Mesh) -> None:
    """Zeroes the rows of this rank behind the real vocabulary: the only values that no box of an engine's state covers."""
    table = parameter_table(shape)
    for name, parameter in module.named_parameters():
        if table[name].padded:
            parameter[max(0, shape.vocab_size - mesh.tp_rank * parameter.shape[0]) :].zero_()


@torch.no_grad()
def initialise_boxes(state: Mapping[str, Boxes], shape: ModelShape, seed: int) -> None:
    """Fills the `weight/` boxes of an engine's state: each rank draws only the rows that it holds, in float32."""
    for name, spec in parameter_table(shape).items():
        boxes = state.get(f"weight/{name}")
        for offset, view in boxes.parts if boxes else ():
            drawn = rows(name, spec, seed, offset[0], offset[0] + view.shape[0])
            if view.dim() > 1:
                drawn = drawn[:, offset[1] : offset[1] + view.shape[1]]
            view.copy_(drawn)
