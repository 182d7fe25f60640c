"""Whole runs through the command line, on real ranks: resume after a kill, metrics, tracking, samples."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.errors import InputError
from parallel import checkpoint
from parallel.boxes import Boxes
from parallel.shape import parameter_table
from pretrain.load_config import config_from_dict, load_config
from pretrain.loop.preflight import init_note, preflight
from pretrain.model import model_shape
from tests.distributed.launch import ROOT, environment, run, start

STEPS, KILLED_BEHIND, EVERY = 40, 14, 10


def arguments(corpus: Path, runs: Path, name: str, **overrides) -> list[str]:
    values = {
        "run.dir": runs,
        "run.name": name,
        "data.shards": corpus / "train",
        "data.val_shards": corpus / "val",
        "data.sequence_length": 32,
        "model.num_layers": 2,
        "model.hidden_size": 32,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.ffn_hidden_size": 64,
        "model.vocab_size": 512,
        "train.steps": STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.checkpoint_every": EVERY,
        "train.keep_checkpoints": 9,
        "train.validate_every": 20,
        "train.val_samples": 11,
        "optimizer.warmup_steps": 5,
        "optimizer.decay_steps": 10,
        "optimizer.lr": 3e-3,
        "tracking.uri": "none",
        **overrides,
    }
    return ["train", *(part for key, value in values.items() for part in (f"--{key}", str(value)))]


def metrics(folder: Path, prefix: str = "train/") -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k == "step" or k.startswith(prefix)}
        for line in lines
        if any(k.startswith(prefix) for k in line)
    ]


def stored_state(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Weights and both moments of the newest checkpoint (or that of `step`), whole."""
    root = folder / "checkpoints"
    newest = checkpoint.step_folder(root, step) if step else checkpoint.latest(root)
    table = parameter_table(model_shape(config_from_dict(checkpoint.read_trainer(newest)["config"]).model))
    state = {
        f"{kind}/{name}": torch.full(spec.shape, float("nan"))
        for name, spec in table.items()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }
    checkpoint.load(newest, {name: Boxes(t.shape, [((0,) * t.dim(), t)]) for name, t in state.items()})
    return state


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    """`straight`: 40 steps on 2 ranks, with samples and MLflow. `killed`: the same, killed with -9 on the way and started again."""
    folder = tmp_path_factory.mktemp("runs")
    run("pretrain", arguments(corpus, folder, "straight", **{"train.sample_every": 20, "tracking.uri": ""}), 2)
    command = arguments(corpus, folder, "killed", **{"data.workers": 1})
    ranks = start("pretrain", command, 2)
    spool = folder / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (spool.exists() and len(metrics(spool.parent)) >= KILLED_BEHIND):
        assert all(p.poll() is None for p in ranks), ranks[0].communicate()[0]
        time.sleep(0.01)
    for process in ranks:
        os.killpg(process.pid, signal.SIGKILL)
    for process in ranks:
        process.communicate()
    (folder / "steps_at_kill").write_text(str(len(metrics(spool.parent))))
    (folder / "resumed.log").write_text(run("pretrain", command, 2)[0])
    return folder


def test_killed_with_9_and_started_again_ends_in_the_same_bits_as_an_uninterrupted_run(runs):
    assert KILLED_BEHIND <= int((runs / "steps_at_kill").read_text()) < STEPS, (
        "the kill came too late to prove anything"
    )
    assert "resumed" in (runs / "resumed.log").read_text()
    straight, killed = stored_state(runs / "straight"), stored_state(runs / "killed")
    assert all(torch.isfinite(t).all() for t in straight.values())
    assert any(t.abs().sum() > 0 for name, t in straight.items() if name.startswith("exp_avg/"))
    different = [name for name in straight if not torch.equal(straight[name], killed[name])]
    assert not different


def test_every_step_is_recorded_once_with_the_same_values_whether_killed_or_not(runs):
    straight, killed = metrics(runs / "straight"), metrics(runs / "killed")
    assert [line["step"] for line in straight] == list(range(1, STEPS + 1))
    assert straight == killed
    assert metrics(runs / "straight", "val/") == metrics(runs / "killed", "val/")


def test_all_promised_metrics_are_there(runs):
    names = set().union(*(json.loads(line) for line in (runs / "straight" / "metrics.jsonl").read_text().splitlines()))
    promised = {
        f"train/{n}"
        for n in (
            "loss",
            "ce_loss",
            "accuracy",
            "mask_ratio",
            "num_masked_tokens",
            "avg_p_mask",
            "importance_weight_avg",
            "grad_norm",
            "lr",
            "applied_steps",
            "tokens",
        )
    } | {f"train/loss_t_bin_{k}" for k in range(10)}
    promised |= {"perf/tokens_per_second", "perf/step_time", "val/nelbo", "val/nelbo_se", "val/ppl_bound"}
    assert promised <= names


