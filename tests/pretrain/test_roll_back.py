"""Where a run in trouble goes back to, what becomes of checkpoints made meanwhile, and data that do not last so long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.errors import InputError
from parallel import checkpoint
from parallel.boxes import Boxes
from parallel.errors import CheckpointError
from parallel.mesh import single_process_mesh
from pretrain.config import Config, ModelConfig
from pretrain.loop.preflight import Plan, preflight
from pretrain.loop.roll_back import roll_back
from pretrain.loop.stream_position import StreamPosition

MESH = single_process_mesh()


@pytest.fixture
def config(corpus, tmp_path) -> Config:
    found = Config(model=ModelConfig(num_layers=1, hidden_size=32, ffn_hidden_size=32, vocab_size=512))
    found.run.dir = str(tmp_path)
    found.data.shards = [{"path": str(corpus / "train"), "epochs": 1.0}]
    found.data.sequence_length = 32
    found.train.global_batch_size, found.train.micro_batch_size = 8, 8
    found.train.steps, found.train.validate_every = 20, 0
    found.optimizer.schedule, found.optimizer.warmup_steps = "constant", 0
    return found


def planned(config: Config, *steps: int) -> Plan:
    """A plan whose run has made checkpoints behind these steps."""
    plan = preflight(config)
    for step in steps:
        state = {"weight/x": Boxes((2,), [((0,), torch.full((2,), float(step)))])}
        checkpoint.save(plan.folder / "checkpoints", step, state, {"step": step, "applied_steps": step}, keep=9)
    return plan


def names(plan: Plan) -> list[str]:
    return sorted(path.name for path in (plan.folder / "checkpoints").iterdir())


def test_a_run_goes_back_to_the_newest_checkpoint_from_before_the_trouble_and_on_behind_what_it_read(config):
    plan = planned(config, 4, 8, 12)
    new = roll_back(config, plan, MESH, reached=15, first_bad=10, reason="spikes")
    assert new.resume_from == plan.folder / "checkpoints" / "step-00000008"
    assert new.trainer["step"] == 8 and new.position.consumed(8, 8) == 15 * 8
    assert new.position.skips == ({"step": 8, "samples": [64, 119], "reason": "spikes"},)
    assert replace(new, resume_from=None, trainer={}, position=StreamPosition()) == plan, "nothing else changed"
    assert names(plan) == ["latest", "set-aside-step-00000012", "step-00000004", "step-00000008"]
    assert (plan.folder / "checkpoints" / "latest").read_text() == "step-00000008\n"
    assert checkpoint.latest(plan.folder / "checkpoints") == new.resume_from, "a restart goes on from there too"
    again = roll_back(config, new, MESH, reached=11, first_bad=11, reason="spikes")
    assert again.resume_from == new.resume_from and again.position.consumed(8, 8) == 18 * 8


def test_a_second_roll_back_over_the_same_step_sets_aside_what_it_finds_there(config):
    plan = planned(config, 4, 8)
    for _ in range(3):
        assert roll_back(config, plan, MESH, reached=9, first_bad=8, reason="x").trainer["step"] == 4
        checkpoint.save(plan.folder / "checkpoints", 8, {}, {"step": 8, "applied_steps": 8}, keep=9)
    aside = [f"set-aside-step-00000008{n}" for n in ("", "-2", "-3")]
    assert names(plan) == ["latest", *aside, "step-00000004", "step-00000008"]


def test_a_checkpoint_of_the_last_good_step_is_good_and_one_of_the_first_bad_step_is_not(config):
    plan = planned(config, 4, 8)
    assert roll_back(config, plan, MESH, reached=9, first_bad=9, reason="x").trainer["step"] == 8
    assert roll_back(config, plan, MESH, reached=9, first_bad=8, reason="x").trainer["step"] == 4


def test_without_any_checkpoint_a_run_goes_back_to_its_beginning(config):
    plan = planned(config)
    new = roll_back(config, plan, MESH, reached=6, first_bad=3, reason="not finite")
    assert (new.resume_from, new.trainer) == (None, {})
    assert new.position == StreamPosition(0, 48, (), ({"step": 0, "samples": [0, 47], "reason": "not finite"},))


def test_with_none_from_before_the_trouble_it_ends_and_touches_nothing(config):
    plan = planned(config, 8)
    before = names(plan)
    with pytest.raises(CheckpointError, match=r"step 5 or later.*train.keep_checkpoints"):
        roll_back(config, plan, MESH, reached=9, first_bad=5, reason="x")
    assert names(plan) == before


def test_data_that_would_end_before_the_run_does_are_told_with_the_steps_they_last(config):
    total = preflight(config).data.blocks(config).total
    steps = total // 8
    config.train.steps = steps
    plan = planned(config, 4, 8)
    before = names(plan)
    with pytest.raises(InputError) as caught:
        roll_back(config, plan, MESH, reached=8, first_bad=6, reason="spikes")
    said = str(caught.value)
    assert str(Path(config.run.dir) / config.run.name) in said and "spikes" in said and "\n" not in said
    assert names(plan) == before
    assert f"with train.steps={steps - 4} they last" in said
    config.train.steps = steps - 4  # what it says is right to the step
    roll_back(config, plan, MESH, reached=8, first_bad=6, reason="spikes")
    config.train.steps = steps - 3
    with pytest.raises(InputError):
        roll_back(config, replace(plan, position=StreamPosition()), MESH, reached=8, first_bad=6, reason="spikes")
