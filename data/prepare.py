"""Text to shards: survey the input, train or take a tokenizer, encode on all cores, publish train/ and val/.

    documents -> survey (count, hash, split) -> tokenizer -> encode in order -> ShardWriter -> OUT/train, OUT/val

The output depends on the input and the options alone: not on the number of processes, and not on how often the work was
interrupted and started again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.encode_pool import encode_in_order
from data.errors import InputError
from data.manifest import TOKENIZER_FILE, Manifest, ShardEntry, token_dtype
from data.prepare_options import PrepareOptions, PrepareReport, SetReport, check_options
from data.progress import ByteProgress
from data.shard_set import ShardSet
from data.shard_writer import ShardWriter
from data.sources import Source, open_sources
from data.survey import SETS, InputHash, Survey, document_stream, survey_inputs
from data.tokenizer import TextTokenizer, even_sample, load_tokenizer, prepare_tokenizer
from data.workspace import Workspace

BATCH_BYTES = 1 << 20  # of text handed to a process at once
BYTES_WORTH_A_PROCESS = 2 << 20  # starting a process for less text than this costs more than it saves
SPARE_DISK_BYTES = 16 << 20


class InputChanged(InputError):
    """The second reading of the inputs gave other text than the first."""


def prepare(options: PrepareOptions, progress: bool = True) -> PrepareReport:
    """Do all of it, or go on with what an interrupted run left, or say that it is done already.

    Raises InputError for options or inputs that cannot work, an OUT that holds something else, and a disk that is too
    small.
    """
    started = time.monotonic()
    show = ByteProgress(progress)
    check_options(options)
    sources = open_sources(
        options.inputs, source=options.source, text_field=options.text_field, licence=options.licence
    )
    with show.stage("reading") as advance:
        survey = survey_inputs(
            sources,
            val_fraction=options.val_fraction,
            seed=options.seed,
            limit_bytes=options.limit_bytes,
            advance=advance,
        )
    names = [name for name in SETS if survey.documents(name)]
    size = sum(survey.utf8_bytes(name) for name in names)
    show.say(f"input: {sum(survey.documents(name) for name in names):,} documents, {size / 1e6:,.1f} MB of text")
    resumed = 0
    with Workspace(Path(options.out), _prepared_with(options, survey)) as workspace:
        present = [name for name in SETS if workspace.published(name)]
        missing = [name for name in names if name not in present]
        if missing:
            try:
                resumed = _fill(options, sources, survey, workspace, missing, show)
            except InputChanged:
                workspace.remove_partial()  # its shards may hold the changed text
                raise
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise InputError(
                        f"out: {options.out} is full; free some space and run the same command again, it goes on"
                    ) from error
                raise
        workspace.remove_partial()
        report = _report(
            workspace.out, names, survey, time.monotonic() - started, resumed, already_complete=not missing
        )
    for line in report.lines():
        show.say(line)
    return report


def _prepared_with(options: PrepareOptions, survey: Survey) -> dict[str, Any]:
    """Everything that determines the output, in a form that does not depend on where the files lie."""
    names = ("val_fraction", "shard_tokens", "chunk_tokens", "eos_token", "seed")
    record: dict[str, Any] = {name: getattr(options, name) for name in names}
    record["licences"] = [source.licence for source in survey.sources["train"]]
    record["input_sha256"] = survey.input_sha256
    if options.tokenizer is None:
        return record | {"vocab_size": options.vocab_size, "train_bytes": options.train_bytes}
    path = Path(options.tokenizer)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        return record | {"tokenizer_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except OSError as error:
        raise InputError(
            f"tokenizer: {path} cannot be read ({error.strerror}); give a tokenizer.json, or leave it out"
        ) from error


def _fill(
    options: PrepareOptions,
    sources: Sequence[Source],
    survey: Survey,
    workspace: Workspace,
    names: list[str],
    show: ByteProgress,
) -> int:
    """Write and publish the sets `names`; gives the number of shards that were there already."""
    finished = {name: workspace.resume(name) for name in names}
    resumed = sum(len(entries) for entries in finished.values())
    remaining = sum(survey.utf8_bytes(name) - sum(entry.utf8_bytes for entry in finished[name]) for name in names)
    for other in workspace.other_unfinished():
        show.say(f"note: {other} is unfinished work with other options or input; remove it if it is not needed")
    if resumed:
        show.say(f"going on after {resumed} finished shards")
    tokenizer = _tokenizer(options, sources, survey, workspace, show)
    dtype = token_dtype(tokenizer.vocab_size)
    _check_disk(workspace.out, remaining, 2 if dtype == "uint16" else 4)
    writers = {
        name: ShardWriter(
            workspace.partial / name,
            dtype=dtype,
            chunk_tokens=options.chunk_tokens,
            shard_tokens=options.shard_tokens,
            finished=finished[name],
            on_shard=partial(workspace.record, name),
        )
        for name in names
    }
    batches = _batches(sources, survey, options.limit_bytes, {name: _documents(finished[name]) for name in names})
    encoding = encode_in_order(batches, tokenizer, _processes(options.processes, remaining))
    with show.stage("encoding", remaining) as advance, contextlib.closing(encoding):
        for labels, encoded in encoding:
            for (name, size), tokens in zip(labels, encoded, strict=True):
                writers[name].add_document(tokens, size)
                advance(size)
    entries = {name: writer.close() for name, writer in writers.items()}
    for name in names:
        workspace.publish(
            name, _manifest(tokenizer, survey, name, entries[name], options.chunk_tokens, workspace.prepared_with)
        )
    return resumed


def _tokenizer(
    options: PrepareOptions, sources: Sequence[Source], survey: Survey, workspace: Workspace, show: ByteProgress
) -> TextTokenizer:
    """The tokenizer of this work: trained or taken over once, then read back from the working folder."""
    path = workspace.partial / TOKENIZER_FILE
    if not path.exists():
        budget = min(options.train_bytes, survey.utf8_bytes("train"))
        if options.tokenizer is None:
            show.say(f"training a tokenizer of {options.vocab_size:,} entries on {budget / 1e6:,.1f} MB")
        train_texts = (
            document.text
            for index, (_, document, _) in enumerate(document_stream(sources, options.limit_bytes))
            if survey.set_of(index, document.name) == "train"
        )
        tokenizer = prepare_tokenizer(
            path,
            options.tokenizer,
            texts=even_sample(train_texts, survey.utf8_bytes("train"), budget),
            vocab_size=options.vocab_size,
            eos_token=options.eos_token,
        )
    else:
        tokenizer = load_tokenizer(path, eos_token=options.eos_token)
    mask, eos = (tokenizer.backend.id_to_token(i) for i in (tokenizer.special.mask, tokenizer.special.eos))
    show.say(
        f"tokenizer: {tokenizer.vocab_size:,} entries, mask {mask} = {tokenizer.special.mask},"
        f" end of text and padding {eos} = {tokenizer.special.eos}"
    )
    return tokenizer


def _batches(
    sources: Sequence[Source], survey: Survey, limit_bytes: int | None, already: dict[str, int]
) -> Iterator[tuple[list[tuple[str, int]], list[str]]]:
    """Group documents of the wanted sets into batches of about BATCH_BYTES: ([(set, UTF-8 bytes)], [text]).

    The first `already[set]` documents of each set are left out, they lie in finished shards. Raises InputError when
    the input is no longer what the survey read.
    """
    seen = dict.fromkeys(already, 0)
    input_hash = InputHash()
    labels: list[tuple[str, int]] = []
    texts: list[str] = []
    size = 0
    for index, (_, document, text) in enumerate(document_stream(sources, limit_bytes)):
        input_hash.add(document.name, text)
        name = survey.set_of(index, document.name)
        if name not in already:
            continue
        seen[name] += 1
        if seen[name] <= already[name]:
            continue
        labels.append((name, len(text)))
        texts.append(document.text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield labels, texts
            labels, texts, size = [], [], 0
    if input_hash.hexdigest() != survey.input_sha256:
        raise InputChanged(
            "inputs: the files changed while they were read; run the command again when they are at rest"
        )
    if texts:
        yield labels, texts


def _documents(entries: Sequence[ShardEntry]) -> int:
    return sum(entry.documents for entry in entries)


def _processes(wanted: int, remaining_bytes: int) -> int:
    return wanted or min(len(os.sched_getaffinity(0)), max(1, math.ceil(remaining_bytes / BYTES_WORTH_A_PROCESS)))


def _check_disk(out: Path, remaining_bytes: int, item_bytes: int) -> None:
    """Refuse to begin when the disk surely fills up. Two bytes of text a token is fewer than real text needs."""
    needed = remaining_bytes // 2 * item_bytes + SPARE_DISK_BYTES
    free = shutil.disk_usage(out).free
    if free < needed:
        raise InputError(
            f"out: {out} has {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB are needed;"
            " free some or choose another --out"
        )


def _manifest(
    tokenizer: TextTokenizer,
    survey: Survey,
    name: str,
    shards: list[ShardEntry],
    chunk_tokens: int,
    prepared_with: dict[str, Any],
) -> Manifest:
    totals = ("tokens", "documents", "split_documents", "utf8_bytes", "chunks")
    return Manifest(
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=tokenizer.sha256,
        special=tokenizer.special,
        chunk_tokens=chunk_tokens,
        shards=tuple(shards),
        sources=tuple(survey.sources[name]),
        prepared_with=prepared_with,
        **{total: sum(getattr(shard, total) for shard in shards) for total in totals},
    )


def _report(
    out: Path, names: list[str], survey: Survey, seconds: float, resumed: int, already_complete: bool
) -> PrepareReport:
    """Open every published set once more, so that a report means that the sets can be read."""
    opened = {name: ShardSet.open(out / name, verify="size") for name in names}
    reasons: dict[str, int] = {}
    for source in survey.sources["train"]:
        for reason, count in source.skipped.items():
            reasons[reason] = reasons.get(reason, 0) + count
    sets = {
        name: SetReport(out / name, shards.documents, shards.tokens, shards.utf8_bytes, len(shards.shards))
        for name, shards in opened.items()
    }
    return PrepareReport(sets, opened[names[0]].vocab_size, reasons, seconds, resumed, already_complete)
