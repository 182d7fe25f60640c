"""The GPU benchmark on a CPU: every row is there, FLOPs are as PyTorch counts them, and it tells wrong from right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu import best_micro_batch, faults, overhead, run_task
from bench.gpu_cases import SMOKE, TASKS, plan
from bench.gpu_correct import random_batch, relative_errors
from bench.gpu_loss import loss_flops
from bench.gpu_step import predicted_peak
from bench.tables import Table, read_tables
from bench.timing import time_phases

pytestmark = pytest.mark.parity
ROOT = Path(__file__).resolve().parents[2]
PLANNED = {t.key: t for task in TASKS for t in plan(task, SMOKE)}


def run(*arguments: str, out: Path, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "bench/gpu.py", *arguments], cwd=ROOT, env={**os.environ, "OUT": str(out), **environ},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def test_the_smoke_run_gives_every_planned_row_figures_or_a_printed_reason_and_finds_no_fault(tmp_path):
    done = run("--smoke", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    tables, more = read_tables(tmp_path / "gpu.json")
    found = {t.key: t for t in tables}
    assert found.keys() == PLANNED.keys() | {"overhead"}
    for key, table in found.items():
        if key in PLANNED:
            assert list(table.rows) == list(PLANNED[key].rows), key
        for label, row in table.rows.items():
            # A CPU has no cuDNN attention; everything else must have figures.
            if "cudnn" in label:
                assert row["status"] == "not run: no such attention kernel on cpu for these inputs"
            elif row["status"] != "ok":
                assert "linear_cross_entropy" in label and not hasattr(torch.nn.functional, "linear_cross_entropy"), row
            lines = [line for line in done.stdout.splitlines() if line.startswith(f"| {label} ")]
            assert lines and (row["status"] == "ok" or any(row["status"] in line for line in lines)), label
    assert more["environment"]["torch"] == torch.__version__ and more["environment"]["device"] == "CPU"
    markdown = (tmp_path / "gpu.md").read_text()
    assert all(t.title in markdown for t in tables) and "--smoke" in markdown
    assert all(found["correct"].rows[k]["met"] for k in found["correct"].rows if "cudnn" not in k)
    chosen = best_micro_batch(tables)
    rates = {r["micro"]: r["tokens/s"] for r in found["step.deepspeed.eager"].rows.values()}
    assert rates[chosen] == max(rates.values())
    for engine in ("deepspeed", "fsdp2", "plain"):
        assert [r["micro"] for r in found[f"step.{engine}.compiled"].rows.values()] == [chosen]


WRONG_MODEL = """
import sys
import torch.nn.functional as F
import parallel.block
parallel.block.attention = lambda q, k, v, documents=None: F.scaled_dot_product_attention(
    q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
from bench.gpu import arguments, child_main
child_main(arguments(sys.argv[1:]))
"""


def test_a_causal_model_is_a_fault_in_every_row_that_compares_it_with_the_reference(tmp_path):
    file = tmp_path / "d.json"
    command = [sys.executable, "-c", WRONG_MODEL, "--smoke", "--task", "d", "--file", str(file), "--budget", "100"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100).returncode == 0
    tables, _ = read_tables(file)
    correct, sight = tables
    ran = [label for label, row in correct.rows.items() if row["status"] == "ok"]
    assert len(ran) >= 5 and all(f"correct: {label}: not met" in faults(tables) for label in ran)
    assert sight.rows["one document, attention default"]["met"] is False


def test_a_missing_package_is_named_in_its_rows_and_is_no_fault(tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise ModuleNotFoundError('gone', name='deepspeed')\n")
    file = tmp_path / "c.json"
    task = ("--smoke", "--task", "c.deepspeed.compiled", "--file", str(file), "--budget", "100")
    done = run(*task, out=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    tables, _ = read_tables(file)
    assert [r["status"] for r in tables[0].rows.values()] == ["not run: needs deepspeed, which is not installed"]
    assert faults(tables) == [] and "needs deepspeed" in tables[0].markdown()


def test_without_time_every_row_says_so_and_a_task_that_overruns_is_stopped(tmp_path):
    done = run("--smoke", "--budget", "1", out=tmp_path)
    assert done.returncode == 0
    tables, _ = read_tables(tmp_path / "gpu.json")
    assert {t.key for t in tables} == PLANNED.keys() | {"overhead"}
    reasons = {r["status"] for t in tables if t.key in PLANNED for r in t.rows.values()}
    assert reasons == {"not run: time budget used up"}
    began = time.monotonic()
    tables, _ = run_task(TASKS[0], SMOKE, 0.5, None, tmp_path / "log")
    assert time.monotonic() - began < 5
    assert all(r["status"].startswith("not run: the task was stopped") for t in tables for r in t.rows.values())


def test_without_a_gpu_the_full_run_is_refused_in_one_line(tmp_path):
    done = run(out=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--smoke" in done.stderr


@pytest.mark.parametrize("parts", ["x", "a,x", ""])
def test_an_unknown_part_is_refused(tmp_path, parts):
    done = run("--only", parts, out=tmp_path)
    assert done.returncode == 2 and "the parts are a, b, c, d" in done.stderr


def test_gpu_sh_installs_carried_wheels_for_the_run_alone(tmp_path):
    with zipfile.ZipFile(tmp_path / "carried_probe-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried_probe-1.0.dist-info/"
        wheel.writestr("carried_probe.py", "WORD = 'carried in'\n")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: carried-probe\nVersion: 1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    python = tmp_path / "python"  # stands for the machine's interpreter: pip is real, the benchmark is replaced
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && exec {sys.executable} "$@"\n'
        f'exec {sys.executable} -c "import carried_probe, sys; print(carried_probe.WORD, sys.argv[1:])" "$@"\n'
    )
    python.chmod(0o755)
    environ = {**os.environ, "PYTHON": str(python), "WHEELS": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = ["bash", "bench/gpu.sh", "--only", "a"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout == "carried in ['bench/gpu.py', '--only', 'a']\n", done.stderr
    assert not list(tmp_path.glob("tmp.*"))


@pytest.fixture
def mesh():
    from parallel.mesh import build_mesh

    return build_mesh()


def test_block_flops_are_what_pytorch_counts_on_the_math_attention_path(mesh):
    from bench.gpu_block import block_flops, build_blocks, through
    from parallel.attention import rotary_angles
    from parallel.shape import ModelShape

    for kv_heads in (4, 2):
        shape = ModelShape(2, hidden_size=32, num_heads=4, num_kv_heads=kv_heads, ffn_hidden_size=48, vocab_size=128)
        blocks = build_blocks(shape, mesh, "cpu", torch.float32)
        x = torch.randn(3, 16, 32, requires_grad=True)
        cos, sin = rotary_angles(torch.arange(16).expand(3, -1), shape.head_dim, shape.rope_theta)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            y = through(blocks, x, cos, sin)
            forward = counter.get_total_flops()
            y.sum().backward()
        assert counter.get_total_flops() == block_flops(shape, 3, 16) == 3 * forward


def test_step_flops_are_what_pytorch_counts_on_the_math_attention_path(mesh):
    from bench.gpu_step import PlainTrainer
    from parallel.shape import ModelShape
    from pretrain.flops import flops_per_token
    from pretrain.model import DiffusionTransformer

    shape = ModelShape(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, vocab_size=256)
    model = DiffusionTransformer(shape, mesh)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    batch = random_batch(2, 24, shape.vocab_size, seed=0, p_mask=0.3)
    masked = float(batch.masked.sum()) / 48
    assert 0.1 < masked < 0.6
    trainer = PlainTrainer(model, "cpu")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trainer.step(batch.tensors(), 48.0)
    assert counter.get_total_flops() == pytest.approx(48 * flops_per_token(shape, 24, masked), rel=1e-12)


def test_loss_floor_flops_are_what_pytorch_counts():
    from argparse import Namespace

    from bench.loss import floor, make_inputs

    x = make_inputs(Namespace(device="cpu", dtype="float32", tokens=40, hidden=16, vocab=96, masked_fraction=0.5))
    with FlopCounterMode(display=False) as counter:
        floor(x)
    assert counter.get_total_flops() == loss_flops(int(x.masked.sum()), 16, 96)


def test_the_yardstick_takes_the_first_step_of_the_float64_reference(mesh):
    from bench.gpu_correct import build, small_weights
    from bench.gpu_step import ADAMW, CLIP, RATE, PlainTrainer
    from parallel.shape import ModelShape
    from tests import reference_model

    shape = ModelShape(**SMOKE.small)
    weights = small_weights(shape, seed=5)
    batch = random_batch(2, 16, shape.vocab_size, seed=6)
    trainer = PlainTrainer(build(shape, mesh, weights, torch.float32, "cpu"), "cpu")
    before = {name: w.clone() for name, w in weights.items()}
    reference = reference_model.AdamW(weights, ADAMW.betas, ADAMW.eps, ADAMW.weight_decay, CLIP)
    for w in weights.values():
        w.requires_grad_()
    value = reference_model.loss(weights, shape, batch.tensors(), 32.0)
    assert trainer.step(batch.tensors(), 32.0) == pytest.approx(value.item(), rel=5e-3)
    reference.step(reference_model.gradients(weights, value), RATE)
    for (name, weight), master in zip(trainer.model.named_parameters(), trainer.masters, strict=True):
        moved = master.detach()[: before[name].shape[0]].double() - before[name]
        expected = weights[name].detach() - before[name]
        # Adam's first step is the sign of the gradient, and bfloat16 turns the sign of some that are next to nothing.
        assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), 0) > 0.9, name
        assert float(moved.norm() / expected.norm()) == pytest.approx(1, abs=0.02), name
        assert torch.equal(weight, master.bfloat16()), name


def test_relative_errors_are_those_put_in():
    right = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}
    wrong = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([12.0])}
    got = relative_errors(torch.tensor(1.01), wrong, torch.tensor(1.0), right)
    assert got[:3] == pytest.approx((0.01, 0.5 / 13, 0.1), rel=1e-5) and got[3] == "a"


def test_timing_leaves_out_warm_up_and_preparation_and_tells_phases_apart():
    calls = []

    def phase(seconds: float):
        def call():
            calls.append(seconds)
            time.sleep(seconds + (0.2 if len(calls) <= 2 else 0))  # the first repeat is slow

        return call

    first, second, both = time_phases((phase(0.01), phase(0.03)), "cpu", 4, before=lambda: time.sleep(0.05), warmup=1)
    assert 0.01 <= first.least <= first.median <= first.most < 0.03 <= second.median < 0.06
    assert both.median == pytest.approx(first.median + second.median, abs=0.01)
    assert (first.repeats, len(calls)) == (4, 10)
    assert time_phases((lambda: None,), "cpu", 1000, deadline=time.monotonic())[0].repeats == 3


def test_memory_of_the_next_micro_batch_is_read_off_the_line_through_the_last_two():
    assert predicted_peak({2: 30}, 4) == 0
    assert predicted_peak({2: 30, 4: 50}, 8) == 90
    assert predicted_peak({1: 7, 2: 30, 4: 50}, 16) == 170


def test_the_overhead_compares_equal_micro_batches_only():
    def steps(engine: str, times: dict[int, float]) -> Table:
        table = Table.planned(f"step.{engine}.eager", "", ("micro", "step ms"), [str(m) for m in times])
        for micro, seconds in times.items():
            timing = {"median_s": seconds, "least_s": seconds, "most_s": seconds, "repeats": 3}
            table.fill(str(micro), {"micro": micro, "step ms": timing})
        return table

    table = overhead([steps("deepspeed", {2: 1.1, 4: 3.0}), steps("plain", {4: 2.0, 8: 9.0})])
    assert {label: row["overhead"] for label, row in table.rows.items()} == {
        "deepspeed, eager, micro batch 4": "+50.0%"
    }
    assert "not run" in json.dumps(overhead([steps("plain", {4: 2.0})]).rows)
    assert overhead([]) is None
