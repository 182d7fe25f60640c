"""`checkpoint inspect` says what is stored; `checkpoint verify` finds everything that is amiss, one line each, exit code 2."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel import checkpoint
from parallel.boxes import Boxes
from parallel.shape import ModelShape, parameter_table
from pretrain.cli import execute
from tests.distributed.launch import ROOT, environment

MODEL = {
    "num_layers": 11,
    "hidden_size": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "ffn_hidden_size": 12,
    "vocab_size": 50,
    "rope_theta": 1e4,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
    "norm_impl": "torch",
    "init_std": 0.02,
}


def state(steps: int) -> dict[str, torch.Tensor]:
    table = parameter_table(ModelShape(**MODEL))
    generator = torch.Generator().manual_seed(steps)
    return {
        f"{kind}/{name}": torch.randn(spec.shape, generator=generator)
        for name, spec in table.items()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run folder with the checkpoints of steps 10 and 20, as training leaves it."""
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    trainer = {
        "applied_steps": 19,
        "samples_consumed": 160,
        "config": {
            "model": MODEL,
            "data": {"sequence_length": 32},
            "parallel": {"engine": "deepspeed", "tensor": 1, "pipeline": 1},
            "run": {"name": "tiny"},
        },
        "data_fingerprint": "f1",
        "tokenizer_sha256": hashlib.sha256(b"{}").hexdigest(),
        "mlflow_run_id": "m1",
    }
    for step in (10, 20):
        boxes = {name: Boxes(t.shape, [((0,) * t.dim(), t)]) for name, t in state(step).items()}
        checkpoint.save(folder / "checkpoints", step, boxes, trainer, keep=5)
    return folder


