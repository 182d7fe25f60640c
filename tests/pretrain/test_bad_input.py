"""A user's mistake ends in one line that names it, exit code 2, no process group, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain import cli
from tests.distributed.launch import ROOT, environment, start
from tests.pretrain.test_training_run import arguments


@pytest.fixture
def broken(corpus, tmp_path) -> Path:
    """A copy of the corpus that a test may damage."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


def check_fails(capsys, command: list[str], *said: str) -> None:
    """The command exits with 2 and says one line that contains every part of `said`; no process group is joined."""
    joined = dist.is_initialized()  # by another test of this process
    code = cli.execute(command)
    captured = capsys.readouterr()
    assert code == 2, captured
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    for part in said:
        assert part in lines[0], lines[0]
    assert dist.is_initialized() == joined


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFIG_MISTAKES = {
    "unknown key": (["--train.stepz", "5"], ["train.stepz", "did you mean", "train.steps"]),
    "ill-typed value": (["--train.steps", "many"], ["train.steps", "int", "many"]),
    "value that is not allowed": (
        ["--objective.masking", "sometimes"],
        ["objective.masking", "bernoulli | fixed_count"],
    ),
    "eps of 0": (["--objective.eps", "0"], ["objective.eps", "variance"]),
    "batch that does not divide": (["--train.micro_batch_size", "3"], ["train.global_batch_size", "nearest"]),
    "heads that do not divide": (["--model.num_heads", "5"], ["model.hidden_size", "model.num_heads", "nearest"]),
    "kv heads that do not divide": (["--model.num_kv_heads", "3"], ["model.num_kv_heads", "nearest"]),
    "tensor parallel ranks without a world": (
        ["--parallel.tensor", "2"],
        ["1 ranks", "parallel.tensor 2", "nearest", "parallel.tensor 1"],
    ),
    "heads that tensor parallelism cannot split": (
        ["--parallel.tensor", "4"],
        ["model.num_kv_heads 2", "parallel.tensor 4"],
    ),
    "more stages than layers": (
        ["--parallel.pipeline", "8"],
        ["parallel.pipeline 8", "8 chunks", "nearest that works: parallel.pipeline"],
    ),
    "a schedule that does not exist": (["--parallel.schedule", "dualpipe"], ["parallel.schedule", "1f1b", "zbv"]),
    "an engine without ZeRO stages": (
        ["--parallel.engine", "fsdp2", "--parallel.zero_stage", "1"],
        ["parallel.engine fsdp2", "parallel.zero_stage 1", "nearest that works: parallel.zero_stage 3"],
    ),
    "sequence parallelism on one rank": (
        ["--parallel.sequence_parallel", "true"],
        ["parallel.sequence_parallel true", "parallel.tensor 1"],
    ),
    "apex's optimizer on fsdp2": (
        ["--optimizer.impl", "apex", "--parallel.engine", "fsdp2"],
        ["optimizer.impl", "parallel.engine=deepspeed"],
    ),
    "vocabulary smaller than the data's": (["--model.vocab_size", "100"], ["model.vocab_size", "512"]),
    "warm-up longer than the run": (["--optimizer.warmup_steps", "900"], ["optimizer.warmup_steps", "train.steps"]),
    "CFG dropout without a condition": (["--data.cfg_dropout", "0.1"], ["data.cfg_dropout", "data.cfg_condition"]),
    "stages out of order": (
        ["--optimizer.schedule", "stages", "--optimizer.stages", "[[5,0.1,constant],[3,0.1,linear]]"],
        ["optimizer.stages", "rising"],
    ),
    "rows without a set of rows": (["--data.pad_policy", "eos_in_loss"], ["data.pad_policy", "--row_tokens"]),
    "a condition that is not in the shards": (
        ["--data.cfg_dropout", "0.1", "--data.cfg_condition", "spans"],
        ["data.cfg_condition is spans", "data.shards", "cfg_condition=prefix"],
    ),
    "negative bad shards": (["--data.max_bad_shards", "-1"], ["data.max_bad_shards", ">= 0"]),
    "a source without a path": (["--data.shards", "[{weight: 1}]"], ["data.shards[0] has no path", "weight: NUMBER"]),
    "a misspelt key of a source": (
        ["--data.shards", '[{"path": "a", "epoch": 3}]'],
        ["data.shards[0]", "epoch", "epochs"],
    ),
    "a weight that is no number": (
        ["--data.shards", "[{path: a, weight: big}]"],
        ["data.shards[0].weight is 'big'", "number"],
    ),
    "epochs without end": (["--data.shards", "[{path: a, epochs: .inf}]"], ["data.shards[0].epochs", "leave it out"]),
    "a name that trackers refuse": (
        ["--data.shards", "[{path: a, name: c++}]"],
        ["data.shards[0].name is 'c++'", "letters"],
    ),
    "samples from shards that may be bad": (
        [
            "--data.max_bad_shards",
            "1",
            "--train.sample_every",
            "5",
            "--train.validate_every",
            "0",
            "--data.val_shards",
            "",
        ],
        ["train.sample_every", "data.max_bad_shards", "data.val_shards"],
    ),
    "an endless cache": (["--data.cache_gib", ".inf"], ["data.cache_gib"]),
    "a mixture of nothing": (["--data.shards", "[]"], ["data.shards is empty"]),
    "no such data": (["--data.shards", "/nowhere/train"], ["data.shards", "/nowhere/train", "prepare"]),
    "no such checkpoint": (["--train.init_from", "/nowhere/step-1"], ["train.init_from", "/nowhere/step-1"]),
    "betas outside [0, 1)": (["--optimizer.betas", "[1.5, 0.9]"], ["optimizer.betas", "[0, 1)"]),
    "negative eps of Adam": (["--optimizer.eps", "-1"], ["optimizer.eps", "> 0"]),
    "negative weight decay": (["--optimizer.weight_decay", "-1"], ["optimizer.weight_decay", ">= 0"]),
    "rotary base of 0": (["--model.rope_theta", "0"], ["model.rope_theta", "> 0"]),
    "no time to wait": (["--parallel.timeout_seconds", "0"], ["parallel.timeout_seconds", ">= 1"]),
    "negative rate in a stage": (
        ["--optimizer.schedule", "stages", "--optimizer.stages", "[[5,-0.1,constant]]"],
        ["optimizer.stages", "rates >= 0"],
    ),
    "a schedule that leaves [0, 1]": (["--objective.mask_ratio", "[0.2, 1.3]"], ["objective.mask_ratio", "0 <= low"]),
    "blocks that do not divide a row": (
        ["--objective.kind", "block", "--objective.block_size", "5"],
        ["objective.block_size is 5", "data.sequence_length (32)", "nearest: 4"],
    ),
    "a name that leaves the folder": (["--run.name", "../evil"], ["run.name", "plain folder name"]),
    "an empty folder": (["--run.dir", ""], ["run.dir"]),
    "a folder that cannot be made": (["--run.dir", "/proc/x"], ["/proc/x", "cannot be written"]),
    "apex that is not there": (["--model.norm_impl", "apex"], ["model.norm_impl", "requirements-cluster.txt"]),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_mistake_in_the_config(capsys, corpus, tmp_path, mistake):
    extra, said = CONFIG_MISTAKES[mistake]
    check_fails(capsys, arguments(corpus, tmp_path / "runs", "r") + extra, *said)
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_the_yaml_file_names_its_key(capsys, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("train: {stepz: 3}\n")
    check_fails(capsys, ["train", "--config", str(file)], "train.stepz")
    check_fails(capsys, ["train", "--config", str(tmp_path / "none.yaml")], "none.yaml")
    file.write_text("train: [1\n")
    check_fails(capsys, ["train", "--config", str(file)], "config")


def test_a_missing_shard(capsys, broken, tmp_path):
    (broken / "train" / "shard-000000.tar").unlink()
    check_fails(capsys, arguments(broken, tmp_path / "runs", "r"), "data.shards", "shard-000000.tar", "missing")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damage", ["one bit flipped", "cut short"])
def test_a_corrupt_tar(capsys, broken, tmp_path, damage):
    tar = broken / "train" / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    if damage == "cut short":
        del content[-1000:]
    else:
        content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    check_fails(capsys, arguments(broken, tmp_path / "runs", "r"), "data.shards", "shard-000000.tar", "prepare")
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_that_does_not_match_the_manifest(capsys, broken, tmp_path):
    with open(broken / "train" / "tokenizer.json", "a") as file:
        file.write("\n")
    check_fails(capsys, arguments(broken, tmp_path / "runs", "r"), "data.shards", "tokenizer.json", "prepare")


def test_a_vocabulary_larger_than_the_stored_type(capsys, broken, tmp_path):
    edit_manifest(broken / "train", vocab_size=70000)
    check_fails(capsys, arguments(broken, tmp_path / "runs", "r"), "data.shards", "70000", "uint16")


def test_validation_data_of_another_tokenizer(capsys, corpus, broken, tmp_path):
    from data.prepare import prepare
    from data.prepare_options import PrepareOptions

    other = tmp_path / "other"
    prepare(
        PrepareOptions(
            out=str(other), source="stdlib", vocab_size=300, limit_bytes=1 << 17, val_fraction=0.3, processes=1
        ),
        progress=False,
    )
    command = arguments(corpus, tmp_path / "runs", "r", **{"data.val_shards": other / "val"})
    check_fails(capsys, command, "data.val_shards", "tokenizer")
    command = arguments(corpus, tmp_path / "runs", "r", **{"data.shards": other / "train", "model.vocab_size": 400})
    check_fails(capsys, command, "model.vocab_size 400", "512", "data.val_shards", str(corpus / "val"))


def test_the_exit_code_of_the_real_process_is_2_and_it_says_one_line(corpus, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pretrain",
        *arguments(corpus, tmp_path / "runs", "r"),
        "--data.shards",
        "/nowhere",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: data.shards"), done.stderr


CHANGED = {
    "run.seed": "7", "model.num_layers": "3", "model.hidden_size": "64", "model.num_heads": "2", "model.num_kv_heads": "4",
    "model.ffn_hidden_size": "96", "model.vocab_size": "600", "model.rope_theta": "10", "model.norm_eps": "0.1",
    "model.tie_embeddings": "true", "model.init_std": "0.1", "data.sequence_length": "16", "data.random_length_prob": "0.5",
    "data.packing": "isolate", "data.shuffle_window": "5000", "data.pad_policy": "eos_in_loss",
    "data.cfg_dropout": "0.5", "data.cfg_condition": "prefix", "objective.eps": "0.1", "objective.t_sampling": "iid",
    "objective.masking": "fixed_count", "objective.weighting": "false", "train.global_batch_size": "16",
    "objective.kind": "uniform", "objective.schedule": "cosine", "objective.normalizer": "masked", "objective.power": "3.0",
    "objective.mask_ratio": "[0.2, 0.9]", "objective.noise_unit": "document", "objective.block_size": "4",
    "objective.shift": "true", "objective.anneal_attention": "5", "objective.smoothing": "0.1",
    "objective.temperature": "[1e-2, 1e-8]", "objective.temperature_steps": "9", "objective.candidates": "3",
}  # fmt: skip


def test_a_mask_id_that_is_an_ordinary_word_is_refused_before_anything_starts(capsys, corpus, tmp_path):
    shutil.copytree(corpus / "train", tmp_path / "train")
    manifest = json.loads((tmp_path / "train" / "manifest.json").read_text())
    manifest["special"]["mask"] = 100
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(manifest))
    command = arguments(
        corpus, tmp_path / "runs", "r", **{"data.shards": tmp_path / "train", "train.validate_every": 0}
    )
    check_fails(capsys, command, "tokenizer.json", "plain text", "special id")
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_not_continued_with_another_model_stream_or_objective_and_stays_as_it_is(
    capsys, corpus, tmp_path
):
    from pretrain.load_config import load_config, to_dict
    from pretrain.loop.stream_position import BLOCK_KEYS, MODEL_KEYS, SAMPLE_KEYS

    assert set(CHANGED) == {*MODEL_KEYS, *BLOCK_KEYS, *SAMPLE_KEYS} - {"data.shards"}
    command = arguments(corpus, tmp_path, "r")
    saved = tmp_path / "r" / "checkpoints" / "step-00000004"
    saved.mkdir(parents=True)
    for key, value in CHANGED.items():
        config = to_dict(load_config([*command[1:], f"--{key}", value]))
        trainer = {"format": 1, "step": 4, "config": config, "data_fingerprint": "x"}
        (saved / "trainer.json").write_text(json.dumps(trainer))
        check_fails(capsys, command, key, "there", "now", "run.name")
        if key.startswith("model."):
            check_fails(capsys, [*command, "--data.reset_stream", "true"], key, "there", "now", "run.name")
        else:
            check_fails(capsys, command, "data.reset_stream=true")
    trainer["config"] = to_dict(load_config(command[1:]))
    (saved / "trainer.json").write_text(json.dumps(trainer))
    check_fails(capsys, command, "other shards", "data.shards")
    for nonsense in ([], {"format": 1}, {"format": 1, "config": {}}):
        (saved / "trainer.json").write_text(json.dumps(nonsense))
        check_fails(capsys, command, "step-00000004" if nonsense == [] else "run.seed")
    assert sorted(p.name for p in (tmp_path / "r").rglob("*")) == ["checkpoints", "step-00000004", "trainer.json"]


def test_a_checkpoint_with_a_truncated_or_missing_file_is_named_before_anything_starts(capsys, corpus, tmp_path):
    import torch

    from data.shard_set import ShardSet
    from parallel import checkpoint
    from parallel.boxes import Boxes
    from pretrain.load_config import load_config, to_dict
    from pretrain.training_data import fingerprint

    command = arguments(corpus, tmp_path, "r")
    trainer = {
        "config": to_dict(load_config(command[1:])),
        "data_fingerprint": fingerprint(ShardSet.open(str(corpus / "train"))),
    }
    state = {"weight/x": Boxes((4,), [((0,), torch.ones(4))])}
    saved = checkpoint.save(tmp_path / "r" / "checkpoints", 4, state, trainer)
    payload = next(saved.glob("*.distcp"))
    whole = payload.read_bytes()
    payload.write_bytes(whole[:-1])
    check_fails(capsys, command, payload.name, "truncated", "resume from an older one")
    payload.unlink()
    check_fails(capsys, command, payload.name, "missing")
    payload.write_bytes(whole)
    # Whole, but of another architecture: said as soon as the engine knows its own tensors.
    check_fails(capsys, command, "no tensor", "another architecture")


def test_a_run_folder_that_another_process_trains_in(capsys, corpus, tmp_path):
    from pretrain.loop.preflight import hold

    with hold(tmp_path / "r"):
        check_fails(capsys, arguments(corpus, tmp_path, "r"), str(tmp_path / "r"), "in use")
    with hold(tmp_path / "r"):
        pass


@pytest.mark.parametrize(
    "command, said",
    [
        (["trian"], "unknown command"),
        (["sample", "--run", "/nowhere"], "/nowhere"),
        (["sample"], "run"),
        (["plot", "--run", "/nowhere"], "metrics"),
        (["track", "sync", "--run", "/nowhere"], "/nowhere"),
        (["prepare", "--out", "/tmp/x", "--vocab-size", "many"], "vocab_size"),
    ],
)
def test_a_mistake_in_another_command(capsys, command, said):
    check_fails(capsys, command, said)


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"RANK": "a", "WORLD_SIZE": "2"}, "whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 of 0"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "MASTER_ADDR"),
    ],
)
def test_a_launcher_that_does_not_say_where_the_ranks_meet(monkeypatch, capsys, corpus, tmp_path, variables, said):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_fails(capsys, arguments(corpus, tmp_path, "r"), "launcher", said)


