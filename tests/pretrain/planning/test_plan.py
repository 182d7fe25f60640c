"""`plan`: its figures are those of the functions they come from, its verdict is the first line, its mistakes are one line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import InputError
from parallel.shape import parameter_counts
from pretrain.flops import flops_per_token
from pretrain.load_config import load_config
from pretrain.memory import GIB, memory_per_gpu
from pretrain.memory_activations import chunk_saves, loss_saves
from pretrain.planning.case import case_of
from pretrain.planning.cluster import read_cluster
from pretrain.planning.command import plan
from pretrain.planning.plan import Question, plan_of

ROOT = Path(__file__).resolve().parents[3]
LLADA_8B = ["--config", str(ROOT / "configs" / "llada_8b.yaml")]
H800 = read_cluster("h800")


def planned(tmp_path: Path, *arguments: str) -> dict:
    file = tmp_path / "plan.json"
    assert plan([*LLADA_8B, *arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_the_plan_of_llada_8b_has_its_parameters_memory_flops_and_hours(tmp_path, capsys):
    found = planned(tmp_path, "--nodes", "8", "--tokens", "2.3e12", "--price", "2", "--mfu", "0.256")
    assert found["parameters"]["total"] == 8_015_581_184
    assert found["parameters"]["non_embedding"] == 6_979_588_096
    assert found["parameters"]["per_rank"] == 8_015_581_184
    assert found["parameters"]["per_rank_stored"] == -(-8_015_581_184 // 64)
    case = case_of(load_config(LLADA_8B), 64)
    memory = memory_per_gpu(case)
    assert found["memory"]["parts"] == memory.parts and found["memory"]["total"] == memory.total
    assert found["memory"]["fits"] and found["memory"]["cure"] is None
    assert found["flops"]["exact"] == flops_per_token(case.shape, 4096, found["flops"]["masked_fraction"])
    whole, time = found["time"]["if_the_whole_step_ran_at_it"], found["time"]
    # As published, but for the head, of which half is counted here: 0.13 M hours, 4,915 tokens/s.
    counted = found["flops"]["exact"] / flops_per_token(case.shape, 4096)
    assert whole["gpu_hours"] == pytest.approx(0.13e6 * counted, rel=0.01)
    assert whole["tokens_per_second_per_gpu"] == pytest.approx(4915 / counted, rel=0.01)
    assert whole["days"] == pytest.approx(whole["gpu_hours"] / 64 / 24) and whole["price"] == 2 * whole["gpu_hours"]
    parts = time["compute_seconds"] + time["exposed_communication_seconds"] + time["bubble_seconds"]
    assert time["step_seconds"] == pytest.approx(parts) and time["steps"] == pytest.approx(438690.2, rel=1e-6)
    assert time["gpu_hours"] == pytest.approx(time["step_seconds"] * time["steps"] * 64 / 3600)
    assert time["mfu"] < time["hfu"] < 0.256
    assert "fits, about" in capsys.readouterr().out.splitlines()[0]


def test_without_tokens_the_run_is_as_long_as_the_config_says(tmp_path):
    found = planned(tmp_path, "--nodes", "8")
    assert found["time"]["tokens"] == 438690 * 1280 * 4096
    assert found["time"]["steps"] == 438690 and found["time"]["price"] is None


def test_all_three_checkpointing_modes_stand_beside_each_other_and_the_loss_is_a_part_of_its_own(tmp_path):
    found = planned(tmp_path, "--nodes", "8")["memory"]
    modes = found["activations_by_checkpointing"]
    case = case_of(load_config(LLADA_8B), 64)
    for mode in ("none", "selective", "full"):
        other = case.with_change({"parallel.activation_checkpointing": mode})
        assert modes[mode]["activations"] == chunk_saves(other, 0) - loss_saves(other)
    assert modes["none"]["activations"] > modes["selective"]["activations"] > modes["full"]["activations"]
    assert found["parts"]["activations"] == modes["full"]["activations"]
    assert found["parts"]["loss buffers"] >= loss_saves(case) > 0


def test_a_run_that_does_not_fit_is_an_answer_and_its_cure_fits(tmp_path, capsys):
    found = planned(tmp_path, "--nodes", "8", "--parallel.activation_checkpointing", "none")
    lines = capsys.readouterr().out.splitlines()
    assert "does not fit, about 99" in lines[0] and "this fits: train.micro_batch_size=2" in lines[1]
    assert not found["memory"]["fits"]
    key, value = found["memory"]["cure"].split("=")
    cured = planned(tmp_path, "--nodes", "8", "--parallel.activation_checkpointing", "none", f"--{key}", value)
    assert cured["memory"]["fits"] and cured["memory"]["total"] <= 80 * GIB


MISTAKES = {
    "unknown key": (["--train.stepz", "5"], ["train.stepz", "did you mean"]),
    "unknown option": (["--nodez", "5"], ["nodez"]),
    "negative tokens": (["--tokens", "-5"], ["--tokens is -5", "2.3e12"]),
    "no tokens": (["--tokens", "0"], ["--tokens is 0"]),
    "percent": (["--mfu", "40"], ["--mfu is 40", "(0, 1]"]),
    "price": (["--price", "-1"], ["--price is -1"]),
    "both": (["--nodes", "2", "--gpus", "16"], ["--gpus 16 and --nodes 2"]),
    "negative GPUs": (["--gpus", "-8"], ["--gpus is -8"]),
    "more than a node has": (["--gpus-per-node", "16"], ["--gpus-per-node is 16", "has 8"]),
    "cluster": (["--cluster", "h900"], ["--cluster h900", "h800"]),
    "word": (["sreach"], ["'sreach' is no option", "plan search"]),
    "block size": (["--objective.kind", "block", "--objective.block_size", "100"], ["objective.block_size is 100"]),
    "mask ratio": (["--objective.mask_ratio", "[0.8, 0.2]"], ["objective.mask_ratio", "low < high"]),
    "steps": (["--train.steps", "0"], ["train.steps is 0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, tmp_path):
    changed, said = MISTAKES[name]
    start = changed if name == "word" else [*LLADA_8B, *changed]
    with pytest.raises(InputError) as caught:
        plan([*start, *(LLADA_8B if name == "word" else []), "--json", str(tmp_path / "plan.json")])
    assert all(part in str(caught.value) for part in said) and "\n" not in str(caught.value)
    assert not (tmp_path / "plan.json").exists()


def test_an_illegal_layout_is_a_mistake_and_scripts_get_the_nearest_that_is_legal(tmp_path):
    file = tmp_path / "plan.json"
    with pytest.raises(InputError, match="^layout: .*nearest that works") as caught:
        plan([*LLADA_8B, "--gpus", "128", "--json", str(file)])
    assert "train.global_batch_size 1280, train.micro_batch_size 4" in str(caught.value) and "\n" not in str(
        caught.value
    )
    legal = json.loads(file.read_text())["legal"]
    assert legal["legal"] is False and legal["reason"] in str(caught.value)
    ((key, value),) = legal["nearest"].items()
    assert planned(tmp_path, "--gpus", "128", f"--{key}", str(value))["legal"] == {"legal": True, "nearest": None}


def test_plan_and_search_import_no_torch():
    code = (
        "import sys; from pretrain.planning.command import plan; plan(sys.argv[1:]); plan(['search', *sys.argv[1:]]); "
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "--config", "configs/quickstart.yaml", "--gpus", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_one_gpu_has_nobody_to_talk_to_and_no_bubble(tmp_path):
    config = load_config(["--config", str(ROOT / "configs" / "quickstart.yaml")])
    found = plan_of(config, Question(H800, 1))
    assert found["communication"]["axes"] == {} and found["bubble"]["fraction"] == 0
    assert found["time"]["mfu"] == pytest.approx(0.4)
    assert any("fp32" in note for note in found["notes"])


def test_block_diffusion_computes_two_columns_a_token_and_sees_blocks():
    base = load_config(["--config", str(ROOT / "configs" / "quickstart.yaml")])
    block = dataclasses.replace(base, objective=dataclasses.replace(base.objective, kind="block", block_size=16))
    shape = case_of(base, 1).shape
    plain, twice = (plan_of(config, Question(H800, 1))["flops"]["exact"] for config in (base, block))
    assert plain == flops_per_token(shape, 128, 0.5)
    # A row is 256 columns, half of them clean; a column sees (128 + 16) / 2 others in the mean, a quarter of them is masked.
    assert twice == 2 * flops_per_token(shape, 72, 0.25)


def test_parameters_of_a_rank_are_its_share_of_its_stages(tmp_path):
    found = planned(tmp_path, "--nodes", "8", "--parallel.tensor", "2", "--parallel.pipeline", "2")
    total = parameter_counts(case_of(load_config(LLADA_8B), 1).shape)["total"]
    assert found["parameters"]["per_rank"] == pytest.approx(total / 4, rel=1e-3)
    assert found["bubble"]["fraction"] > 0 and found["world"]["data"] == 16


def test_help_names_every_option(capsys):
    assert plan(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--cluster", "--mfu", "--tokens", "--price", "plan search", "h800", "--gpus"))
