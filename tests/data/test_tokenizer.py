"""Laws of the tokenizer: text comes back exactly, and raw text never becomes a special id."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data.errors import InputError
from data.manifest import SpecialIds
from data.tokenizer import TextTokenizer, find_special_ids, load_tokenizer, prepare_tokenizer
from data.tokenizer_training import even_sample, train_bpe
from tests.data.small_corpus import make_text

AWKWARD = [
    "plain",
    "  two  spaces \t tab\r\nCRLF\n\n",
    "\x00nul\x00",
    "\ufeffbyte order mark",
    "naïve 語言 😀 e\u0301 \u202e right to left",
    "<|mask|>",
    "<|endoftext|>a<|mask|>b <|endoftext|><|mask|>",
    "\n<|mask|>\n",
]


def bpe_file(path: Path, special: list[str], *, vocab_size: int = 320) -> Tokenizer:
    """A byte-level BPE written by the library alone, as another project would have made it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["some text to learn some merges from"] * 3, trainer)
    backend.save(str(path))
    return backend


def test_every_text_comes_back_exactly(tokenizer: TextTokenizer) -> None:
    rng = np.random.default_rng(0)
    code_points = [int(c) for c in rng.integers(0, 0x110000, size=4000) if not 0xD800 <= c < 0xE000]
    texts = [*AWKWARD, "".join(map(chr, code_points)), make_text(rng, 500)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text


def test_raw_text_never_becomes_a_special_id(tokenizer: TextTokenizer) -> None:
    special = {tokenizer.special.mask, tokenizer.special.eos}
    for ids in tokenizer.encode_batch(AWKWARD):
        assert not special & set(ids.tolist())


def test_a_prompt_turns_the_mask_literal_and_nothing_else_into_its_id(tokenizer: TextTokenizer) -> None:
    mask, eos = tokenizer.special.mask, tokenizer.special.eos
    ids = tokenizer.encode_prompt("a<|mask|><|mask|> b<|endoftext|>")
    assert ids.tolist().count(mask) == 2 and eos not in ids
    assert tokenizer.decode(ids) == "a b<|endoftext|>"
    assert tokenizer.decode(ids, show_special=True) == "a<|mask|><|mask|> b<|endoftext|>"
    np.testing.assert_array_equal(tokenizer.encode_prompt("no mask"), tokenizer.encode_batch(["no mask"])[0])


def test_vocab_size_counts_the_special_tokens_and_training_repeats_itself() -> None:
    rng = np.random.default_rng(1)
    texts = [make_text(rng, 300) for _ in range(5)]
    first, second = train_bpe(texts, 280), train_bpe(iter(texts), 280)
    assert first.get_vocab_size() == 280 and first.to_str() == second.to_str()
    assert find_special_ids(first, "here") == SpecialIds(mask=0, eos=1, pad=1)


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="vocab_size: 257"):
        train_bpe(["text"], 257)


def test_the_file_alone_gives_the_same_ids_back(tokenizer: TextTokenizer) -> None:
    again = load_tokenizer(tokenizer.path.parent)
    assert (again.special, again.sha256, again.vocab_size) == (
        tokenizer.special,
        tokenizer.sha256,
        tokenizer.vocab_size,
    )


def test_a_mask_is_added_to_a_tokenizer_without_one_and_other_ids_stay(tmp_path: Path) -> None:
    before = bpe_file(tmp_path / "old.json", ["<s>", "</s>"])
    adopted = prepare_tokenizer(tmp_path / "new.json", tmp_path / "old.json")
    vocabulary = before.get_vocab()
    assert adopted.special == SpecialIds(mask=len(vocabulary), eos=vocabulary["</s>"], pad=1, bos=vocabulary["<s>"])
    assert adopted.vocab_size == len(vocabulary) + 1
    assert {name: adopted.backend.token_to_id(name) for name in vocabulary} == vocabulary
    assert adopted.decode(adopted.encode_batch(["<s>x</s>"])[0]) == "<s>x</s>"


def test_existing_special_tokens_are_used_and_a_missing_end_of_text_is_added(tmp_path: Path) -> None:
    bpe_file(tmp_path / "old.json", ["[MASK]"])
    adopted = prepare_tokenizer(tmp_path / "new.json", tmp_path / "old.json")
    assert adopted.special.mask == 0 and adopted.special.eos == adopted.special.pad == adopted.vocab_size - 1
    assert adopted.backend.id_to_token(adopted.special.eos) == "<|endoftext|>"