def test_inspect_describes_the_newest_checkpoint_of_a_run_folder_and_a_named_one(run_folder, tmp_path, capsys):
    assert execute(["checkpoint", "inspect", str(run_folder), "--norms", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    expected = state(20)
    assert (found["step"], found["applied_steps"], found["samples"], found["tokens"]) == (20, 19, 160, 160 * 32)
    assert found["written_by"] == {"ranks": 1, "engine": "deepspeed", "tensor": 1, "pipeline": 1}
    assert (found["model"], found["data_fingerprint"], found["mlflow_run_id"]) == (MODEL, "f1", "m1")
    assert found["parameters"] == sum(t.numel() for name, t in expected.items() if name.startswith("weight/"))
    assert found["bytes_of_values"] == sum(t.nbytes for t in expected.values())
    files = (run_folder / "checkpoints" / "step-00000020").iterdir()
    assert found["bytes_on_disk"] == sum(p.stat().st_size for p in files if p.name != "files.json")
    assert {t["name"] for t in found["tensors"]} == set(expected)
    for t in found["tensors"]:
        whole = expected[t["name"]]
        assert (t["shape"], t["dtype"], t["boxes"], t["bytes"]) == (list(whole.shape), "float32", 1, whole.nbytes)
        assert t["norm"] == pytest.approx(float(whole.double().square().sum().sqrt()), rel=1e-12)
    names = [t["name"] for t in found["tensors"] if t["name"].endswith("q_proj.weight") and "weight/" in t["name"]]
    assert [int(name.split(".")[1]) for name in names] == list(range(11)), "blocks are in the model's order"
    printed = capsys.readouterr().out
    assert "5120" in printed and "weight/blocks.10.q_proj.weight" in printed and "tensor 1, pipeline 1" in printed

    assert execute(["checkpoint", "inspect", str(run_folder / "checkpoints" / "step-00000010")]) == 0
    assert "step               10\n" in capsys.readouterr().out


def test_verify_passes_a_whole_run_folder_and_names_every_file(run_folder, capsys):
    assert execute(["checkpoint", "verify", str(run_folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("__0_0.distcp") == printed.count("ok   tokenizer") == printed.count("ok   boxes") == 2
    assert "BAD" not in printed and "2 of 2 checkpoints are whole" in printed


def damage(run_folder: Path, kind: str) -> None:
    newest = run_folder / "checkpoints" / "step-00000020"
    payload = newest / "__0_0.distcp"
    content = bytearray(payload.read_bytes())
    if kind == "truncated":
        payload.write_bytes(content[:-7])
    elif kind == "flipped":
        content[len(content) // 3] ^= 4
        payload.write_bytes(content)
    elif kind == "missing":
        payload.unlink()
    elif kind == "no files.json":
        (newest / "files.json").unlink()
    elif kind == "tokenizer":
        (run_folder / "tokenizer.json").write_text('{"other": 1}')
    elif kind == "stray":
        (newest / "__1_0.distcp").write_bytes(b"?")
    else:
        trainer = json.loads((newest / "trainer.json").read_text())
        if kind == "format":
            trainer["format"] = 99
        else:
            trainer["config"]["model"]["num_layers"] = 12
        (newest / "trainer.json").write_text(json.dumps(trainer))
        files = json.loads((newest / "files.json").read_text())
        text = (newest / "trainer.json").read_bytes()
        files["trainer.json"] = [len(text), hashlib.sha256(text).hexdigest()]
        (newest / "files.json").write_text(json.dumps(files))


@pytest.mark.parametrize(
    "kind, said",
    [
        ("truncated", "__0_0.distcp  truncated: "),
        ("flipped", "__0_0.distcp  its content changed after it was written"),
        ("missing", "__0_0.distcp  missing"),
        ("no files.json", "checkpoint  files.json cannot be read"),
        ("tokenizer", "tokenizer.json is not the tokenizer that the run was trained with"),
        ("stray", "other files  not part of the checkpoint: __1_0.distcp"),
        ("format", "checkpoint  format 99, this version reads 1"),
        ("architecture", "weight/blocks.11.attention_norm.weight is missing, the config's model has (8,)"),
    ],
)
def test_verify_says_what_is_bad_in_one_line_and_exits_2(run_folder, tmp_path, capsys, kind, said):
    damage(run_folder, kind)
    out = tmp_path / "out.json"
    assert execute(["checkpoint", "verify", str(run_folder), "--json", str(out)]) == 2
    bad = [line for line in capsys.readouterr().out.splitlines() if "BAD" in line]
    count = 2 if kind == "tokenizer" else 1  # both checkpoints are of that run
    assert len(bad) == count and all(said in line for line in bad), bad
    problems = [f["problem"] for report in json.loads(out.read_text()) for f in report["findings"] if f["problem"]]
    assert len(problems) == count


def test_what_is_no_checkpoint_is_one_line_and_exit_code_2(tmp_path, run_folder, capsys):
    for arguments, said in (
        (["inspect", str(tmp_path)], "no checkpoint there"),
        (["verify", str(tmp_path / "absent")], "no checkpoint there"),
        (["repair"], "say `checkpoint inspect PATH` or `checkpoint verify PATH`"),
        ([], "say `checkpoint inspect PATH` or `checkpoint verify PATH`"),
        (["verify", str(run_folder), "--json", str(tmp_path / "no" / "out.json")], "cannot be written"),
        (["inspect", str(run_folder), "--json", str(tmp_path / "no" / "out.json")], "cannot be written"),
    ):
        assert execute(["checkpoint", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    (run_folder / "checkpoints" / "step-00000020" / ".metadata").write_bytes(b"\x80\x04.")
    assert execute(["checkpoint", "inspect", str(run_folder)]) == 2
    assert ".metadata cannot be read" in capsys.readouterr().err


def test_inspect_and_verify_start_no_process_group_and_inspect_loads_no_engine(run_folder):
    code = (
        "import sys; from pretrain.cli import _quiet, execute\n"
        "_quiet()\n"
        f"code = execute(['checkpoint', 'inspect', {str(run_folder)!r}, '--norms'])\n"
        "heavy = [m for m in ('deepspeed', 'megatron', 'mlflow', 'torchvision') if m in sys.modules]\n"
        f"code = code or execute(['checkpoint', 'verify', {str(run_folder)!r}])\n"
        "import torch.distributed as dist\n"
        "assert not dist.is_initialized() and not heavy, heavy\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
