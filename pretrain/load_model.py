"""A trained model in one process, read from any checkpoint: for sampling and inspection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from data.manifest import SpecialIds
from data.tokenizer import TextTokenizer, load_tokenizer
from parallel import checkpoint
from parallel.boxes import Boxes
from parallel.mesh import build_mesh
from parallel.shape import parameter_table
from pretrain.config import Config
from pretrain.load_config import config_from_dict
from pretrain.model import DiffusionTransformer, model_shape


def find_checkpoint(path: str) -> Path:
    """A checkpoint folder, or the newest complete one of a run folder; InputError if there is none."""
    folder = Path(path)
    if (folder / "trainer.json").is_file():
        return folder
    newest = checkpoint.latest(folder / "checkpoints")
    if newest is None:
        raise InputError(
            f"{path}: no checkpoint there; name a run folder (its newest is taken) or RUN/checkpoints/step-NNNNNNNN"
        )
    return newest


@torch.no_grad()
def load_model(folder: Path) -> tuple[DiffusionTransformer, Config, dict[str, Any]]:
    """(model in float32 on this process's device, its config, trainer.json) of the checkpoint in `folder`.

    Joins a process group of this process alone, since megatron-core's layers run only inside one.
    """
    trainer = checkpoint.read_trainer(folder)
    config = config_from_dict(trainer.get("config") or {})
    mesh = build_mesh()
    model = DiffusionTransformer(model_shape(config.model), mesh).to(mesh.device)
    table = parameter_table(model.shape)
    boxes = {}
    for name, parameter in model.named_parameters():
        parameter.zero_()
        rows = parameter.data[: table[name].shape[0]]  # without the padding of the vocabulary
        boxes[f"weight/{name}"] = Boxes(table[name].shape, [((0,) * rows.dim(), rows)])
    checkpoint.load(folder, boxes)
    return model.eval(), config, trainer


def load_run_tokenizer(checkpoint_folder: Path, trainer: dict[str, Any]) -> TextTokenizer:
    """The tokenizer that the run was trained with: a copy lies in the run folder."""
    file = checkpoint_folder.parent.parent / "tokenizer.json"
    if not file.is_file() or "special" not in trainer:
        raise InputError(
            f"{file} is missing: put the run's tokenizer.json beside its config.yaml, two folders above a checkpoint"
        )
    tokenizer = load_tokenizer(file, special=SpecialIds(**trainer["special"]))
    if tokenizer.sha256 != trainer["tokenizer_sha256"]:
        raise InputError(
            f"{file} is not the tokenizer that {checkpoint_folder} was trained with: restore the original file"
        )
    return tokenizer