def test_a_named_end_of_text_wins_over_the_usual_names(tmp_path: Path) -> None:
    before = bpe_file(tmp_path / "old.json", ["</s>", "<|im_end|>"])
    adopted = prepare_tokenizer(tmp_path / "new.json", tmp_path / "old.json", eos_token="<|im_end|>")
    assert adopted.special.eos == before.token_to_id("<|im_end|>")
    again = load_tokenizer(tmp_path / "new.json", special=adopted.special)
    assert again.special == adopted.special
    with pytest.raises(InputError, match="is the mask token"):
        prepare_tokenizer(tmp_path / "bad.json", tmp_path / "old.json", eos_token="<|mask|>")


def test_saved_truncation_padding_and_automatic_tokens_do_not_touch_documents(tmp_path: Path) -> None:
    backend = bpe_file(tmp_path / "old.json", ["<s>", "</s>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.save(str(tmp_path / "old.json"))
    adopted = prepare_tokenizer(tmp_path / "new.json", tmp_path / "old.json")
    record = json.loads((tmp_path / "new.json").read_bytes())
    assert record["truncation"] is None and record["padding"] is None
    texts = ["x", "a much longer text than four tokens"]
    for opened in (adopted, load_tokenizer(tmp_path / "old.json", special=SpecialIds(mask=0, eos=1, pad=1))):
        for text, ids in zip(texts, opened.encode_batch(texts), strict=True):
            assert opened.decode(ids, show_special=True) == text


def test_a_special_token_that_was_saved_as_an_ordinary_one_still_stays_out_of_text(tmp_path: Path) -> None:
    backend = bpe_file(tmp_path / "old.json", ["</s>"])
    backend.add_tokens([AddedToken("<|mask|>", special=False)])
    backend.save(str(tmp_path / "old.json"))
    adopted = prepare_tokenizer(tmp_path / "new.json", tmp_path / "old.json")
    assert adopted.special.mask == backend.token_to_id("<|mask|>")
    assert adopted.special.mask not in adopted.encode_batch(["a<|mask|>b"])[0]


def test_a_tokenizer_that_reads_special_ids_out_of_text_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<|mask|>": 0, "</s>": 1, "[UNK]": 2, "a": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "words.json"))
    with pytest.raises(InputError, match="into a special id"):
        prepare_tokenizer(tmp_path / "new.json", tmp_path / "words.json")


def test_an_added_token_that_would_take_over_an_id_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 3, "[UNK]": 1}, unk_token="[UNK]"))  # next id: 3, taken
    backend.save(str(tmp_path / "holes.json"))
    with pytest.raises(InputError, match="share an id"):
        prepare_tokenizer(tmp_path / "new.json", tmp_path / "holes.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"{}", "is not a tokenizer"), (b"\xff\x00", "is not a tokenizer")],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_special_ids_of_another_set_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match="no token with the mask id 9999"):
        load_tokenizer(tokenizer.path, special=SpecialIds(mask=9999, eos=1, pad=1))


def test_a_file_without_the_usual_names_needs_them_said(tmp_path: Path) -> None:
    bpe_file(tmp_path / "old.json", ["<|mask|>", "<|im_end|>"])
    with pytest.raises(InputError, match="no end-of-text token"):
        load_tokenizer(tmp_path / "old.json")
    assert load_tokenizer(tmp_path / "old.json", eos_token="<|im_end|>").special.eos == 1


def test_the_training_sample_is_spread_evenly_and_keeps_to_its_budget() -> None:
    rng = np.random.default_rng(2)
    texts = [f"{i:04d}" + "é" * int(rng.integers(0, 200)) for i in range(1000)]
    sizes = [len(text.encode()) for text in texts]
    total, budget = sum(sizes), sum(sizes) // 5
    taken = list(even_sample(texts, total, budget))
    assert budget - 1 <= sum(len(text.encode()) for text in taken) <= budget  # a cut inside "é" loses one byte
    places = [int(text[:4]) for text in taken]
    for tenth in range(10):
        share = sum(sizes[i] for i in places if i // 100 == tenth)
        assert share == pytest.approx(sum(sizes[tenth * 100 : tenth * 100 + 100]) / 5, abs=2 * max(sizes))
    assert list(even_sample(texts, total, total)) == texts
    assert list(even_sample(["x" * 100], 100, 7)) == ["x" * 7]


def test_the_written_file_is_plain_json_that_the_library_reads(tokenizer: TextTokenizer) -> None:
    record = json.loads(tokenizer.path.read_text())
    assert {token["content"]: token["id"] for token in record["added_tokens"]} == {"<|mask|>": 0, "<|endoftext|>": 1}
    text = "naïve 語 x=1"
    ids = Tokenizer.from_file(str(tokenizer.path)).encode(text).ids
    np.testing.assert_array_equal(tokenizer.encode_batch([text])[0], ids)
