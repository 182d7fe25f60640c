"""The `sample` command and the logged samples, for every kind of objective, from a real checkpoint.

One short masked run is trained; for the other kinds its checkpoint is relabelled: what they write is then no good text, but it
is written by their own sampler from real files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import InputError
from data.shard_set import ShardSet
from parallel import checkpoint
from pretrain.load_model import find_checkpoint, load_model, load_run_tokenizer
from pretrain.loop.sample_log import hidden_tokens, log_samples
from pretrain.predictor import Objective, Predictor, objective_of
from pretrain.sampling import command as sample_module
from pretrain.sampling.command import SampleOptions, sample
from tests.distributed.launch import run
from tests.pretrain.test_sampler import one_thread  # noqa: F401  for every test of this file
from tests.pretrain.test_training_run import arguments

KINDS = ("masked", "bert", "block", "uniform", "flow", "autoregressive")
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def masked_run(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    # Larger than what the tokenizer knows, so that there are ids that must never come out.
    few = {"train.steps": 3, "train.validate_every": 0, "optimizer.warmup_steps": 0, "model.vocab_size": 520}
    run("pretrain", arguments(corpus, folder, "masked", **few, **{"optimizer.decay_steps": 0}), 1)
    return folder / "masked"


def relabelled(run_folder: Path, to: Path, **objective) -> Path:
    """A copy of the run whose newest checkpoint says that it has this objective."""
    shutil.copytree(run_folder, to)
    folder = checkpoint.latest(to / "checkpoints")
    trainer = json.loads((folder / "trainer.json").read_text())
    trainer["config"]["objective"].update(objective)
    content = json.dumps(trainer).encode()
    (folder / "trainer.json").write_bytes(content)
    files = json.loads((folder / "files.json").read_text())
    files["trainer.json"] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder / "files.json").write_text(json.dumps(files))
    return to


@pytest.fixture(scope="module")
def runs(masked_run, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    sizes = {"block": {"block_size": 8}}
    return {kind: relabelled(masked_run, folder / kind, kind=kind, **sizes.get(kind, {})) for kind in KINDS}


@EACH_KIND
def test_sample_writes_texts_of_every_kind_the_same_each_time(runs, kind, capsys):
    options = SampleOptions(str(runs[kind]), prompt="def ", length=20, count=2, temperature=1.0, seed=5)
    if kind != "autoregressive":
        options.steps = 6
    texts = sample(options)
    printed = capsys.readouterr().out
    assert len(texts) == 2 and texts[0] != texts[1] and all(text.startswith("def ") for text in texts)
    assert "--- 1 of 2" in printed and "--- 2 of 2" in printed and "░" not in printed, "no terminal, no frames"
    assert sample(options) == texts and sample(replace(options, seed=6)) != texts
    assert sample(replace(options, cfg_scale=3.0)) != texts


@EACH_KIND
def test_a_terminal_sees_the_text_change(runs, kind, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    sample(SampleOptions(str(runs[kind]), prompt="def ", length=12, pause=0.0))
    shown = capsys.readouterr().out
    assert "\x1b[1;32m" in shown, "new tokens are highlighted"
    assert ("░" in shown) == (kind not in ("uniform", "flow"))
    sample(SampleOptions(str(runs[kind]), prompt="def ", length=12, quiet=True))
    assert "\x1b[1;32m" not in capsys.readouterr().out


def test_options_of_other_kinds_and_prompts_that_cannot_be_read_are_one_line(runs, masked_run, tmp_path):
    def message(run_folder, **words) -> str:
        with pytest.raises(InputError) as found:
            sample(SampleOptions(str(run_folder), **words))
        assert "\n" not in str(found.value)
        return str(found.value)

    assert "`remasking` means nothing to a model of kind uniform" in message(runs["uniform"], remasking="random")
    assert "`steps` means nothing to a model of kind autoregressive" in message(runs["autoregressive"], steps=4)
    assert "`top_p` means nothing to a model of kind masked" in message(masked_run, top_p=0.9)
    assert "blocks of 8 tokens" in message(runs["block"], block_length=4)
    assert "left to right" in message(runs["autoregressive"], prompt="a <|mask|> b", length=8)
    assert "`temperature`" in message(tmp_path / "nothing", temperature=-1.0), "before a checkpoint is looked for"
    shifted = relabelled(masked_run, tmp_path / "shifted", shift=True)
    assert "first token is known" in message(shifted, length=8)
    assert sample(SampleOptions(str(shifted), prompt="def ", length=8))[0].startswith("def ")
    filled = sample(SampleOptions(str(runs["uniform"]), prompt="for <|mask|> in", length=0, steps=3))[0]
    assert filled.startswith("for ") and filled.endswith(" in")


class OneModel:
    """The engine's side that logged samples need, over a whole model in this process."""

    def __init__(self, folder: Path):
        self.model, self.config, self.trainer = load_model(find_checkpoint(str(folder)))
        self.vocab_size, self.mesh = self.config.model.vocab_size, self.model.head.mesh
        self.forward = Predictor.of_model(self.model, Objective(), eos_id=0).forward


@EACH_KIND
def test_logged_samples_show_what_was_hidden_and_what_came_back(runs, kind, corpus, tmp_path):
    engine = OneModel(runs[kind])
    tokenizer = load_run_tokenizer(find_checkpoint(str(runs[kind])), engine.trainer)
    objective = objective_of(engine.config, engine.trainer["step"])
    assert objective.kind == kind
    shards = ShardSet.open(corpus / "train")
    text = log_samples(engine, shards, tokenizer, 32, 7, tmp_path, objective=objective)
    assert (tmp_path / "step-00000007.txt").read_text() == text
    assert text.count("--- original") == text.count("--- generated") == 2
    for section in text.split("===")[1:]:
        shown, generated = section.split("--- masked: ")[1].split("--- generated")
        assert shown.count("<|mask|>") == int(shown.split(" of ")[0]) > 0 and "<|mask|>" not in generated
    assert log_samples(engine, shards, tokenizer, 32, 7, tmp_path, objective=objective) == text


def test_what_is_hidden_suits_the_kind():
    plain = [hidden_tokens(g, 40, 4, Objective()) for g in range(4)]
    at_the_end = [hidden_tokens(g, 40, 4, Objective("autoregressive")) for g in range(4)]
    shifted = [hidden_tokens(g, 40, 4, Objective(shift=True)) for g in range(4)]
    assert any(mask[0] for mask in plain) and not any(mask[0] for mask in shifted)
    for mask, end, shift in zip(plain, at_the_end, shifted):
        assert end.sum() == mask.sum() and np.array_equal(np.sort(end), end)
        assert np.array_equal(mask[1:], shift[1:])


def test_every_kind_is_offered_the_ids_that_only_the_model_knows_as_noise_but_never_gives_them_back(runs, monkeypatch):
    """The model has 520 rows, the tokenizer 512 ids: the last 8 are forbidden."""
    seen = {}
    generate = sample_module.generate

    def spy(predictor, ids, prompt_mask, **words):
        seen.update(words)
        done = generate(predictor, ids, prompt_mask, **words)
        assert int(done.max()) < 512
        return done

    monkeypatch.setattr(sample_module, "generate", spy)
    for kind in KINDS:
        sample(SampleOptions(str(runs[kind]), length=12, count=4, temperature=50.0))
        assert seen["vocab_size"] == 520 and list(seen["forbidden_ids"]) == list(range(512, 520))
        assert seen["objective"].kind == kind and torch.is_grad_enabled()
