"""Turn files, folders and the standard library into a deterministic stream of documents.

One .txt, .md or .py file is one document; a .jsonl file (plain, .gz or .zst) holds a record a line, a .parquet file a record
a row. Text is taken as it is: no newline translation, NUL characters and byte-order marks kept (but for a mark before the
first record of a .jsonl file). What cannot be used is counted by reason, never dropped silently and never repaired.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.chat import Unusable
from data.document import Document, plain_document
from data.errors import InputError
from data.parquet_rows import parquet_rows
from data.records import PLAIN_RECORDS, RecordFormat, record_documents
from data.text_lines import text_lines

log = logging.getLogger(__name__)

TEXT_EXTENSIONS = (".txt", ".md", ".py")
JSONL_EXTENSIONS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_EXTENSIONS = (".parquet",)
ALLOWED = ", ".join(TEXT_EXTENSIONS + JSONL_EXTENSIONS + PARQUET_EXTENSIONS)
MAX_RECORD_BYTES = 256 << 20  # a longer file of text or line of .jsonl is counted and not held in memory
_NAMES_LOGGED = 10  # per reason; the counts are always complete


@dataclass
class SkipLog:
    """Counts skipped records by reason, and logs the first names of each when `named`.

    `conditions` counts the records in which each condition field was found.
    """

    counts: Counter[str] = field(default_factory=Counter)
    conditions: Counter[str] = field(default_factory=Counter)
    named: bool = True

    def add(self, reason: str, name: str, detail: str = "") -> None:
        self.counts[reason] += 1
        level = logging.INFO if reason == "empty" else logging.WARNING  # an empty file is no loss
        if not self.named:
            return
        if self.counts[reason] <= _NAMES_LOGGED:
            log.log(level, "skipped %s: %s%s", name, reason, f" ({detail})" if detail else "")
        elif self.counts[reason] == _NAMES_LOGGED + 1:
            log.log(level, "more documents skipped: %s; only the count is kept from here on", reason)


@dataclass(frozen=True)
class Source:
    """One input of `prepare`: a file, a folder or the standard library, with the licence to record for it."""

    name: str
    root: Path
    licence: str
    form: RecordFormat = PLAIN_RECORDS
    standard_library: bool = False

    def documents(self, skips: SkipLog | None = None) -> Iterator[Document]:
        """Yield every usable document, always in the same order.

        `skips` receives (and logs) what was left out and why; docs/data-prepare.md lists the reasons. Raises InputError
        for a file that cannot be read or is damaged.
        """
        skips = skips if skips is not None else SkipLog(named=False)
        if not self.root.is_dir():
            yield from _file_documents(self.root, self.name, self.form, skips)
            return
        for path in _walk(self.root, python_only=self.standard_library):
            name = f"{self.name}/{path.relative_to(self.root).as_posix()}"
            if _kind(path) is None:
                skips.counts["unknown_extension"] += 1
            elif not stat.S_ISREG(path.stat().st_mode if path.exists() else 0):
                skips.add("not_a_file", name)  # reading a pipe or a socket could wait for ever
            else:
                yield from _file_documents(path, name, self.form, skips)


def open_sources(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    source: Literal["stdlib"] | None = None,
    form: RecordFormat = PLAIN_RECORDS,
    licence: str = "unspecified",
) -> list[Source]:
    """Check the inputs and describe each as a Source, without reading any text yet.

    Raises InputError when there is nothing to read, a path is missing or given twice, or a file has an unknown
    extension.
    """
    if source not in (None, "stdlib"):
        raise InputError(
            f"source: {source!r} is unknown; allowed is stdlib (or leave it out and name files and folders)"
        )
    sources: list[Source] = []
    seen: set[Path] = set()
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise InputError(f"inputs: {path} does not exist; give a folder or files of type {ALLOWED}")
        if not path.is_file() and not path.is_dir():
            raise InputError(f"inputs: {path} is neither a file nor a folder; give a folder or files of type {ALLOWED}")
        if path.is_file() and _kind(path) is None:
            raise InputError(f"inputs: {path} has an extension that is not known; allowed are {ALLOWED} and folders")
        resolved = path.resolve()
        if resolved in seen:
            raise InputError(f"inputs: {path} is given twice; name each input once")
        seen.add(resolved)
        sources.append(Source(resolved.name or "root", path, licence, form))
    if source == "stdlib":
        sources.append(Source("stdlib", Path(sysconfig.get_path("stdlib")), "PSF-2.0", form, standard_library=True))
    if not sources:
        raise InputError(
            "inputs: nothing to read; name files and folders (`prepare TEXTS/ --out ...`), or give --source stdlib"
        )
    return sources


def iter_documents(
    paths: Sequence[str | os.PathLike[str]] | Literal["stdlib"],
    *,
    form: RecordFormat = PLAIN_RECORDS,
    skips: SkipLog | None = None,
) -> Iterator[Document]:
    """Yield the documents of files and folders, or of the running Python's standard library for "stdlib".

    Raises InputError as `open_sources` does, and when there is not one document in all of them.
    """
    sources = open_sources([], source="stdlib") if paths == "stdlib" else open_sources(paths, form=form)
    skips = skips if skips is not None else SkipLog()
    found = False
    for source in sources:
        for document in source.documents(skips):
            found = True
            yield document
    if not found:
        raise no_documents_error(sources, skips.counts)


def no_documents_error(sources: Iterable[Source], counts: Counter[str]) -> InputError:
    """The error for inputs that hold no usable document, with what was skipped and why."""
    where = ", ".join(str(source.root) for source in sources)
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "nothing skipped"
    hints = {
        "no_text_field": "; choose the field with --text_field, or read conversations with --chat",
        "no_messages": "; choose the field with --chat_field",
        "too_large": f"; a document may have {MAX_RECORD_BYTES >> 20} MiB, cut it into several",
    }
    hint = next((hint for reason, hint in hints.items() if counts[reason]), "")
    return InputError(f"inputs: no documents in {where} ({skipped}); readable are {ALLOWED}{hint}")


def _kind(path: Path) -> Literal["text", "jsonl", "parquet"] | None:
    name = path.name.lower()
    if name.endswith(TEXT_EXTENSIONS):
        return "text"
    if name.endswith(PARQUET_EXTENSIONS):
        return "parquet"
    return "jsonl" if name.endswith(JSONL_EXTENSIONS) else None


def _walk(root: Path, python_only: bool) -> Iterator[Path]:
    """Every visible file below `root` in byte order of the names, whatever order the file system has."""
    left_out = {"__pycache__", "site-packages", "dist-packages"} if python_only else {"__pycache__"}

    def refuse(error: OSError) -> None:
        raise InputError(f"inputs: cannot read the folder {error.filename}: {error.strerror}")

    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if name not in left_out and not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and (name.endswith(".py") or not python_only):
                yield Path(folder, name)


def _file_documents(path: Path, name: str, form: RecordFormat, skips: SkipLog) -> Iterator[Document]:
    kind = _kind(path)
    if kind == "text":
        yield from _text_documents(path, name, form, skips)
        return
    records = _jsonl_records(path, name, skips) if kind == "jsonl" else _parquet_records(path, name, form, skips)
    for record_name, record in records:
        try:
            yield from record_documents(record_name, record, form, skips.conditions)
        except Unusable as unusable:
            skips.add(unusable.reason, record_name, unusable.detail)


def _text_documents(path: Path, name: str, form: RecordFormat, skips: SkipLog) -> Iterator[Document]:
    if form.chat:
        skips.add("not_a_chat", name)
        return
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            skips.add("too_large", name)
            return
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"inputs: cannot read {path}: {error.strerror}") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        skips.add("invalid_utf8", name, f"byte {error.start}")
        return
    if text:
        yield plain_document(name, text)
    else:
        skips.add("empty", name)


def _jsonl_records(path: Path, name: str, skips: SkipLog) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text_lines(path, MAX_RECORD_BYTES), start=1):
        line_name = f"{name}:{number}"
        if line is None:
            skips.add("too_large", line_name)
            continue
        if not line.strip():
            skips.add("empty", line_name)
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            skips.add("invalid_utf8", line_name, f"byte {error.start}")
        except (ValueError, RecursionError):
            skips.add("invalid_json", line_name)
        else:
            yield line_name, record


def _parquet_records(path: Path, name: str, form: RecordFormat, skips: SkipLog) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(parquet_rows(path, form.fields), start=1):
        if row is None:
            skips.add("invalid_utf8", f"{name}:{number}")
        else:
            yield f"{name}:{number}", row
