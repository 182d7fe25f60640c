"""Laws of rows and long documents: no piece crosses a row's end, what is cut is counted, nothing else is lost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chunk_index import CONDITION, PADDING, PROMPT
from data.errors import InputError
from data.prepare import PrepareOptions, prepare
from data.row_packing import pack_rows
from data.shard_set import ShardSet
from data.tokenizer import load_tokenizer
from tests.data.read_set import StoredPiece, stored_pieces
from tests.data.small_corpus import write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, str]:
    return write_corpus(tmp_path / "corpus", documents=120, words=45)


@pytest.fixture
def options(tmp_path: Path, corpus: dict[str, str]) -> PrepareOptions:
    return PrepareOptions(
        out=str(tmp_path / "out"),
        inputs=[str(tmp_path / "corpus")],
        vocab_size=300,
        val_fraction=0.0,
        chunk_tokens=4000,
        shard_tokens=6000,
        row_tokens=128,
        processes=1,
    )


def opened(options: PrepareOptions) -> tuple[ShardSet, list[StoredPiece], list[np.ndarray]]:
    """The set, its pieces, and every document of the corpus as whole ids with EOS."""
    shards = ShardSet.open(Path(options.out) / "train")
    tokenizer = load_tokenizer(shards.tokenizer_path, special=shards.special)
    texts = [path.read_text() for path in sorted(Path(options.inputs[0]).rglob("*.txt"))]
    whole = [np.append(ids, shards.special.eos).astype(np.uint16) for ids in tokenizer.encode_batch(texts)]
    return shards, stored_pieces(Path(options.out) / "train"), whole


def is_padding(piece: StoredPiece) -> bool:
    return any(kind == PADDING for _, _, kind in piece.spans)


def keys(documents: list[np.ndarray]) -> Counter[bytes]:
    return Counter(document.tobytes() for document in documents)


@pytest.mark.parametrize("packing", ["fill", "one"])
@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
def test_rows_hold_every_piece_once_and_padding_fills_the_rest(
    options: PrepareOptions, packing: str, policy: str
) -> None:
    options = replace(options, row_packing=packing, long_documents=policy)
    report = prepare(options, progress=False)
    shards, pieces, whole = opened(options)
    manifest, row = shards.manifest, options.row_tokens
    assert manifest.row_tokens == row and manifest.tokens % row == 0
    for piece in pieces:
        assert piece.start // row == (piece.start + len(piece.tokens) - 1) // row
        if is_padding(piece):
            assert piece.spans == [[0, len(piece.tokens), PADDING]] and set(piece.tokens) == {shards.special.pad}
            assert (piece.start + len(piece.tokens)) % row == 0
    text = [piece for piece in pieces if not is_padding(piece)]
    long = [document for document in whole if len(document) > row]
    assert 10 < len(long) < 100
    short = keys([document for document in whole if len(document) <= row])
    cut = [document[:row] for document in long]
    if policy == "split":
        cut = [document[at : at + row] for document in long for at in range(0, len(document), row)]
    assert keys([piece.tokens for piece in text]) == short + (Counter() if policy == "drop" else keys(cut))
    assert manifest.padding_tokens == sum(len(piece.tokens) for piece in pieces if is_padding(piece))
    assert manifest.documents == sum(short.values()) + (len(long) if policy != "drop" else 0)
    assert manifest.truncated_documents == (len(long) if policy == "truncate" else 0)
    assert manifest.split_documents == (len(long) if policy == "split" else 0)
    assert report.skipped == ({"too_long": len(long)} if policy == "drop" else {})
    assert manifest.sources[0].documents == manifest.documents
    assert manifest.sources[0].utf8_bytes == manifest.utf8_bytes
    per_row = Counter(piece.start // row for piece in text)
    fill = 1 - manifest.padding_tokens / manifest.tokens
    assert len(per_row) == manifest.tokens // row
    assert (set(per_row.values()) == {1}) == (packing == "one") and (fill > 0.85) == (packing == "fill")
    said = "\n".join(report.lines())
    assert f"{manifest.tokens // row:,} rows of 128 tokens, {100 * fill:.1f}% filled" in said
    expected = {"truncate": "lost their end", "split": "in several pieces", "drop": f"skipped: {len(long)} too_long"}
    assert expected[policy] in said


@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
def test_without_rows_a_limit_cuts_documents_where_they_lie(options: PrepareOptions, policy: str) -> None:
    options = replace(options, row_tokens=0, max_document_tokens=100, long_documents=policy)
    prepare(options, progress=False)
    shards, pieces, whole = opened(options)
    expected = []
    for document in whole:
        if len(document) <= 100 or policy == "split":
            expected += [document[at : at + 100] for at in range(0, len(document), 100)]
        elif policy == "truncate":
            expected.append(document[:100])
    assert [piece.tokens.tolist() for piece in pieces] == [document.tolist() for document in expected]
    assert shards.manifest.padding_tokens == 0
    ends = sum(int(piece.tokens[-1] == shards.special.eos) for piece in pieces)
    assert ends == shards.documents - shards.manifest.truncated_documents


def test_a_split_document_keeps_its_part_of_the_prompt_in_every_piece(tmp_path: Path) -> None:
    with open(tmp_path / "d.jsonl", "w") as file:
        for number in range(12):
            talk = [
                {"role": "user", "content": "why " * (20 + 9 * number)},
                {"role": "assistant", "content": f"because {number} " * 15},
            ]
            file.write(json.dumps({"messages": talk, "title": f"a title {number}"}) + "\n")
    options = PrepareOptions(
        out=str(tmp_path / "whole"), inputs=[str(tmp_path / "d.jsonl")], vocab_size=300, val_fraction=0.0, processes=1,
        chat="llada", condition_fields="title", chunk_tokens=500,
    )  # fmt: skip
    prepare(options, progress=False)
    prepare(replace(options, out=str(tmp_path / "cut"), max_document_tokens=37, long_documents="split"), progress=False)

    def kinds(pieces: list[StoredPiece]) -> tuple[list[int], list[int]]:
        tokens, kind = [], []
        for piece in pieces:
            of_piece = [-1] * len(piece.tokens)
            for start, length, of_span in piece.spans:
                of_piece[start : start + length] = [of_span] * length
            tokens += piece.tokens.tolist()
            kind += of_piece
        return tokens, kind

    whole, cut = (stored_pieces(tmp_path / name / "train") for name in ("whole", "cut"))
    assert len(whole) == 12 < len(cut) and max(len(piece.tokens) for piece in cut) == 37
    assert kinds(cut) == kinds(whole) and set(kinds(cut)[1]) == {-1, PROMPT, CONDITION}
    assert all(piece.meta["title"].startswith("a title") for piece in cut)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), row=st.integers(50, 80))
def test_best_fit_decreasing_puts_each_piece_in_the_fullest_row_with_room(lengths: list[int], row: int) -> None:
    rows = pack_rows(lengths, row, "fill")
    assert sorted(piece for pieces in rows for piece in pieces) == list(range(len(lengths)))
    # The textbook's loop, written without arrays.
    reference: list[list[int]] = []
    for piece in sorted(range(len(lengths)), key=lambda piece: (-lengths[piece], piece)):
        fits = [pieces for pieces in reference if sum(lengths[p] for p in pieces) + lengths[piece] <= row]
        if fits:
            max(fits, key=lambda pieces: sum(lengths[p] for p in pieces)).append(piece)  # the first of equals
        else:
            reference.append([piece])
    assert rows == sorted(sorted(pieces) for pieces in reference)
    assert pack_rows(lengths, row, "one") == [[piece] for piece in range(len(lengths))]


def test_the_policy_of_a_limit_that_nothing_reaches_changes_no_byte(options: PrepareOptions, tmp_path: Path) -> None:
    found = []
    for policy in ("truncate", "drop"):
        out = str(tmp_path / policy)
        limited = replace(options, out=out, row_tokens=0, max_document_tokens=10**6, long_documents=policy)
        prepare(limited, progress=False)
        found.append([shard.sha256 for shard in ShardSet.open(Path(out) / "train").shards])
    assert found[0] == found[1]


def test_sets_made_with_other_rows_or_limits_are_not_mistaken_for_these(options: PrepareOptions) -> None:
    prepare(options, progress=False)
    assert prepare(options, progress=False).already_complete
    for name, value in {
        "row_tokens": 64, "row_packing": "one", "long_documents": "split", "max_document_tokens": 100,
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=rf"not the same: {name}\)"):
            prepare(replace(options, **{name: value}), progress=False)


def test_limits_that_cannot_work_are_named(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("long " * 500)
    long = {"inputs": [str(tmp_path / "long.txt")], "long_documents": "drop"}
    for changes, message in (
        ({"row_tokens": 1}, "^row_tokens: 1 leaves no room"),
        ({"row_tokens": -1}, "^row_tokens: -1 is too small"),
        ({"max_document_tokens": 1}, "^max_document_tokens: 1 leaves"),
        ({"row_tokens": 4001}, "^row_tokens: 4001 is more than chunk_tokens 4000"),
        ({"long_documents": "cut"}, "^long_documents: 'cut' is unknown; allowed are truncate, split, drop"),
        (long, "^long_documents: every document of the train set was left out"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(replace(options, **changes), progress=False)
    assert not list(tmp_path.glob("out/train")) and not list(tmp_path.glob("out/.partial*"))