def test_ranks_that_do_not_share_the_run_folder_all_stop_with_the_reason(corpus, tmp_path):
    """One node resuming while another begins anew would train two models in one."""
    folders = [["--run.dir", str(tmp_path / name)] for name in ("node0", "node1")]
    ranks = start("pretrain", arguments(corpus, tmp_path, "r"), 2, of_rank=folders)
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert all("ranks 0 and 1 see another config" in text and "Traceback" not in text for text in said), said


def test_data_that_turns_out_bad_in_the_middle_of_a_run_names_the_shard_and_ends_with_2(broken, tmp_path):
    """Sizes and headers are right, so a start that does not read every byte lets it pass."""
    tar = broken / "train" / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    start_of_payload, size = 4096, len(content) - 8192
    content[start_of_payload : start_of_payload + size // 2] = b"\xff" * (size // 2)
    tar.write_bytes(content)
    command = [*arguments(broken, tmp_path / "runs", "r"), "--data.verify", "size", "--train.validate_every", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", *command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.startswith("error: ") and "shard-000000.tar" in done.stderr and len(done.stderr.splitlines()) == 1
    )


def test_help_names_every_command(capsys):
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name}" in shown for name in cli.COMMANDS)


def test_mistakes_in_a_mixture(capsys, corpus, tmp_path):
    one, two = str(corpus / "train"), str(corpus / "val")

    def command(*sources: dict) -> list[str]:
        return [*arguments(corpus, tmp_path / "runs", "r"), "--data.shards", json.dumps(sources)]

    check_fails(capsys, command({"path": one}, {"path": one}), "two sources are called", "name")
    check_fails(capsys, command({"path": one, "weight": 1}, {"path": two}), "some sources have a weight")
    check_fails(capsys, command({"path": one, "weight": -1}, {"path": two, "weight": 2}), "weights must be >= 0")
    check_fails(capsys, command({"path": one, "weight": 1, "epochs": 0}), "data.shards[0].epochs is 0", "> 0")
    check_fails(
        capsys, command({"path": one, "weight": 1}, {"path": two, "weight": 1e-9}), "smallest weight is 1.0e-09"
    )
    check_fails(capsys, command({"path": one, "epochs": 0.001}), "`epochs`", "samples", "train.steps")
    check_fails(capsys, command({"path": one}, {"path": "/nowhere/b"}), "data.shards[1]", "/nowhere/b")
    assert not (tmp_path / "runs").exists()


