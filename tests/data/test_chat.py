"""Laws of conversations: the template's words are ids, a person's words never, and the loss lies on answers alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from data.chat import TEMPLATES, ChatTemplate, Unusable, conversation_documents, load_template
from data.chunk_index import CONDITION, PROMPT
from data.document import Segment
from data.encoding import Limit, encode_documents
from data.errors import InputError
from data.prepare import PrepareOptions, prepare
from data.shard_set import ShardSet
from data.survey import split_value
from data.tokenizer import TextTokenizer, load_tokenizer, prepare_tokenizer
from tests.data.read_set import stored_pieces
from tests.data.small_corpus import write_talks
from tests.data.token_models import rank_file, sentencepiece_file, sentences

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " hi <|eot_id|><|im_end|><|mask|> "},
    {"role": "assistant", "content": "yes <|start_header_id|>"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]
LLADA = (
    "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhi <|eot_id|><|im_end|><|mask|><|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.fixture(scope="module", params=["huggingface", "sentencepiece", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("chat")
    source = {
        "huggingface": lambda: None,
        "sentencepiece": lambda: sentencepiece_file(folder / "a.model"),
        "tiktoken": lambda: rank_file(folder / "a.tiktoken"),
    }[request.param]()
    special = [*TEMPLATES["llada"].special_tokens, *TEMPLATES["chatml"].special_tokens]
    pattern = "cl100k" if request.param == "tiktoken" else None
    return prepare_tokenizer(
        folder / "t.json", source, texts=sentences(), vocab_size=330, more_special=special, pattern=pattern
    )


def in_and_out_of_spans(
    tokenizer: TextTokenizer, tokens: np.ndarray, spans: np.ndarray
) -> list[tuple[int | None, str]]:
    """(kind, shown text) of every stretch."""
    kinds = np.full(len(tokens), -1)
    for start, length, kind in np.asarray(spans).tolist():
        kinds[start : start + length] = kind
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(tokens)]
    return [
        (None if kinds[a] < 0 else int(kinds[a]), tokenizer.decode(tokens[a:b], show_special=True))
        for a, b in zip(edges, edges[1:])
    ]


def test_llada_conversations_read_as_its_own_template_writes_them(tokenizer: TextTokenizer) -> None:
    eos = tokenizer.backend.id_to_token(tokenizer.special.eos)
    each = encode_documents(tokenizer, conversation_documents(TALK, TEMPLATES["llada"], "each"))
    (whole,) = encode_documents(tokenizer, conversation_documents(TALK, TEMPLATES["llada"], "all"))
    second = (
        "<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    answer = "yes <|start_header_id|><|eot_id|>"
    shown = [in_and_out_of_spans(tokenizer, one.tokens, one.spans) for one in (*each, whole)]
    assert shown[0] == [(PROMPT, LLADA), (None, answer + eos)]
    assert shown[1] == [(PROMPT, LLADA + answer + second), (None, "no<|eot_id|>" + eos)]
    assert shown[2] == [(PROMPT, LLADA), (None, answer), (PROMPT, second), (None, "no<|eot_id|>" + eos)]


PUBLISHED = {  # `chat_template` of LLaDA-8B-Instruct's tokenizer_config.json (without its prompt for an answer), and ChatML's
    "llada": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}",
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_the_text_that_the_published_template_renders(name: str) -> None:
    talk = [{"role": m["role"], "content": f" {m['content']}\n"} for m in TALK]
    environment = jinja2.Environment(keep_trailing_newline=True)
    rendered = environment.from_string(PUBLISHED[name]).render(messages=talk, bos_token="<|startoftext|>")
    (segments,) = conversation_documents(talk, TEMPLATES[name], "all")
    assert "".join(segment.text for segment in segments) == rendered.removesuffix("\n" if name == "chatml" else "")


def test_only_the_template_yields_special_ids(tokenizer: TextTokenizer) -> None:
    special = tokenizer.backend.special_tokens
    (whole,) = encode_documents(tokenizer, conversation_documents(TALK, TEMPLATES["llada"], "all"))
    found = [int(i) for i in whole.tokens if int(i) in set(special.values())]
    turn = [special["<|start_header_id|>"], special["<|end_header_id|>"], special["<|eot_id|>"]]
    assert found == [special["<|startoftext|>"], *turn * 5, tokenizer.special.eos]
    everything = "".join(special)
    hostile = [{"role": role, "content": everything} for role in ("user", "assistant")]
    (whole,) = encode_documents(tokenizer, conversation_documents(hostile, TEMPLATES["chatml"], "all"))
    marks = [special["<|im_start|>"], special["<|im_end|>"]]
    assert [int(i) for i in whole.tokens if int(i) in set(special.values())] == [*marks, *marks, tokenizer.special.eos]


def test_a_prompt_has_the_ids_that_a_sampler_gives_it(tokenizer: TextTokenizer) -> None:
    """Encoded on its own, ending where the answer begins."""
    chat = [{"role": "user", "content": "naïve token"}, {"role": "assistant", "content": "\nshard"}]
    (segments,) = conversation_documents(chat, TEMPLATES["chatml"], "each")
    (one,) = encode_documents(tokenizer, [segments])
    (start, length, kind), answer = one.spans[0].tolist(), segments[-2].text
    (alone,) = encode_documents(tokenizer, [[s for s in segments if s.kind == PROMPT]])
    assert (start, kind) == (0, PROMPT)
    np.testing.assert_array_equal(one.tokens[:length], alone.tokens[:-1])
    ids = tokenizer.encode_batch([answer])[0]
    np.testing.assert_array_equal(one.tokens[length : length + len(ids)], ids)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", "no_messages"),
        ([], "no_messages"),
        ([1], "no_messages"),
        ([{"role": "tool", "content": "x"}], "unknown_role"),
        ([{"role": ["user"], "content": "x"}], "unknown_role"),
        ([{"content": "x"}], "unknown_role"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content_not_text"),
        ([{"role": "user", "content": None}], "content_not_text"),
        ([{"role": "user", "content": " \n"}, {"role": "assistant", "content": "x"}], "empty_message"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}], "empty_message"),
        ([{"role": "user", "content": "x"}], "no_assistant_turn"),
    ],
)
def test_an_unusable_conversation_says_why(messages: Any, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        conversation_documents(messages, TEMPLATES["llada"], "each")
    assert caught.value.reason == reason


def test_what_follows_the_last_answer_is_left_out() -> None:
    longer = [*TALK, {"role": "user", "content": "unanswered"}]
    for turns in ("each", "all"):
        assert conversation_documents(longer, TEMPLATES["chatml"], turns) == conversation_documents(
            TALK, TEMPLATES["chatml"], turns
        )


def test_a_template_file_says_the_same_as_the_built_in_one(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for template in TEMPLATES.values():
        path.write_text(json.dumps(template.record()))
        assert load_template(str(path)) == template
    path.write_text(json.dumps({"roles": {"assistant": {"prefix": "<|a|>A:", "suffix": "<|b|>"}}, "begin": "<|a|>"}))
    assert load_template(str(path)) == ChatTemplate(
        {"assistant": ("<|a|>A:", "<|b|>")}, "<|a|>", "", False, ("<|a|>", "<|b|>")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "needs an object with `roles`"),
        ("{", "not a readable JSON"),
        ('{"roles": {"user": {}}}', "lacks assistant"),
        ('{"roles": {"assistant": {"before": ""}}}', "roles.assistant must be"),
        ('{"roles": {"assistant": {"prefix": 5}}}', "roles.assistant must be"),
        ('{"roles": {"assistant": {}}, "trim": 1}', "trim must be a bool"),
        ('{"roles": {"assistant": {}}, "eos": "x"}', "eos is unknown .allowed: begin"),
        ('{"roles": {"assistant": {}}, "special_tokens": [""]}', "special_tokens must be"),
    ],
)
def test_a_bad_template_is_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(InputError, match=f"^chat: .*{message}") as caught:
        load_template(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="neither a template .llada, chatml. nor a file"):
        load_template("nothing")


def test_a_prompt_that_fills_the_limit_leaves_nothing_to_learn_and_is_dropped(tokenizer: TextTokenizer) -> None:
    documents = conversation_documents(TALK, TEMPLATES["llada"], "each")
    (full,) = encode_documents(tokenizer, documents[:1])
    prompt = int(full.spans[0, 1])
    for limit, dropped in ((prompt, "too_long_prompt"), (prompt + 1, None)):
        (one,) = encode_documents(tokenizer, documents[:1], Limit(limit, "truncate"))
        assert one.dropped == dropped and len(one.tokens) == (0 if dropped else limit)
    assert one.kept_bytes and one.spans.tolist() == [[0, prompt, PROMPT]]
    (one,) = encode_documents(tokenizer, documents[:1], Limit(prompt + 1, "drop"))
    assert one.dropped == "too_long"
    (one,) = encode_documents(tokenizer, documents[:1], Limit(len(full.tokens), "drop"))
    assert one.dropped is None and one.kept_bytes is None


def test_neighbouring_text_of_one_kind_is_encoded_together_and_never_across_a_border(tokenizer: TextTokenizer) -> None:
    cut = (Segment("title: no", CONDITION), Segment("ise\n\n", CONDITION), Segment("ise mask"), Segment("", PROMPT))
    (one,) = encode_documents(tokenizer, [cut])
    first, second = tokenizer.encode_batch(["title: noise\n\n", "ise mask"])
    np.testing.assert_array_equal(one.tokens, [*first, *second, tokenizer.special.eos])
    assert one.spans.tolist() == [[0, len(first), CONDITION]]


@pytest.mark.parametrize("turns", ["each", "all"])
def test_prepared_conversations_come_back_and_answers_of_one_stay_in_one_set(tmp_path: Path, turns: str) -> None:
    talks = write_talks(tmp_path / "talks.jsonl", 60)
    options = PrepareOptions(
        out=str(tmp_path / "out"), inputs=[str(tmp_path / "talks.jsonl")], vocab_size=330, val_fraction=0.3,
        chunk_tokens=300, shard_tokens=1500, processes=1, chat="chatml", chat_turns=turns,
    )  # fmt: skip
    report = prepare(options, progress=False)
    assert report.skipped == {"unknown_role": 9}
    names = [f"talks.jsonl:{line + 1}" for line in range(60) if line % 7 != 3]
    for set_name in ("train", "val"):
        shards = ShardSet.open(tmp_path / "out" / set_name)
        tokenizer = load_tokenizer(shards.tokenizer_path, special=shards.special)
        assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.backend.special_tokens) and shards.vocab_size <= 330
        mine = [t for n, t in zip(names, talks, strict=True) if (split_value(n, 0) < 0.3) == (set_name == "val")]
        documents = [d for talk in mine for d in conversation_documents(talk, TEMPLATES["chatml"], turns)]
        expected = encode_documents(tokenizer, documents)
        stored = stored_pieces(tmp_path / "out" / set_name)
        assert len(stored) == len(expected) == shards.documents
        for piece, one in zip(stored, expected, strict=True):
            np.testing.assert_array_equal(piece.tokens, one.tokens)
            assert piece.spans == one.spans.tolist() != []
        assert shards.manifest.prepared_with["chat"] == TEMPLATES["chatml"].record()


def test_a_conversation_moved_into_an_empty_set_moves_as_a_whole(tmp_path: Path) -> None:
    talks = [[*TALK[1:3]] * answers for answers in (3, 2, 4, 3, 2)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    options = PrepareOptions(
        out=str(tmp_path / "out"), inputs=[str(tmp_path / "d.jsonl")], vocab_size=300, val_fraction=1e-9, processes=1,
        chat="chatml",
    )  # fmt: skip
    report = prepare(options, progress=False)
    nearest = min(range(5), key=lambda at: split_value(f"d.jsonl:{at + 1}", 0))
    assert report.sets["val"].documents == len(talks[nearest]) // 2 > 1
    assert report.sets["train"].documents == 14 - len(talks[nearest]) // 2


def test_text_files_are_no_conversations(tmp_path: Path) -> None:
    write_talks(tmp_path / "talks.jsonl", 12)
    (tmp_path / "README.md").write_text("about")
    options = PrepareOptions(
        out=str(tmp_path / "out"), inputs=[str(tmp_path)], vocab_size=330, chat="llada", processes=1
    )
    with pytest.raises(InputError, match=r"no documents .*1 no_text_field"):
        prepare(replace(options, chat=None, inputs=[write_one(tmp_path / "only.jsonl")]), progress=False)
    assert prepare(options, progress=False).skipped == {"not_a_chat": 1, "unknown_role": 2, "no_messages": 1}


def write_one(path: Path) -> str:
    path.write_text('{"conversation": []}\n')
    return str(path)
