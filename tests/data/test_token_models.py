"""Laws of every kind of tokenizer: ids of the library itself, no special id out of text, one file that keeps it all."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import data.prepare
from data import long_text
from data.errors import InputError
from data.prepare import PrepareOptions, prepare
from data.tiktoken_model import PATTERNS
from data.tokenizer import TextTokenizer, load_tokenizer, prepare_tokenizer
from tests.data.small_corpus import WORDS, make_text, tree_bytes, write_corpus
from tests.data.token_models import rank_file, sentencepiece_file, sentences

MARKS = ("<|im_start|>", "<|im_end|>")
KINDS = ("huggingface", "sentencepiece-bpe", "sentencepiece-unigram", "tiktoken")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    """A prepared tokenizer of each kind, with two markers of a chat template added."""
    folder = tmp_path_factory.mktemp("kinds")

    def adopt(kind: str, source: Path | None, **options: object) -> TextTokenizer:
        out = folder / f"{kind}.json"
        return prepare_tokenizer(out, source, more_special=MARKS, texts=sentences(), vocab_size=330, **options)

    bpe = sentencepiece_file(folder / "bpe.model", user_defined_symbols=["<mask>"])
    unigram = sentencepiece_file(folder / "unigram.model", model_type="unigram", control_symbols=["<|im_end|>"])
    return {
        "huggingface": adopt("huggingface", None),
        "sentencepiece-bpe": adopt("bpe", bpe),
        "sentencepiece-unigram": adopt("unigram", unigram),
        "tiktoken": adopt("tiktoken", rank_file(folder / "own.tiktoken"), pattern="cl100k"),
    }


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, made: dict[str, TextTokenizer]) -> TextTokenizer:
    return made[request.param]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data())
def test_no_document_yields_a_special_id_and_every_document_comes_back(
    tokenizer: TextTokenizer, drawn: st.DataObject
) -> None:
    literals = sorted(tokenizer.backend.special_tokens)
    anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=8)
    parts = st.one_of(st.sampled_from(literals), st.sampled_from(WORDS), anything, st.sampled_from(literals))
    text = "".join(drawn.draw(st.lists(parts, max_size=12)))
    (ids,) = tokenizer.encode_batch([text])
    assert not set(ids.tolist()) & set(tokenizer.backend.special_tokens.values())
    assert tokenizer.decode(ids) == text and tokenizer.decode(ids, show_special=True) == text


def test_a_document_of_every_special_literal_holds_no_special_id(tokenizer: TextTokenizer) -> None:
    literals = [*tokenizer.backend.special_tokens]
    assert set(MARKS) <= set(literals) and len(set(tokenizer.backend.special_tokens.values())) == len(literals)
    for text in [*literals, "".join(literals), " ".join(literals), "\n".join(literals) + "\n"]:
        (ids,) = tokenizer.encode_batch([text])
        assert not set(ids.tolist()) & set(tokenizer.backend.special_tokens.values())
        assert tokenizer.decode(ids) == text


def test_the_one_file_gives_equal_ids_and_bytes_again(tokenizer: TextTokenizer) -> None:
    again = load_tokenizer(tokenizer.path)
    assert (again.special, again.vocab_size, again.sha256) == (
        tokenizer.special,
        tokenizer.vocab_size,
        tokenizer.sha256,
    )
    assert again.backend.special_tokens == tokenizer.backend.special_tokens
    assert again.backend.to_bytes() == tokenizer.backend.to_bytes() == tokenizer.path.read_bytes()
    text = make_text(np.random.default_rng(5), 200)
    np.testing.assert_array_equal(again.encode_batch([text])[0], tokenizer.encode_batch([text])[0])


def test_every_kind_fills_in_prompts_and_shows_special_tokens_alike(tokenizer: TextTokenizer) -> None:
    literal = tokenizer.backend.id_to_token(tokenizer.special.mask)
    ids = tokenizer.encode_prompt(f"def x{literal}{literal} y")
    assert ids.dtype == np.uint32 and ids.tolist().count(tokenizer.special.mask) == 2
    assert tokenizer.decode(ids, show_special=True) == f"def x{literal}{literal} y"
    marks = [tokenizer.backend.special_tokens[mark] for mark in MARKS]
    assert tokenizer.split_special("<|im_start|>user\n<|im_end|>") == [marks[0], "user\n", marks[1]]
    assert tokenizer.decode([*marks, tokenizer.special.eos], show_special=False) == ""
    assert [tokenizer.backend.id_to_token(i) for i in marks] == [*MARKS]
    assert max(tokenizer.special.mask, tokenizer.special.eos, *marks) < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


def test_long_texts_get_the_ids_of_the_whole(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = make_text(np.random.default_rng(8), 6000) + "x" * 5000 + make_text(np.random.default_rng(9), 3000)
    text += "word" + " " * 397 + ("x    y  " * 200) + "end"
    (whole,) = tokenizer.encode_batch([text])
    calls = []
    if tokenizer.backend.__class__.__name__ == "HuggingFaceModel":
        inner = tokenizer.backend._encode
        monkeypatch.setattr(
            tokenizer.backend, "_encode", lambda texts: calls.append(max(map(len, texts))) or inner(texts)
        )
    monkeypatch.setattr(long_text, "PART_CHARS", 400)
    (cut,) = tokenizer.encode_batch([text])
    np.testing.assert_array_equal(cut, whole)
    assert not calls or max(calls) < 0.4 * len(text)


def test_a_text_without_a_harmless_cut_stays_whole() -> None:
    def by_position(texts: list[str]) -> list[np.ndarray]:
        return [np.arange(len(text)) for text in texts]  # ids that depend on what stands before

    text = "ab\n" * 2_000_000
    assert list(long_text.parts(text, by_position)) == [text]
    cut = list(long_text.parts(text, lambda texts: [np.frombuffer(t.encode(), np.uint8) for t in texts]))
    assert "".join(cut) == text and len(cut) > 20 and all(part.startswith("\n") for part in cut[1:])


def test_tiktoken_ids_are_those_of_tiktoken_itself(made: dict[str, TextTokenizer], tmp_path: Path) -> None:
    lines = rank_file(tmp_path / "own.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    own = tiktoken.Encoding("own", pat_str=PATTERNS["cl100k"], mergeable_ranks=ranks, special_tokens={})
    rng = np.random.default_rng(3)
    texts = [make_text(rng, int(n)) for n in rng.integers(1, 300, size=40)] + ["x" * 3000, "\r\n \t 123456 don't 語語"]
    for text, ids in zip(texts, made["tiktoken"].encode_batch(texts), strict=True):
        assert ids.tolist() == own.encode_ordinary(text)
    assert made["tiktoken"].special.mask >= len(ranks)


def test_what_tiktokens_own_expressions_give_up_on_is_encoded_all_the_same(tmp_path: Path) -> None:
    path = rank_file(tmp_path / "own.tiktoken")
    tokenizer = prepare_tokenizer(tmp_path / "t.json", path, pattern="qwen")
    text = "a" + " " * 1_000_000 + "b"
    with pytest.raises(ValueError, match="[Rr]egex"):
        tokenizer.backend.encoding.encode_to_numpy(text, disallowed_special=())
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    short = "a" + " " * 500 + "b \n\n c"
    expected = tokenizer.backend.encoding.encode_ordinary(short)
    found = [i for piece in tokenizer.backend._split.finditer(short) for i in
             tokenizer.backend.encoding._encode_single_piece(piece[0].encode())]  # fmt: skip
    assert found == expected


def test_a_rank_file_that_is_not_known_needs_its_pattern(tmp_path: Path) -> None:
    path = rank_file(tmp_path / "own.tiktoken")
    with pytest.raises(InputError, match="^tokenizer_pattern: .*must be given: gpt2, cl100k"):
        prepare_tokenizer(tmp_path / "t.json", path)
    with pytest.raises(InputError, match="the pattern is no regular expression"):
        prepare_tokenizer(tmp_path / "t.json", path, pattern="(unclosed")
    with pytest.raises(InputError, match="^tokenizer_pattern: .* is no .tiktoken file"):
        prepare_tokenizer(tmp_path / "t.json", sentencepiece_file(tmp_path / "a.model"), pattern="gpt2")
    lines = path.read_bytes().splitlines(keepends=True)
    for content, message in (
        (b"".join(lines[5:]), "no rank for the byte 0"),
        (b"".join(lines) + b"nonsense\n", f"line {len(lines) + 1} is not `base64 rank`"),
        (b"".join(lines) + b"eHh4eHh4eHg= 7\n", "two lines share a rank"),
        (b"", "is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            prepare_tokenizer(tmp_path / "t.json", path, pattern="gpt2")
    assert not (tmp_path / "t.json").exists()


def test_sentencepiece_ids_are_those_of_sentencepiece_itself(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    texts = [make_text(rng, int(n)) for n in rng.integers(1, 100, size=30)] + ["  two  ", "語 unknown Ω ﬁ"]
    for model_type in ("bpe", "unigram"):
        for plain in (True, False):
            path = sentencepiece_file(tmp_path / "m.model", model_type=model_type, plain=plain)
            own = sentencepiece.SentencePieceProcessor(model_file=str(path))
            tokenizer = prepare_tokenizer(tmp_path / "t.json", path)
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                assert ids.tolist() == own.encode(text)
                assert tokenizer.decode(ids) == own.decode(own.encode(text))
            assert tokenizer.special.mask == own.get_piece_size() and tokenizer.special.eos == own.eos_id()


def test_a_normalising_sentencepiece_model_gives_back_the_normalised_text(tmp_path: Path) -> None:
    """What is not promised: white space is squeezed, forms are unified, unknown characters become the unknown token."""
    path = sentencepiece_file(tmp_path / "m.model", model_type="unigram", plain=False)
    tokenizer = prepare_tokenizer(tmp_path / "t.json", path)
    assert tokenizer.decode(tokenizer.encode_batch(["  def   return\n"])[0]) == "def return"
    assert "⁇" in tokenizer.decode(tokenizer.encode_batch(["def Ω"])[0])
    plain = prepare_tokenizer(tmp_path / "p.json", sentencepiece_file(tmp_path / "p.model"))
    assert plain.decode(plain.encode_batch(["a▁b"])[0]) == "a b"  # the sign that sentencepiece uses for the space


@pytest.mark.parametrize("damage", ["cut", "junk", "empty", "json", "ids", "kind"])
def test_a_damaged_file_is_one_clear_line(made: dict[str, TextTokenizer], tmp_path: Path, damage: str) -> None:
    model = sentencepiece_file(tmp_path / "a.model").read_bytes()
    record = json.loads(made["sentencepiece-bpe"].path.read_bytes())
    path = tmp_path / ("t.model" if damage in ("cut", "junk", "empty") else "tokenizer.json")
    content = {
        "cut": model[:-7],
        "junk": b"\xff\xfejunk" * 50,
        "empty": b"",
        "json": json.dumps(record | {"model": "!!"}).encode(),
        "ids": json.dumps(record | {"special_tokens": {"<|mask|>": 9999}}).encode(),
        "kind": json.dumps(record | {"kind": "words"}).encode(),
    }[damage]
    path.write_bytes(content)
    with pytest.raises(InputError, match="^tokenizer: .*") as caught:
        prepare_tokenizer(tmp_path / "new.json", path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "new.json").exists()


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_workers_rebuild_every_kind_from_the_one_file(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus", documents=60)
    source = (
        sentencepiece_file(tmp_path / "own.model") if kind == "sentencepiece" else rank_file(tmp_path / "own.tiktoken")
    )
    monkeypatch.setattr(data.prepare, "BATCH_BYTES", 2000)
    for processes in (1, 2):
        options = PrepareOptions(
            out=str(tmp_path / str(processes)), inputs=[str(tmp_path / "corpus")], tokenizer=str(source),
            tokenizer_pattern="qwen" if kind == "tiktoken" else None, processes=processes, val_fraction=0.2,
        )  # fmt: skip
        prepare(options, progress=False)
    assert tree_bytes(tmp_path / "1") == tree_bytes(tmp_path / "2")
    assert (tmp_path / "1" / "train" / "tokenizer.json").read_bytes().startswith(b'{\n "kind": "' + kind.encode())


def test_a_huggingface_marker_saved_as_an_ordinary_token_is_kept_out_of_text(tmp_path: Path) -> None:
    prepare_tokenizer(tmp_path / "old.json", texts=sentences(), vocab_size=300)
    backend = Tokenizer.from_file(str(tmp_path / "old.json"))
    backend.add_tokens(["<|im_end|>"])
    backend.save(str(tmp_path / "old.json"))
    marked = prepare_tokenizer(tmp_path / "new.json", tmp_path / "old.json", more_special=MARKS)
    (ids,) = marked.encode_batch(["a<|im_end|>b<|im_start|>"])
    assert not set(ids.tolist()) & {marked.backend.special_tokens[mark] for mark in MARKS}
