"""What holds DeepSpeed's private state to one release, without any rank."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import nn

from parallel import deepspeed_fixes
from parallel.engine import AdamWOptions
from parallel.engine_deepspeed import DeepSpeedEngine, import_deepspeed
from parallel.layout import Layout
from parallel.mesh import single_process_mesh
from parallel.shape import ModelShape

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ModelShape(num_layers=1, hidden_size=8, num_heads=2, num_kv_heads=2, ffn_hidden_size=8, vocab_size=10)


def build(layout: Layout, **mesh: Any) -> DeepSpeedEngine:
    return DeepSpeedEngine(
        [],
        SHAPE,
        replace(single_process_mesh(), **mesh),
        layout,
        optimizer=AdamWOptions(),
        micro_batch_size=1,
        accumulation=1,
        sequence_length=4,
        grad_clip=0.0,
        bf16=layout.zero_stage == 0,
    )


def test_the_release_whose_private_state_is_touched_is_the_one_that_is_pinned():
    pinned = re.findall(r"^deepspeed==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned == [deepspeed_fixes.VERSION]
    assert import_deepspeed().__version__ == deepspeed_fixes.VERSION


@pytest.mark.parametrize("mesh", [{"pp": 2}, {"dp": 4, "shard": 2}])
def test_another_release_is_refused_for_pipelines_and_shard_groups_before_anything_is_built(mesh):
    with patch.object(deepspeed_fixes, "VERSION", "0.0.1"), pytest.raises(ValueError) as refused:
        build(Layout(), **mesh)
    installed = import_deepspeed().__version__
    assert f"needs deepspeed==0.0.1, found {installed}" in str(refused.value)
    assert "parallel.engine=fsdp2" in str(refused.value)


def test_what_deepspeed_cannot_do_exactly_is_refused():
    with pytest.raises(ValueError, match="zero_stage=1"):
        build(Layout(zero_stage=0))
    with pytest.raises(ValueError, match="zero_stage 3"):
        build(Layout(zero_stage=1), dp=4, shard=2)


def test_private_state_that_is_gone_is_named():
    with pytest.raises(RuntimeError, match=r"Linear\.ds_status is gone"):
        deepspeed_fixes._private(nn.Linear(1, 1), "ds_status")


def test_numbers_start_at_zero_for_every_engine_and_a_closed_model_is_off_the_stack():
    import_deepspeed()
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 7
    deepspeed_fixes.number_alike()
    assert Init.param_id == 0
    closed, alive = nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1)
    with patch.object(parameter_offload, "FWD_MODULE_STACK", [closed, alive, closed[0]]) as stack:
        deepspeed_fixes.forget(closed)
        assert stack == [alive]


def test_torchs_own_linear_is_back_once_no_engine_uses_another():
    """DeepSpeed says of its linear that it "will persist unless manually reset"."""
    import_deepspeed()
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    own, other = nn.functional.linear, nn.Linear(1, 1)
    with (
        patch.object(nn.functional, "linear", zero3_linear_wrap),
        patch.object(InsertPostInitMethodToModuleSubClasses, "linear_bk", own, create=True),
        patch.object(parameter_offload, "FWD_MODULE_STACK", [other]),
    ):
        deepspeed_fixes.forget(nn.Linear(1, 1))
        assert nn.functional.linear is zero3_linear_wrap, "another engine uses it"
        deepspeed_fixes.forget(other)
        assert nn.functional.linear is own


def test_every_parameter_is_gathered_with_exactly_one_module():
    from deepspeed.utils import set_z3_leaf_modules

    class Block(nn.Sequential):
        pass

    model = nn.ModuleList([nn.Linear(2, 2), Block(nn.Linear(2, 2), nn.LayerNorm(2)), nn.LayerNorm(2)])
    set_z3_leaf_modules(model, [Block])
    units = list(deepspeed_fixes._fetched_together(model))
    assert [len(unit) for unit in units] == [2, 4, 2]
    assert {id(p) for unit in units for p in unit} == {id(p) for p in model.parameters()}
