"""Turn files, folders and the standard library into a deterministic stream of text documents.

One .txt, .md or .py file is one document; a .jsonl file (plain, .gz or .zst) holds one document a line. Text is taken
as it is: no newline translation, no byte-order-mark stripping, NUL characters kept. What cannot be used is counted by
reason, never dropped silently and never repaired.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import zstandard

from data.errors import InputError

log = logging.getLogger(__name__)

TEXT_EXTENSIONS = (".txt", ".md", ".py")
JSONL_EXTENSIONS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ALLOWED = ", ".join(TEXT_EXTENSIONS + JSONL_EXTENSIONS)
_NAMES_LOGGED = 10  # per reason; the counts are always complete
_READ_BYTES = 1 << 17


class Document(NamedTuple):
    """One text and a name that stays the same when other inputs are added."""

    name: str
    text: str


@dataclass
class SkipLog:
    """Counts skipped documents by reason, and logs the first names of each when `named`."""

    counts: Counter[str] = field(default_factory=Counter)
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
    text_field: str = "text"
    standard_library: bool = False

    def documents(self, skips: SkipLog | None = None) -> Iterator[Document]:
        """Yield every usable document, always in the same order.

        `skips` receives (and logs) what was left out: `invalid_utf8`, `empty`, `invalid_json`, `no_text_field`,
        `unknown_extension`. Raises InputError for a file that cannot be read or whose compressed stream is damaged.
        """
        skips = skips if skips is not None else SkipLog(named=False)
        if not self.root.is_dir():
            yield from _file_documents(self.root, self.name, self.text_field, skips)
            return
        for path in _walk(self.root, python_only=self.standard_library):
            name = f"{self.name}/{path.relative_to(self.root).as_posix()}"
            if _kind(path) is None:
                skips.counts["unknown_extension"] += 1
            else:
                yield from _file_documents(path, name, self.text_field, skips)


def open_sources(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    source: Literal["stdlib"] | None = None,
    text_field: str = "text",
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
        if path.is_file() and _kind(path) is None:
            raise InputError(f"inputs: {path} has an extension that is not known; allowed are {ALLOWED} and folders")
        resolved = path.resolve()
        if resolved in seen:
            raise InputError(f"inputs: {path} is given twice; name each input once")
        seen.add(resolved)
        sources.append(Source(resolved.name or "root", path, licence, text_field))
    if source == "stdlib":
        sources.append(
            Source("stdlib", Path(sysconfig.get_path("stdlib")), "PSF-2.0", text_field, standard_library=True)
        )
    if not sources:
        raise InputError(
            "inputs: nothing to read; name files and folders (`prepare TEXTS/ --out ...`), or give --source stdlib"
        )
    return sources


def iter_documents(
    paths: Sequence[str | os.PathLike[str]] | Literal["stdlib"],
    *,
    text_field: str = "text",
    skips: SkipLog | None = None,
) -> Iterator[Document]:
    """Yield the documents of files and folders, or of the running Python's standard library for "stdlib".

    Raises InputError as `open_sources` does, and when there is not one document in all of them.
    """
    sources = open_sources([], source="stdlib") if paths == "stdlib" else open_sources(paths, text_field=text_field)
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
    hint = "; choose the field with --text_field" if counts["no_text_field"] else ""
    return InputError(f"inputs: no documents in {where} ({skipped}); readable are {ALLOWED}{hint}")


def _kind(path: Path) -> Literal["text", "jsonl"] | None:
    name = path.name.lower()
    if name.endswith(TEXT_EXTENSIONS):
        return "text"
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


def _file_documents(path: Path, name: str, text_field: str, skips: SkipLog) -> Iterator[Document]:
    if _kind(path) == "jsonl":
        yield from _jsonl_documents(path, name, text_field, skips)
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"inputs: cannot read {path}: {error.strerror}") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        skips.add("invalid_utf8", name, f"byte {error.start}")
        return
    if text:
        yield Document(name, text)
    else:
        skips.add("empty", name)


def _jsonl_documents(path: Path, name: str, text_field: str, skips: SkipLog) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), start=1):
        line_name = f"{name}:{number}"
        try:
            record = json.loads(line.decode("utf-8")) if line.strip() else {text_field: ""}
        except UnicodeDecodeError as error:
            skips.add("invalid_utf8", line_name, f"byte {error.start}")
            continue
        except (ValueError, RecursionError):
            skips.add("invalid_json", line_name)
            continue
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(sorted(record)[:5]) if isinstance(record, dict) else "not an object"
            skips.add("no_text_field", line_name, f"field {text_field!r} wanted, found: {keys}")
        elif not text:
            skips.add("empty", line_name)
        elif not _encodable(text):
            skips.add("invalid_utf8", line_name, "a lone surrogate")
        else:
            yield Document(line_name, text)


def _encodable(text: str) -> bool:
    """False for lone surrogates: JSON can spell them as escapes, UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain, gzip or zstandard file; memory is one line and one read."""
    name = path.name.lower()
    try:
        if name.endswith(".zst"):
            yield from _split_lines(_zstandard_pieces(path))
        elif name.endswith(".gz"):
            with gzip.open(path, "rb") as file:
                yield from file
        else:
            with open(path, "rb") as file:
                yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"inputs: {path} is damaged or cut short ({error}); copy it again") from error
    except OSError as error:
        raise InputError(f"inputs: cannot read {path}: {error.strerror}") from error


def _zstandard_pieces(path: Path) -> Iterator[bytes]:
    """Decompress frame after frame.

    The library's own stream reader ends without an error at the end of the first frame and at a cut in the middle of
    one; both would lose text silently.
    """
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    with open(path, "rb") as file:
        while compressed := file.read(_READ_BYTES):
            while compressed:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(compressed)
                if not frame.eof:
                    break
                compressed, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the last zstandard frame has no end")


def _split_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    started: list[bytes] = []
    for piece in pieces:
        *complete, rest = piece.split(b"\n")
        for line in complete:
            yield b"".join([*started, line])
            started = []
        if rest:
            started.append(rest)
    if started:
        yield b"".join(started)
