"""Where a run's numbers come from: its newest checkpoint, another run's weights, or nothing; and back to there in mid-run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from data.durable import fsync_folder, write_durably
from data.errors import InputError
from data.mixture import Mixture
from parallel import checkpoint
from parallel.agreement import agreed
from parallel.boxes import Boxes
from parallel.engine import Engine
from parallel.errors import CheckpointError
from parallel.initialise import initialise_boxes
from parallel.mesh import Mesh
from pretrain.config import Config
from pretrain.loop.preflight import Plan
from pretrain.loop.stream_position import StreamPosition
from pretrain.training_data import check_enough

SET_ASIDE = "set-aside-"  # before the name of a checkpoint that was made while trouble was under way


def restore(config: Config, plan: Plan, engine: Engine) -> tuple[int, int]:
    """Gives the engine the weights and moments that `plan` goes on from; (steps taken, updates applied). Collective."""
    state = engine.state()
    if plan.resume_from:
        checkpoint.load(plan.resume_from, state)
        engine.state_written(plan.trainer["applied_steps"])
        return plan.trainer["step"], plan.trainer["applied_steps"]
    _clear_moments(state)
    initialise_boxes(state, plan.shape, config.run.seed)
    if config.train.init_from:
        weights = {name: boxes for name, boxes in state.items() if name.startswith("weight/")}
        checkpoint.load(Path(config.train.init_from), weights)
    engine.state_written(0)
    return 0, 0


def roll_back(config: Config, plan: Plan, mesh: Mesh, *, reached: int, first_bad: int, reason: str) -> Plan:
    """The plan of a run that goes back to its newest complete checkpoint from before step `first_bad`, or to its beginning if it
    never made one, and on behind every sample that it has read in `reached` steps. Collective; no save may be in flight.

    `restore`, and whatever else follows from a plan, is the caller's. Newer checkpoints were made in trouble: they are
    renamed, so that no restart takes them for the newest. Raises on all ranks alike, before anything is renamed: InputError
    if the data end too early for that, CheckpointError if no checkpoint is old enough.
    """
    root = plan.folder / "checkpoints"
    first = mesh.rank == 0
    name, step, trainer = agreed(lambda: _choose(root, first_bad) if first else ("", 0, {}))[0]
    position = plan.position.behind(reached, step, config.train.global_batch_size, reason)
    _check_enough(config, plan, position, step)
    agreed(lambda: _set_aside(root, step) if first else None)
    return replace(plan, resume_from=root / name if name else None, trainer=trainer, position=position)


def _choose(root: Path, first_bad: int) -> tuple[str, int, dict[str, Any]]:
    """(name, step, trainer.json) of the newest complete checkpoint from before `first_bad`; ("", 0, {}) if there is none at all."""
    found = [(path, checkpoint.read_trainer(path)) for path in checkpoint.complete_checkpoints(root)]
    good = [(path.name, trainer["step"], trainer) for path, trainer in found if trainer["step"] < first_bad]
    if found and not good:
        raise CheckpointError(
            f"{root}: every complete checkpoint is from step {first_bad} or later, when the trouble had begun: keep more of them "
            "(train.keep_checkpoints), or start a new run from older weights (train.init_from)"
        )
    return good[-1] if good else ("", 0, {})


def _set_aside(root: Path, step: int) -> None:
    """Renames the checkpoints that are newer than `step`, and points `latest` at what is left."""
    for path in checkpoint.complete_checkpoints(root):
        if checkpoint.read_trainer(path)["step"] > step:
            others = sum(1 for _ in root.glob(f"{SET_ASIDE}{path.name}*"))  # of earlier roll-backs over the same step
            os.rename(path, root / f"{SET_ASIDE}{path.name}{f'-{others + 1}' if others else ''}")
    newest: Optional[Path] = checkpoint.latest(root)
    if newest:
        write_durably(root / "latest", f"{newest.name}\n".encode())
    elif root.is_dir():
        fsync_folder(root)


def _check_enough(config: Config, plan: Plan, position: StreamPosition, step: int) -> None:
    """InputError if sources with a cap end before the run does, now that it reads no sample twice."""
    try:
        check_enough(config, plan.data, position.consumed(config.train.steps, config.train.global_batch_size))
    except InputError as error:
        blocks = plan.data.blocks(config)
        total = blocks.total if isinstance(blocks, Mixture) and blocks.total is not None else 0
        enough = position.step + max(0, total - position.sample) // config.train.global_batch_size
        skip = position.skips[-1]
        raise InputError(
            f"run folder {plan.folder}: {skip['reason']}; going back to step {step} and on behind sample {skip['samples'][1]} "
            f"takes more data than there are ({error}); with train.steps={enough} they last"
        ) from None


def _clear_moments(state: dict[str, Boxes]) -> None:
    for name, boxes in state.items():
        if not name.startswith("weight/"):
            for _, view in boxes.parts:
                view.zero_()