def test_a_config_cannot_make_python_import_what_it_names(capsys, corpus, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(
        "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\nclass Z: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = "[{class_path: evil_module.Z, init_args: {}}]"
    check_fails(
        capsys, [*arguments(corpus, tmp_path / "runs", "r"), "--data.shards", entry], "data.shards[0]", "class_path"
    )
    assert not (tmp_path / "evil_module.ran").exists()


def test_what_an_address_keeps_secret_is_neither_stored_nor_shown():
    from pretrain.addresses import plain_address
    from pretrain.load_config import load_config, to_dict
    from pretrain.training_data import name_of

    secret = "https://user:pw@host:8443/sets/web/train?sig=SECRET#x"
    assert plain_address(secret) == "https://host:8443/sets/web/train" and plain_address("a/b?c@d") == "a/b?c@d"
    assert name_of(secret) == "web" and name_of("shards/c++/train") == "c__" and name_of("/data/wiki/") == "wiki"
    for given in (secret, json.dumps([{"path": secret, "weight": 1}])):
        stored = json.dumps(to_dict(load_config(["--data.shards", given, "--data.val_shards", secret])))
        assert "host:8443/sets/web/train" in stored and "pw" not in stored and "SECRET" not in stored


def test_a_check_of_every_byte_that_the_other_ranks_would_not_wait_for(capsys, corpus, tmp_path, monkeypatch):
    from pretrain.loop import preflight

    monkeypatch.setattr(preflight, "VERIFIED_BYTES_A_SECOND", 1.0)
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    command = [*arguments(corpus, tmp_path / "runs", "r"), "--data.verify", "full"]
    check_fails(capsys, command, "data.verify is full", "data verify", "data.verify=auto")


def test_a_capped_mixture_is_measured_from_where_the_stream_of_a_resumed_run_stands(corpus):
    from data.errors import InputError
    from pretrain.load_config import load_config
    from pretrain.training_data import check_enough, open_training_data

    source = json.dumps([{"path": str(corpus / "val"), "epochs": 1}])
    config = load_config(["--data.shards", source, "--data.sequence_length", "32", "--model.vocab_size", "512"])
    found = open_training_data(config, "size")
    total = found.blocks(config).total
    check_enough(config, found, total)
    with pytest.raises(InputError, match=f"give {total} samples, the run ends behind sample {total + 1}"):
        check_enough(config, found, total + 1)
