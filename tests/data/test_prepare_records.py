"""Laws of records: parquet gives what jsonl gives, conditions are spans, and awkward input is a count or one clear line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import data.sources
from data.chunk_index import CONDITION
from data.errors import InputError
from data.prepare import PrepareOptions, prepare
from data.records import PLAIN_RECORDS, RecordFormat
from data.shard_set import ShardSet
from data.sources import SkipLog, iter_documents, open_sources
from data.tokenizer import load_tokenizer
from tests.data.read_set import stored_pieces

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["one", "two é", "語 three\r\n", "four\x00", "five"] * 60


def texts_of(path: Path, form: RecordFormat = PLAIN_RECORDS) -> tuple[list[str], SkipLog]:
    skips = SkipLog()
    return [document.text for document in open_sources([path], form=form)[0].documents(skips)], skips


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
)
def test_every_kind_of_text_column_is_read_in_order(tmp_path: Path, kind: pa.DataType) -> None:
    values = [*TEXTS, None, "", "last"]
    column = (
        pa.array([v if v is None else v.encode() for v in values], kind)
        if kind == pa.binary()
        else pa.array(values).cast(kind)
    )
    pq.write_table(pa.table({"id": range(len(values)), "body": column}), tmp_path / "a.parquet", row_group_size=100)
    found, skips = texts_of(tmp_path / "a.parquet", RecordFormat(text_field="body"))
    assert found == [*TEXTS, "last"] and skips.counts == {"no_text_field": 1, "empty": 1}
    names = [d.name for d in iter_documents([tmp_path / "a.parquet"], form=RecordFormat(text_field="body"))]
    assert names == [f"a.parquet:{row}" for row in (*range(1, 301), 303)]


def test_a_column_of_the_wrong_type_or_name_is_counted_row_by_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2, 3], "body": ["a", "b", "c"]}), tmp_path / "a.parquet")
    for field in ("text", "missing"):
        found, skips = texts_of(tmp_path / "a.parquet", RecordFormat(text_field=field))
        assert found == [] and skips.counts == {"no_text_field": 3}
    raw = pa.array([b"ok", b"\xff", b"ok"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers())  # says it is UTF-8 and is not
    pq.write_table(pa.table({"text": broken}), tmp_path / "b.parquet")
    found, skips = texts_of(tmp_path / "b.parquet")
    assert found == ["ok", "ok"] and skips.counts == {"invalid_utf8": 1}


@pytest.mark.parametrize("damage", ["cut", "inside", "empty", "junk"])
def test_a_damaged_parquet_file_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"{i} " * 50 for i in range(2000)]}), path, compression="zstd", use_dictionary=False
    )
    content = path.read_bytes()
    path.write_bytes({
        "cut": content[: len(content) // 2],
        "inside": content[:400] + bytes(200) + content[600:],
        "empty": b"",
        "junk": b"PAR1" + b"\xff" * 200 + b"PAR1",
    }[damage])  # fmt: skip
    with pytest.raises(InputError, match="^inputs: .*a.parquet is damaged or cut short|^inputs: cannot read") as caught:
        texts_of(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


RECORDS: list[dict[str, Any]] = [
    {"text": "words", "title": "A  title\nof two lines", "source": "web"},
    {"text": "more words", "title": None, "source": "book"},
    {"text": "bare"},
    {"text": "numbers", "title": 5, "source": ["a", "b"]},
    {"text": "hidden <|mask|>", "title": "<|mask|>", "source": ""},
    {"text": "last", "title": "x", "source": True},
]
PREFIXES = [
    "title: A title of two lines\nsource: web\n\n",
    "source: book\n\n",
    "",
    'title: 5\nsource: ["a", "b"]\n\n',
    "title: <|mask|>\n\n",
    "title: x\nsource: true\n\n",
]


def test_condition_fields_become_a_span_before_the_text_and_keep_their_values(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS * 5))
    options = PrepareOptions(
        out=str(tmp_path / "out"), inputs=[str(tmp_path / "d.jsonl")], vocab_size=300, val_fraction=0.0,
        chunk_tokens=100, processes=1, condition_fields="title, source",
    )  # fmt: skip
    prepare(options, progress=False)
    shards = ShardSet.open(tmp_path / "out" / "train")
    tokenizer = load_tokenizer(shards.tokenizer_path, special=shards.special)
    for piece, record, prefix in zip(stored_pieces(shards.folder), RECORDS * 5, PREFIXES * 5, strict=True):
        length = piece.spans[0][1] if prefix else 0
        assert piece.spans == ([[0, length, CONDITION]] if prefix else [])
        assert tokenizer.decode(piece.tokens[:length], show_special=True) == prefix
        assert tokenizer.decode(piece.tokens[length:-1], show_special=True) == record["text"]
        known = {name: record[name] for name in ("title", "source") if record.get(name) not in (None, "")}
        assert piece.meta == (known or None)
    assert shards.manifest.spans == 25
    with pytest.raises(InputError, match="^condition_fields: no record has a value in the field 'author'"):
        prepare(replace(options, out=str(tmp_path / "two"), condition_fields="title,author"), progress=False)
    with pytest.raises(InputError, match="^condition_fields: text is what conditions stand before"):
        prepare(replace(options, condition_fields="text"), progress=False)


def test_a_change_of_conditions_or_template_alone_is_noticed(tmp_path: Path) -> None:
    def write(title: str) -> None:
        talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        (tmp_path / "d.jsonl").write_text((json.dumps({"messages": talk, "title": title}) + "\n") * 20)

    options = PrepareOptions(
        out=str(tmp_path / "out"), inputs=[str(tmp_path / "d.jsonl")], vocab_size=300, processes=1,
        chat="chatml", condition_fields="title",
    )  # fmt: skip
    write("one")
    prepare(options, progress=False)
    assert prepare(options, progress=False).already_complete
    write("two")
    with pytest.raises(InputError, match="not the same: the input text"):
        prepare(options, progress=False)
    write("one  ")  # the prefix is the same, what is known about the record is not
    with pytest.raises(InputError, match="not the same: the input text"):
        prepare(options, progress=False)
    write("one")
    with pytest.raises(InputError, match="not the same: chat, the input text"):
        prepare(replace(options, chat="llada"), progress=False)


def test_parquet_rows_and_jsonl_lines_of_the_same_records_give_the_same_shards(tmp_path: Path) -> None:
    talks = [
        {
            "messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}],
            "title": f"t{i}",
        }
        for i in range(30)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    pq.write_table(pa.Table.from_pylist(talks), tmp_path / "d.parquet")
    hashes = []
    for name in ("d.jsonl", "d.parquet"):
        options = PrepareOptions(
            out=str(tmp_path / f"out-{name}"), inputs=[str(tmp_path / name)], vocab_size=300, val_fraction=0.0,
            processes=1, chat="chatml", condition_fields="title", row_tokens=64, chunk_tokens=256,
        )  # fmt: skip
        prepare(options, progress=False)
        hashes.append([shard.sha256 for shard in ShardSet.open(Path(options.out) / "train").shards])
    assert hashes[0] == hashes[1]


def test_awkward_lines_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "after a byte order mark"}\r\n',
        b'{"text": "nul \\u0000 inside"}\r\n',
        b"[" * 1_000_000 + b"\n",
        b'{"text": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_001 + b"\n",
        b'{"text": "lone \\udc80"}\n',
        b'{"text": "ok", "title": "lone \\ud800"}\n',
        b'{"text": "\xc3"}\n',
        b'\xef\xbb\xbf{"text": "a mark in the middle"}\n',
        b"\x00\x00\n",
        b'{"text": "last, without a line end"}',
    ]
    (tmp_path / "d.jsonl").write_bytes(b"".join(lines))
    found, skips = texts_of(tmp_path / "d.jsonl", RecordFormat(condition_fields=("title",)))
    assert found == ["after a byte order mark", "nul \x00 inside", "last, without a line end"]
    assert sum(skips.counts.values()) == 7 and skips.counts["invalid_utf8"] == 3
    assert skips.counts["invalid_json"] + skips.counts["no_text_field"] == 4


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_that_is_too_long_is_passed_over_and_counted(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"text": "first"}\n{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "last"}\n' + b"y" * 2_000_000
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    (tmp_path / f"d.jsonl{suffix}").write_bytes(pack(content))
    monkeypatch.setattr(data.sources, "MAX_RECORD_BYTES", 1_000_000)
    found, skips = texts_of(tmp_path / f"d.jsonl{suffix}")
    assert found == ["first", "last"] and skips.counts == {"too_large": 2}
    (tmp_path / "big.txt").write_bytes(b"x" * 1_000_001)
    with pytest.raises(InputError, match="1 too_large.*cut it into several"):
        list(iter_documents([tmp_path / "big.txt"]))


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "a.txt").write_text("text")
    skips = SkipLog()
    assert [d.name for d in open_sources([tmp_path])[0].documents(skips)] == [f"{tmp_path.name}/a.txt"]
    assert skips.counts == {"not_a_file": 1}
    with pytest.raises(InputError, match="neither a file nor a folder"):
        open_sources([tmp_path / "pipe.txt"])


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz"])
def test_a_small_file_that_unpacks_to_much_needs_little_memory(tmp_path: Path, suffix: str) -> None:
    """1 GB of one line in a file of a megabyte or less: passed over in pieces."""
    path = tmp_path / f"bomb{suffix}"
    if suffix.endswith("zst"):
        packer = zstandard.ZstdCompressor().compressobj()
        pieces = (packer.compress(bytes(1 << 20)) for _ in range(1 << 10))
        path.write_bytes(b"".join(pieces) + packer.flush())
    else:
        path.write_bytes(b"".join([gzip.compress(bytes(1 << 22), compresslevel=1)] * (1 << 8)))
    code = (
        "import re, sys, data.sources as s; s.MAX_RECORD_BYTES = 1 << 20; skips = s.SkipLog(named=False)\n"
        "documents = list(s.open_sources([sys.argv[1]])[0].documents(skips))\n"
        # Not getrusage: there a process begins with the peak of the one that forked it.
        "peak = re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(len(documents), dict(skips.counts), int(peak) // 1024)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, timeout=120, check=True, capture_output=True
    )
    documents, rest = said.stdout.decode().split(" ", 1)
    counts, _, mebibytes = rest.rpartition(" ")
    assert (documents, counts) == ("0", "{'too_large': 1}") and int(mebibytes) < 400
