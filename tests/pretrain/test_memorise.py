"""Trained on one short text repeated, the sampler gives the text back: from jsonl to sample, on the real commands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from data.tokenizer import load_tokenizer
from tests.distributed.launch import ROOT, environment, run

pytestmark = pytest.mark.parity

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps until noon."


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on 300 copies of TEXT whose blocks are exactly one copy, its end-of-text token included."""
    folder = tmp_path_factory.mktemp("memorise")
    (folder / "text.jsonl").write_text((json.dumps({"text": TEXT}) + "\n") * 300)
    run(
        "pretrain",
        [
            "prepare",
            str(folder / "text.jsonl"),
            "--out",
            str(folder / "set"),
            "--vocab-size",
            "280",
            "--val-fraction",
            "0",
        ],
        1,
    )
    tokens = len(load_tokenizer(folder / "set" / "train" / "tokenizer.json").encode_batch([TEXT])[0])
    options = {
        "run.dir": folder,
        "run.name": "fox",
        "data.shards": folder / "set" / "train",
        "data.sequence_length": tokens + 1,
        "data.random_length_prob": 0,
        "model.num_layers": 2,
        "model.hidden_size": 64,
        "model.num_heads": 4,
        "model.num_kv_heads": 4,
        "model.ffn_hidden_size": 128,
        "model.vocab_size": 280,
        "model.rope_theta": 100,
        "model.init_std": 0.08,
        "train.steps": 450,
        "train.global_batch_size": 16,
        "train.micro_batch_size": 16,
        "train.validate_every": 0,
        "train.checkpoint_every": 0,
        "optimizer.lr": 3e-3,
        "optimizer.warmup_steps": 20,
        "optimizer.decay_steps": 200,
        "tracking.uri": "none",
    }
    run("pretrain", ["train", *(part for key, value in options.items() for part in (f"--{key}", str(value)))], 1)
    return folder / "fox", tokens


def sample(folder, *options: str) -> str:
    command = [sys.executable, "-m", "pretrain", "sample", "--run", str(folder), "--quiet", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", ["low_confidence", "random"])
def test_the_text_comes_back_from_masks_behind_its_first_two_tokens(trained, order):
    """Something must be given: positions are relative, so in a row of nothing but masks every position looks the same."""
    folder, tokens = trained
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    start = tokenizer.decode(tokenizer.encode_batch([TEXT])[0][:2])
    assert len(tokenizer.encode_prompt(start)) == 2 and len(start) < 6
    options = ["--prompt", start, "--length", str(tokens - 1), "--steps", str(tokens // 2), "--remasking", order]
    assert sample(folder, *options).rstrip("\n") == TEXT


def test_a_masked_gap_is_filled_in_and_the_given_text_stays(trained):
    folder, tokens = trained
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    ids = tokenizer.encode_batch([TEXT])[0].tolist()
    gap = [tokenizer.special.mask if 5 <= i < 20 else token for i, token in enumerate(ids)]
    prompt = tokenizer.decode(gap, show_special=True)
    assert prompt.count("<|mask|>") == 15
    assert sample(folder, "--prompt", prompt, "--length", "0", "--steps", "15").rstrip("\n") == TEXT


def test_a_prompt_that_does_not_fit_is_a_mistake_of_one_line(trained):
    folder, tokens = trained
    command = [sys.executable, "-m", "pretrain", "sample", "--run", str(folder), "--length", str(tokens + 2)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: sample:") and str(tokens + 1) in done.stderr
