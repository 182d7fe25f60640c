"""`data inspect` counts what is there; a rendered sample shows every state of every token, in colour and without."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.inspect import describe, lines
from data.inspect_sample import render_sample
from tests.data.test_shards import with_spans

WriteSet = Callable[..., Path]


def test_the_numbers_of_a_set_are_those_of_its_documents(write_set: WriteSet, documents: list[np.ndarray]) -> None:
    spans, _ = with_spans(documents)
    for rows in spans:
        rows[:, 2] %= 2
    folder = write_set(documents, spans=spans)
    found = describe(str(folder))
    pieces = [len(part) for d in documents for part in np.split(d, range(50, len(d), 50))]
    histogram = {row["from"]: row["pieces"] for row in found["piece_lengths"]}
    assert (
        histogram == {p: n for p in (1, 2, 4, 8, 16, 32) if (n := sum(p <= x < 2 * p for x in pieces))}
        and 32 in histogram
    )
    assert found["looked_into"] == {"chunks": found["chunks"], "pieces": len(pieces), "tokens": sum(pieces)}
    assert found["piece_length_marks"]["longest"] == max(pieces)
    assert found["piece_length_marks"]["median"] == sorted(pieces)[(len(pieces) - 1) // 2]
    tokens = {k: sum(int(rows[rows[:, 2] == k, 1].sum()) for rows in spans) for k in (0, 1)}
    assert {name: span["tokens"] for name, span in found["spans"].items()} == {
        "prompt": tokens[0],
        "condition": tokens[1],
        "padding": 0,
    }
    assert found["bytes_per_token"] == 3.0 and found["documents"] == len(documents) and found["fill_rate"] == 1
    assert found["sources"][0]["licence"] == "CC0-1.0" and json.loads(json.dumps(found)) == found
    text = "\n".join(lines(found))
    assert "3.00 bytes a token" in text and "licence CC0-1.0" in text and "From all chunks" in text and "█" in text
    part = describe(str(folder), most_chunks=4)
    assert part["looked_into"]["chunks"] == 4 and "From 4 of" in "\n".join(lines(part))


class Letters:
    """Token i is the i-th character of a text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def decode(self, ids, show_special: bool = False) -> str:
        return "".join(self.text[i] for i in ids)


def sample(text: str, **changes):
    n = len(text)
    marks = {name: np.zeros(n, bool) for name in ("masked", "prompt", "padding")}
    for name, (a, b) in changes.pop("ranges", {}).items():
        marks[name][a:b] = True
    options = {
        "document_starts": np.array([0]),
        "dropped": False,
        "t": 0.25,
        "weight": marks["masked"] * 4.0,
        "width": 40,
    }
    return render_sample(np.arange(n), tokenizer=Letters(text), **(options | marks | changes))


RANGES = {"prompt": (0, 4), "masked": (6, 9), "padding": (12, 16)}


def test_without_colour_every_state_has_marks_and_a_legend() -> None:
    shown = sample("ask:answer one....", ranges=RANGES, colour=False)
    head, legend, body = shown.split("\n")
    assert head == "18 tokens, 1 document, t 0.2500, 3 masked (30.0%), weight 4.000, 4 prompt tokens, 4 padding"
    assert legend == "[text] masked, to be predicted  {text} prompt or condition, shown clean  <text> padding"
    assert body == "{ask:}an[swe]r o<padding x 4>.."
    dropped = sample("ask:answer one....", ranges=RANGES, colour=False, dropped=True)
    assert "4 prompt tokens dropped" in dropped and "\n{-ask:-}an[swe]r" in dropped


def test_colour_adds_only_colour() -> None:
    painted = sample("ask:answer one....", ranges=RANGES, colour=True)
    assert "\x1b[30;43mswe\x1b[0m" in painted and "\x1b[36mask:\x1b[0m" in painted
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted).split("\n")[2] == "ask:answer opadding x 4.."


def test_document_borders_say_their_noise_and_weight_and_lines_keep_the_width() -> None:
    text = "first one." + "second 語語語語語 one." * 4
    t = np.where(np.arange(len(text)) < 10, 0.5, 0.125)
    shown = sample(text, document_starts=np.array([0, 10]), t=t, ranges={"masked": (12, 14)}, colour=False, width=30)
    border = next(line for line in shown.split("\n") if line.startswith("──"))
    assert "2 documents, t of each document" in shown and "document 2, " in border and len(border) == 30
    wide = sample(text, document_starts=np.array([0, 10]), t=t, ranges={"masked": (12, 14)}, colour=False, width=100)
    assert "t 0.1250, 2 masked, weight 4.000" in wide
    body = [line for line in shown.split("\n")[2:] if not line.startswith("──")]
    assert max(sum(2 if c == "語" else 1 for c in line) for line in body) <= 30
    assert "".join(body).replace("[", "").replace("]", "") == text


def test_no_text_can_steer_the_terminal() -> None:
    shown = sample("a\x1b[2J\x07\r\n\tb\u202e\x9b\x7f", colour=False)
    assert shown.endswith("a␛[2J␇␍↵\n→b���") and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_arrays_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="masked has 3 entries, tokens has 2"):
        sample("ab", masked=np.zeros(3, bool))
    assert sample("", colour=False).startswith("0 tokens")
