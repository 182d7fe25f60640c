"""`submit` before Slurm is asked: mistakes end in one line and leave nothing behind, what is packed is what was there."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import InputError
from pretrain.load_config import load_config
from pretrain.submission.checks import case_of, seconds_of
from pretrain.submission.package import ROOT, code_files, forget, package
from pretrain.submission.submit import submit
from tests.pretrain.test_training_run import arguments


def options(corpus: Path, runs: Path, name: str = "run", **overrides) -> list[str]:
    """A run that two GPUs can take."""
    return arguments(corpus, runs, name, **overrides)[1:] + ["--nodes", "1", "--gpus-per-node", "2", "--dry-run"]


MISTAKES = {
    "unknown key": (["--train.stepz", "5"], ["train.stepz", "did you mean", "train.steps"]),
    "unknown option": (["--nodez", "5"], ["nodez"]),
    "layout": (["--parallel.tensor", "3"], ["layout:", "parallel.tensor 3", "nearest that works"]),
    "world that does not divide": (["--gpus-per-node", "3"], ["train.global_batch_size 8", "nearest"]),
    "no GPUs": (["--gpus-per-node", "0"], ["--gpus-per-node is 0", "at least 1"]),
    "memory": (["--gpu-memory", "0.5"], ["memory: about", "GiB", "--gpu-memory"]),
    "no data": (["--data.shards", "nowhere"], ["data.shards", "nowhere", "no such folder"]),
    "empty data": (["--data.shards", ""], ["data.shards is empty", "prepare"]),
    "no validation data": (["--data.val_shards", ""], ["data.val_shards is empty", "train.validate_every"]),
    "small vocabulary": (["--model.vocab_size", "100"], ["model.vocab_size 100", "512"]),
    "no weights to start from": (["--train.init_from", "nowhere"], ["train.init_from", "is no checkpoint"]),
    "run name": (["--run.name", "a/b"], ["run.name", "plain folder name"]),
    "time": (["--time", "tomorrow"], ["--time is 'tomorrow'", "24:00:00"]),
    "no time to train": (["--time", "00:03:30", "--signal-seconds", "180"], ["leaves no time", "--signal-seconds 180"]),
    "no signal": (["--signal-seconds", "0"], ["--signal-seconds is 0"]),
    "partition": (["--partition", "a b"], ["--partition", "'a b'"]),
    "a word that sbatch takes for its script": (["--sbatch-args=--qos high"], ["--sbatch-args", "'high'", "--name=value"]),
    "unfinished quotes": (["--sbatch-args=--comment='x"], ["--sbatch-args", "cannot be read"]),
    "password": (["--tracking.uri", "https://u:s3cret@h/"], ["tracking.uri holds", "MLFLOW_TRACKING_PASSWORD", "--environment"]),
    "user": (["--tracking.uri=https://u@h/"], ["tracking.uri holds", "MLFLOW_TRACKING_USERNAME"]),
    "database": (["--tracking.uri=mysql+pymysql://u:s3/cret@h/db"], ["tracking.uri holds", "PGPASSWORD"]),
    "environment": (["--environment", "nowhere.env"], ["--environment", "nowhere.env"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, corpus, tmp_path):
    changed, said = MISTAKES[name]
    with pytest.raises(InputError) as caught:
        submit(options(corpus, tmp_path / "runs") + changed)
    for part in said:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and "cret" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_without_slurm_the_line_says_so_and_nothing_is_written(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="not found: submit from a login node"):
        submit([argument for argument in options(corpus, tmp_path / "runs") if argument != "--dry-run"])
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_the_script_and_the_command_and_writes_nothing(corpus, tmp_path, capsys):
    assert submit(options(corpus, tmp_path / "runs", "one", **{"data.workers": 3}) + ["--sbatch-args=--qos=high"]) == 0
    said = capsys.readouterr().out
    assert (ROOT / "slurm" / "pretrain.sbatch").read_text().rstrip() in said
    command = shlex.split(said.split("would run: ")[1].splitlines()[0])
    for part in (
        "--nodes=1",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--cpus-per-task=5",
        "--qos=high",
        "--requeue",
    ):
        assert part in command
    assert command[-2:] == [sys.executable, "USR1"] and command[-3].startswith(str(tmp_path / "runs" / "one"))
    assert not (tmp_path / "runs").exists()


def test_names_that_a_shell_would_take_apart_stay_whole(corpus, tmp_path, capsys):
    nasty = tmp_path / "a b;$(touch pwned)'\"%j"
    submit(options(corpus, nasty))
    command = shlex.split(capsys.readouterr().out.split("would run: ")[1].splitlines()[0])
    assert f"--comment=palimpsest:{nasty}/run" in command
    assert f"--output={str(nasty).replace('%', '%%')}/run/logs/slurm-%j.out" in command


def test_submit_takes_two_seconds_and_no_torch(corpus, tmp_path):
    words = options(corpus, tmp_path / "runs")
    program = (
        f"import sys, time; began = time.monotonic()\nfrom pretrain.submission.submit import submit\nsubmit({words!r})\n"
        "heavy = [m for m in ('torch', 'numpy', 'deepspeed', 'megatron') if m in sys.modules]\n"
        "print('heavy', heavy, file=sys.stderr); print('cpu', time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "heavy []" in done.stderr
    assert float(done.stderr.split("cpu ")[1]) < 2.0


def test_what_is_packed_is_the_code_and_the_config_and_later_changes_do_not_reach_it(corpus, tmp_path, monkeypatch):
    secret = "https://me:hunter2@host/sets/train?token=sesame"
    words = ["--run.dir", str(tmp_path), "--data.shards", secret, "--optimizer.betas", "[0.8, 0.9]"]
    config = load_config(words)
    folder = tmp_path / "run"
    (tmp_path / "own.env").write_text("export MLFLOW_TRACKING_PASSWORD=hunter2\n")
    packed = package(config, folder, str(tmp_path / "own.env"), {"arguments": ["x"]})
    check = subprocess.run(
        ["sha256sum", "--check", "--quiet", "../code.sha256"], cwd=packed / "code", capture_output=True
    )
    assert check.returncode == 0
    assert load_config(["--config", str(packed / "config.yaml")]) == config
    assert (packed / "environment.sh").read_text() == (tmp_path / "own.env").read_text()
    for name in ("config.yaml", "environment.sh", "submitted.json"):
        assert stat.S_IMODE((packed / name).stat().st_mode) == 0o600, name
    about = json.loads((packed / "submitted.json").read_text())
    assert packed.name.endswith(about["code_sha256"][:8])
    files = {str(path) for path in code_files()}
    assert {"pretrain/train.py", "slurm/pretrain.sbatch", "parallel/mesh.py", "data/stream.py"} <= files
    assert not [path for path in files if "__pycache__" in path or path.startswith(("tests", "runs", "."))]
    again = package(config, folder, "", {})
    assert again != packed and not (again / "environment.sh").exists()
    # The code that the package runs is its own.
    program = "import pretrain.config; print(pretrain.config.__file__)"
    environ = {**os.environ, "PYTHONPATH": str(packed / "code"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environ, text=True, capture_output=True)
    assert done.stdout.strip() == str(packed / "code" / "pretrain" / "config.py")


@pytest.mark.parametrize(
    "uri",
    ["", "none", "https://h:5000/", "postgresql://h/db", "sqlite:////home/a:b@c/mlflow.db", "postgresql://u@h/db"],
)
def test_an_address_of_a_tracker_without_a_password_is_taken(uri, corpus, tmp_path):
    assert submit([*options(corpus, tmp_path / "runs"), f"--tracking.uri={uri}"]) == 0


def test_no_password_of_the_command_line_stands_in_submitted_json(corpus, tmp_path, monkeypatch):
    commands = tmp_path / "bin"  # stand-ins for Slurm's, which take every job: what is looked at is what is packed
    commands.mkdir()
    for name, answer in (("squeue", ""), ("sbatch", "7")):
        (commands / name).write_text(f"#!/bin/sh\necho {answer}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    words = [word for word in options(corpus, tmp_path / "runs") if word != "--dry-run"]
    words += ["--data.val_shards", "https://me:hunter2@host/sets/val?token=sesame"]
    submit([*words, "--data.shards=https://me:hunter2@host/sets/train"])
    (record,) = (tmp_path / "runs").glob("run/submitted/*/submitted.json")
    said = json.loads(record.read_text())["arguments"]
    assert "--data.shards=https://host/sets/train" in said and "https://host/sets/val" in said
    assert "hunter2" not in record.read_text() and "sesame" not in record.read_text()


def test_what_slurm_refuses_is_taken_away_again(tmp_path):
    config = load_config(["--run.dir", str(tmp_path / "runs")])
    folder = tmp_path / "runs" / "run"
    forget(package(config, folder, "", {}))
    assert not folder.exists()
    (folder / "checkpoints").mkdir(parents=True)
    forget(package(config, folder, "", {}))
    assert list(folder.iterdir()) == [folder / "checkpoints"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match="cannot be written.*choose another run.dir"):
        package(load_config(["--run.dir", str(tmp_path / "runs")]), tmp_path / "runs" / "run", "", {})


def test_times_are_read_as_sbatch_reads_them():
    times = {"90": 5400, "1:30": 90, "2:00:00": 7200, "1-0": 86400, "1-2:30": 95400, "2-03:04:05": 183845}
    assert {text: seconds_of(text) for text in times} == times
    for text in ("", "x", "1:2:3:4", "-5", "1-"):
        with pytest.raises(InputError):
            seconds_of(text)


@pytest.mark.parametrize("kind", ["masked", "block", "bert", "uniform", "flow", "autoregressive"])
def test_the_case_that_is_checked_is_the_one_that_training_checks(kind):
    from pretrain.model import model_shape, parallel_layout
    from pretrain.objective import row_length

    words = ["--objective.kind", kind, "--objective.block_size", "8", "--parallel.layers_per_stage", "[1, 3]"]
    config = load_config(words)
    case = case_of(config, 4)
    assert case.sequence == row_length(config)
    assert (case.shape, case.layout) == (model_shape(config.model), parallel_layout(config.parallel))
