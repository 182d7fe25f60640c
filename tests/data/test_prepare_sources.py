"""Laws of reading text: every usable document once, in a fixed order, and every unusable one counted by reason."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import zstandard

from data.document import plain_document
from data.errors import InputError
from data.records import RecordFormat
from data.sources import SkipLog, iter_documents, open_sources


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def test_a_folder_is_read_in_sorted_order_without_hidden_and_cached_files(tmp_path: Path) -> None:
    for name in (
        "b.md",
        "a/z.txt",
        "c/x.txt",
        "a/b/c.py",
        "Z.TXT",
        ".hidden.txt",
        ".git/x.txt",
        "__pycache__/x.py",
        "pic.png",
    ):
        write(tmp_path / "in" / name, name.encode())
    skips = SkipLog()
    names = [(d.name, d.text) for d in iter_documents([tmp_path / "in"], skips=skips)]
    assert names == [(f"in/{n}", n) for n in ("Z.TXT", "b.md", "a/z.txt", "a/b/c.py", "c/x.txt")]
    assert skips.counts == {"unknown_extension": 1}


def test_text_is_taken_as_it_is(tmp_path: Path) -> None:
    text = "\ufeff\r\nnul \x00 tab\t é\x85\u2028"
    write(tmp_path / "a.txt", text.encode())
    write(tmp_path / "b.jsonl", jsonl([text]))
    assert [d.text for d in iter_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])] == [text, text]


def test_what_cannot_be_used_is_counted_by_reason_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "in" / "bad.txt", b"ok\xff")
    write(tmp_path / "in" / "empty.txt", b"")
    good = b'{"text": "good"}\n'
    lines = [
        b'{"text": "\\ud800"}\n',
        b"{nonsense\n",
        b'{"body": "x"}\n',
        b"[1]\n",
        b'{"text": 5}\n',
        b"\n",
        b'"\xff"\n',
    ]
    write(tmp_path / "in" / "mixed.jsonl", good + b"".join(lines) + good[:-1])
    skips = SkipLog()
    with caplog.at_level(logging.INFO):
        found = list(iter_documents([tmp_path / "in"], skips=skips))
    assert found == [plain_document(f"in/mixed.jsonl:{line}", "good") for line in (1, 9)]
    assert skips.counts == {"invalid_utf8": 3, "empty": 2, "invalid_json": 1, "no_text_field": 3}
    for name in ("in/bad.txt: invalid_utf8", "in/empty.txt: empty", "mixed.jsonl:3: invalid_json", "found: body"):
        assert caplog.text.count(name) == 1


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_jsonl_gives_a_document_a_line_and_is_read_lazily(tmp_path: Path, suffix: str) -> None:
    texts = [f"document {i}\nwith a second line é" * (1 + i % 50) for i in range(3000)]
    content = jsonl(texts, field="body")
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    half = len(content) // 2  # two gzip members or zstandard frames, cut inside a line
    path = write(tmp_path / f"d.jsonl{suffix}", pack(content[:half]) + pack(content[half:]))
    documents = iter_documents([path], form=RecordFormat(text_field="body"))
    assert next(documents) == plain_document(f"d.jsonl{suffix}:1", texts[0])
    assert [d.text for d in documents] == texts[1:]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_a_damaged_archive_is_an_error_and_not_a_short_one(tmp_path: Path, suffix: str, damage: str) -> None:
    content = jsonl([f"text {i}" for i in range(1000)])
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    path = write(tmp_path / f"d.jsonl{suffix}", packed[: len(packed) // 2] if damage == "cut" else b"junk" + packed)
    with pytest.raises(InputError, match="is damaged or cut short") as caught:
        list(iter_documents([path]))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_to_read_is_an_error_that_says_why(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", jsonl(["x", "y"], field="body"))
    write(tmp_path / "in" / "b.txt", b"")
    with pytest.raises(InputError, match="no documents in .*1 empty, 2 no_text_field.*--text_field"):
        list(iter_documents([tmp_path / "in"]))
    with pytest.raises(InputError, match="does not exist"):
        open_sources([tmp_path / "missing"])
    with pytest.raises(InputError, match=r"a\.pdf has an extension that is not known; allowed are .txt, .md, .py"):
        open_sources([write(tmp_path / "a.pdf", b"x")])
    with pytest.raises(InputError, match="given twice"):
        open_sources([tmp_path / "in", tmp_path / "in" / ".." / "in"])
    with pytest.raises(InputError, match="nothing to read"):
        open_sources([])
    with pytest.raises(InputError, match="source: 'wikipedia' is unknown"):
        open_sources([], source="wikipedia")


def test_the_standard_library_is_a_deterministic_source_of_python_only() -> None:
    first = [d.name for d in iter_documents("stdlib")]
    assert first == [d.name for d in iter_documents("stdlib")] and len(set(first)) == len(first) > 500
    assert {"stdlib/os.py", "stdlib/json/decoder.py"} <= set(first)
    assert all(name.endswith(".py") and "site-packages" not in name for name in first)
    assert open_sources([], source="stdlib")[0].licence == "PSF-2.0"