def test_the_loss_falls_and_validation_follows(runs):
    train = [line["train/ce_loss"] for line in metrics(runs / "straight")]
    val = [line["val/nelbo"] for line in metrics(runs / "straight", "val/")]
    assert sum(train[-5:]) / 5 < sum(train[:5]) / 5 - 0.3
    assert len(val) == 2 and max(val) < math.log(512) - 0.2, "no better than guessing uniformly"


def test_mlflow_holds_every_point_of_the_spool_exactly_once(runs):
    from mlflow import MlflowClient

    sync = [sys.executable, "-m", "pretrain", "track", "sync", "--run", str(runs / "straight")]
    for _ in range(2):  # the second has nothing left to ship
        done = subprocess.run(sync, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 points")
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    run_id = json.loads((runs / "straight" / "mlflow.json").read_text())["run_id"]
    spooled: dict[str, list] = {}
    for line in (json.loads(text) for text in (runs / "straight" / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name not in ("step", "time"):
                spooled.setdefault(name, []).append((line["step"], value))
    for name, points in spooled.items():
        assert sorted((m.step, m.value) for m in client.get_metric_history(run_id, name)) == points, name
    assert client.get_run(run_id).data.params["train.steps"] == str(STEPS)


def test_samples_show_the_original_the_masked_text_with_its_count_and_what_was_generated(runs):
    files = sorted((runs / "straight" / "samples").iterdir())
    assert [f.name for f in files] == ["step-00000020.txt", "step-00000040.txt"]
    text = files[-1].read_text()
    assert "--- original" in text and "masked tokens restored" in text
    count = int(text.split("--- masked: ")[1].split(" of")[0])
    masked_part = text.split("--- masked: ")[1].split("--- generated")[0]
    assert masked_part.count("<|mask|>") == count > 0
    assert "<|mask|>" not in text.split("--- generated")[1].split("===")[0]


def test_retention_keeps_the_newest_and_a_leftover_of_a_dead_save_is_ignored_and_cleared(corpus, runs, tmp_path):
    command = arguments(
        corpus,
        tmp_path,
        "short",
        **{
            "train.steps": 6,
            "train.checkpoint_every": 2,
            "train.keep_checkpoints": 2,
            "optimizer.warmup_steps": 1,
            "optimizer.decay_steps": 1,
            "train.stop_at": 4,
            "train.validate_every": 0,
        },
    )
    run("pretrain", command, 1)
    folder = tmp_path / "short" / "checkpoints"
    dead = folder / ".writing-step-00000005"
    dead.mkdir()
    (dead / "trainer.json").write_text("{}")
    (folder / "step-00000099").mkdir()  # a folder without trainer.json is no checkpoint
    assert checkpoint.latest(folder).name == "step-00000004"
    run("pretrain", [*command, "--train.stop_at", "0"], 1)
    assert [p.name for p in checkpoint.complete_checkpoints(folder)] == ["step-00000004", "step-00000006"]
    assert not dead.exists()
    assert (folder / "latest").read_text().strip() == "step-00000006"


def test_init_from_takes_the_weights_and_nothing_else(corpus, runs, tmp_path):
    source = checkpoint.latest(runs / "straight" / "checkpoints")
    run(
        "pretrain",
        arguments(
            corpus,
            tmp_path,
            "tuned",
            **{
                "train.init_from": source,
                "train.steps": 1,
                "optimizer.lr": 1e-12,
                "optimizer.warmup_steps": 0,
                "optimizer.decay_steps": 0,
                "optimizer.weight_decay": 0,
                "train.validate_every": 0,
            },
        ),
        1,
    )
    trainer = json.loads((source / "trainer.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "trainer.json").write_text(json.dumps(trainer | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(InputError, match="another tokenizer"):
        preflight(load_config(arguments(corpus, tmp_path, "new", **{"train.init_from": other})[1:]))
    shifted = load_config(["--train.init_from", str(source), "--objective.shift", "true"])
    assert "unlearn" in init_note(shifted) and not init_note(load_config(["--train.init_from", str(source)]))
    tuned, trained = stored_state(tmp_path / "tuned"), stored_state(runs / "straight")
    for name, values in trained.items():
        if name.startswith("weight/"):
            assert torch.allclose(tuned[name], values, atol=1e-9), name
        else:
            assert not torch.equal(tuned[name], values), f"{name} was carried over"
    for name in (name.removeprefix("exp_avg/") for name in trained if name.startswith("exp_avg/")):
        # After the first step of a fresh Adam m = (1 - b1) g and v = (1 - b2) g^2, so v = m^2 (1 - b2) / (1 - b1)^2.
        first, second = tuned[f"exp_avg/{name}"], tuned[f"exp_avg_sq/{name}"]
        assert torch.allclose(second, first**2 * (1 - 0.95) / (1 - 0.9) ** 2, rtol=1e-4, atol=1e-20), name
    assert metrics(tmp_path / "tuned")[0]["train/ce_loss"] < metrics(runs / "straight")[0]["train/ce_loss"] - 0.3


PIPELINE = {"parallel.pipeline": 2, "train.micro_batch_size": 2}
LAYOUTS = {  # ranks, overrides
    "one process": (1, {"train.micro_batch_size": 4}),
    "two tensor-parallel ranks": (2, {"parallel.tensor": 2, "train.micro_batch_size": 4}),
    "a pipeline of sequence-parallel stages": (
        4,
        {**PIPELINE, "parallel.tensor": 2, "parallel.sequence_parallel": "true", "train.sample_every": 20},
    ),
    "engine fsdp2 with a pipeline": (2, {**PIPELINE, "parallel.engine": "fsdp2", "parallel.schedule": "gpipe"}),
}


# One layout that shares nothing with the run it is compared with but the stream; `make parity` takes the others.
EVERYDAY = "engine fsdp2 with a pipeline"


def assert_same_steps(found: list[dict], expected: list[dict]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["train/ce_loss"] == pytest.approx(b["train/ce_loss"], rel=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)
        assert a["train/num_masked_tokens"] == b["train/num_masked_tokens"]


@pytest.mark.parametrize(
    "layout", [name if name == EVERYDAY else pytest.param(name, marks=pytest.mark.parity) for name in LAYOUTS]
)
def test_another_layout_takes_the_same_steps(corpus, runs, tmp_path, layout):
    """The same 20 steps as the run on two data-parallel ranks: loss to 1e-5, gradient norm to 1e-4, the same tokens masked."""
    ranks, overrides = LAYOUTS[layout]
    common = {"train.stop_at": 20, "train.validate_every": 20, "train.checkpoint_every": 0}
    run("pretrain", arguments(corpus, tmp_path, "other", **common, **overrides), ranks)
    assert_same_steps(metrics(tmp_path / "other"), metrics(runs / "straight")[:20])
    a, b = metrics(tmp_path / "other", "val/")[0], metrics(runs / "straight", "val/")[0]
    assert a["val/nelbo"] == pytest.approx(b["val/nelbo"], rel=1e-5)
    if "train.sample_every" in overrides:
        text = (tmp_path / "other" / "samples" / "step-00000020.txt").read_text()
        assert text == (runs / "straight" / "samples" / "step-00000020.txt").read_text()


@pytest.mark.parity
def test_a_run_goes_on_under_another_engine_and_layout(corpus, runs, tmp_path):
    """Begun by ZeRO-3 on two data-parallel ranks, ended by fsdp2 on two tensor-parallel ones: the same steps."""
    there = tmp_path / "moved" / "checkpoints" / "step-00000020"
    shutil.copytree(runs / "straight" / "checkpoints" / there.name, there)
    shutil.copyfile(runs / "straight" / "metrics.jsonl", tmp_path / "moved" / "metrics.jsonl")
    overrides = {"parallel.engine": "fsdp2", "parallel.tensor": 2, "train.stop_at": 30}
    said = run("pretrain", arguments(corpus, tmp_path, "moved", **overrides), 2)
    assert "resumed" in said[0]
    assert_same_steps(metrics(tmp_path / "moved"), metrics(runs / "straight")[:30])


def test_a_step_without_a_single_masked_token_changes_no_parameter_and_no_moment(corpus, tmp_path):
    """Blocks of two tokens, one a step: about a quarter of the steps mask nothing."""
    steps = 12
    run(
        "pretrain",
        arguments(
            corpus,
            tmp_path,
            "empty",
            **{
                "data.sequence_length": 2,
                "train.global_batch_size": 1,
                "train.micro_batch_size": 1,
                "train.steps": steps,
                "train.checkpoint_every": 1,
                "train.keep_checkpoints": steps,
                "train.validate_every": 0,
                "optimizer.warmup_steps": 0,
                "optimizer.decay_steps": 0,
            },
        ),
        1,
    )
    lines = metrics(tmp_path / "empty")
    states = [stored_state(tmp_path / "empty", step) for step in range(1, steps + 1)]
    empty = [line["train/num_masked_tokens"] == 0 for line in lines]
    assert any(empty[1:]) and not all(empty)
    for number in range(1, steps):
        same = all(torch.equal(states[number][name], states[number - 1][name]) for name in states[0])
        assert same == empty[number], f"step {number + 1}"
    assert lines[-1]["train/applied_steps"] == steps - sum(empty)


@pytest.mark.parity
def test_the_compiled_run_on_bf16_with_recomputed_activations_learns_as_well(corpus, runs, tmp_path):
    run(
        "pretrain",
        arguments(
            corpus,
            tmp_path,
            "bf16",
            **{
                "train.precision": "bf16",
                "train.compile": "true",
                "parallel.activation_checkpointing": "full",
                "train.stop_at": 20,
                "data.cfg_dropout": 0.1,
                "data.cfg_condition": "prefix",
                "train.validate_every": 20,
            },
        ),
        1,
    )
    losses = [line["train/ce_loss"] for line in metrics(tmp_path / "bf16")]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    assert metrics(tmp_path / "bf16", "val/")[0]["val/nelbo"] == pytest.approx(
        metrics(runs / "straight", "val/")[0]["val/nelbo"], rel=0.02
    )
