"""Bytes of tokens: their sum over any cuts of a set is the length of its text, for tokenizers of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from data.manifest import SpecialIds
from data.prepare import prepare
from data.prepare_options import PrepareOptions
from data.shard_set import ShardSet
from data.tokenizer import TextTokenizer, load_tokenizer, prepare_tokenizer
from pretrain.evaluation.evaluate import block_bytes
from pretrain.evaluation.token_bytes import TokenBytes
from pretrain.evaluation.validation import Validation
from tests.data.token_models import rank_file, sentencepiece_file, sentences

TEXTS = [
    "plain text, twice",
    "Grüße aus Köln: 25 €",
    "日本語と🙂🙃",
    " leading space",
    "",
    "a\n\n  b\tc",
    "two  spaces   ",
]


def byte_fallback_file(path):
    """As Llama's tokenizer.json: U+2581 for the space, one before every text, bytes for what is unknown."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(sentences(), trainer)
    model = Tokenizer.from_str(tokenizer.to_str().replace('"special":true', '"special":false'))
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.save(str(path))
    return path


@pytest.fixture(scope="module", params=["trained", "tiktoken", "sentencepiece", "sentencepiece without prefix"])
def tokenizer(request, tmp_path_factory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    out = folder / "tokenizer.json"
    if request.param == "trained":
        return prepare_tokenizer(out, texts=sentences(), vocab_size=400)
    if request.param == "tiktoken":
        return prepare_tokenizer(out, rank_file(folder / "ranks.tiktoken"), pattern="gpt2")
    plain: dict[str, Any] = {"add_dummy_prefix": False} if "without" in request.param else {}
    return prepare_tokenizer(out, sentencepiece_file(folder / "m.model", **plain))


def pieces(tokenizer: TextTokenizer) -> np.ndarray:
    ids = tokenizer.encode_batch(TEXTS)
    return np.concatenate([part for text in ids for part in (text, [tokenizer.special.eos])]).astype(np.int64)


def test_bytes_add_up_to_the_text_wherever_it_is_cut(tokenizer):
    found, stream = TokenBytes(tokenizer), pieces(tokenizer)
    whole = sum(len(text.encode()) for text in TEXTS)
    for length in (1, 2, 5, 17, len(stream)):
        total = 0
        for start in range(0, len(stream), length):
            block = stream[start : start + length]
            total += found.count(block, np.ones(len(block), bool), None, int(stream[start - 1]) if start else None)
        assert total == whole
    assert found.inside[found.special].sum() == found.at_start[found.special].sum() == 0


def test_only_counted_tokens_count_and_an_answer_begins_a_text(tokenizer):
    found = TokenBytes(tokenizer)
    prompt, answer = tokenizer.encode_batch(["the question is", "Köln is 日本 it"])
    tokens = np.concatenate([prompt, answer, [tokenizer.special.eos]]).astype(np.int64)
    given = np.arange(len(tokens)) < len(prompt)
    assert found.count(tokens, ~given, given, None) == len("Köln is 日本 it".encode())
    assert found.count(tokens, given, given, None) == len("the question is")
    some = np.random.default_rng(0).random(len(tokens)) < 0.5
    assert found.count(tokens, some, given, None) + found.count(tokens, ~some, given, None) == found.count(
        tokens, np.ones(len(tokens), bool), given, None
    )


def test_a_llama_like_tokenizer_json_is_counted_exactly(tmp_path):
    tokenizer = prepare_tokenizer(tmp_path / "tokenizer.json", byte_fallback_file(tmp_path / "llama.json"))
    found, stream = TokenBytes(tokenizer), pieces(tokenizer)
    whole = sum(len(text.encode()) for text in TEXTS)
    assert "".join(tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)) == "".join(TEXTS)
    assert found.count(stream, np.ones(len(stream), bool), None, None) == whole
    assert isinstance(tokenizer.special, SpecialIds)


def test_blocks_of_a_set_with_a_space_before_every_text_add_up_to_its_text(tmp_path):
    """Blocks begin in the middle of texts and at their start: only there is the space not in the text."""
    (tmp_path / "text.txt").write_text("\n\n".join(sentences()))
    sentencepiece_file(tmp_path / "m.model")
    prepare(
        PrepareOptions(
            out=str(tmp_path / "set"), inputs=[str(tmp_path / "text.txt")], tokenizer=str(tmp_path / "m.model"), val_fraction=0,
            processes=1,
        ),
        progress=False,
    )  # fmt: skip
    shards = ShardSet.open(tmp_path / "set" / "train")
    found = TokenBytes(load_tokenizer(shards.tokenizer_path, special=shards.special))
    assert (found.at_start != found.inside).sum() > 10
    for length in (5, 64):
        validation = Validation(shards, length, 4)
        tokens = [int(validation.sample(g)[1].sum()) for g in range(validation.total)]
        assert sum(block_bytes(validation, found, g, n) for g, n in enumerate(tokens)) == shards.utf8_bytes
