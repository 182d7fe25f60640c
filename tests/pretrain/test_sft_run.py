"""Instruction pairs from chat JSONL to a trained model: the answer is learned from the prompt, and only the answer is counted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data.prepare import prepare
from data.prepare_options import PrepareOptions
from data.shard_set import ShardSet
from tests.distributed.launch import run
from tests.pretrain.test_training_run import arguments, metrics

pytestmark = pytest.mark.parity

WORDS = "apple river stone cloud tiger piano".split()


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Rows of whole conversations, whose answer says the word of the question twice."""
    folder = tmp_path_factory.mktemp("chats")
    rng = random.Random(0)
    lines = []
    for number in range(1500):
        word = rng.choice(WORDS)
        messages = [
            {"role": "user", "content": f"say {word}"},
            {"role": "assistant", "content": f"{word} {word}"},
        ]
        lines.append(json.dumps({"messages": messages, "id": number}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    prepare(
        PrepareOptions(
            out=str(folder / "set"), inputs=[str(folder / "chats.jsonl")], chat="chatml", vocab_size=330, row_tokens=64,
            chunk_tokens=2048, shard_tokens=16384, val_fraction=0.1, processes=1,
        ),
        progress=False,
    )  # fmt: skip
    return folder / "set"


def test_the_answer_is_learned_from_the_prompt_and_guidance_finds_its_null_input(chats, tmp_path):
    shards = ShardSet.open(chats / "train")
    assert shards.row_tokens == 64 and shards.has_spans and shards.manifest.padding_tokens > 0
    words = {
        "data.packing": "isolate", "data.cfg_dropout": 0.2, "data.cfg_condition": "spans", "data.random_length_prob": 0,
        "data.sequence_length": 64, "model.hidden_size": 64, "model.ffn_hidden_size": 128, "model.vocab_size": shards.vocab_size,
        "train.steps": 350, "train.micro_batch_size": 8, "train.global_batch_size": 16, "train.checkpoint_every": 0,
        "train.validate_every": 350, "train.val_samples": 0, "optimizer.lr": 5e-3, "optimizer.warmup_steps": 20,
        "optimizer.decay_steps": 60, "objective.masking": "fixed_count",
    }  # fmt: skip
    run("pretrain", arguments(chats, tmp_path, "sft", **words), 2, timeout=300)
    (found,) = metrics(tmp_path / "sft", "val/")
    # The words of an answer follow from the prompt, its markers are always the same: next to nothing is left to guess.
    assert found["val/nelbo"] < 0.15 * found["val/unigram_entropy"]
    steps = metrics(tmp_path / "sft")
    assert steps[-1]["train/loss"] < 0.2 * steps[0]["train/loss"]


def test_rows_with_their_padding_in_the_loss_train_too(chats, tmp_path):
    shards = ShardSet.open(chats / "train", "size")
    words = {
        "data.packing": "isolate", "data.pad_policy": "eos_in_loss", "data.sequence_length": 64, "data.random_length_prob": 0,
        "model.vocab_size": shards.vocab_size, "train.steps": 4, "train.checkpoint_every": 0, "train.validate_every": 0,
        "optimizer.warmup_steps": 0, "optimizer.decay_steps": 0,
    }  # fmt: skip
    counted = {}
    for policy in ("eos_in_loss", "excluded"):
        more = {**words, "data.pad_policy": policy, "train.stop_at": 2}
        run("pretrain", arguments(chats, tmp_path, policy, **more), 1)
        counted[policy] = [line["train/mask_ratio"] for line in metrics(tmp_path / policy)]
        assert all(line["train/loss"] > 0 for line in metrics(tmp_path / policy))
    assert counted["eos_in_loss"] != counted["excluded"]
