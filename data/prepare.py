"""Text to shards: survey the input, train or take a tokenizer, encode on all cores, publish train/ and val/.

    documents -> survey (count, hash, split) -> tokenizer -> encode in order -> ShardWriter -> OUT/train, OUT/val

The output depends on the input and the options alone: not on the number of processes, and not on how often the work was
interrupted and started again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import hashlib
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.chunk_index import write_set_index
from data.document import Segment
from data.encode_pool import encode_in_order
from data.errors import InputError
from data.manifest import TOKENIZER_FILE, TOTALS, Manifest, ShardEntry, SourceCount, token_dtype
from data.prepare_options import PrepareOptions, check_options
from data.prepare_report import PrepareReport, report_sets
from data.progress import ByteProgress
from data.shard_writer import ShardWriter
from data.sources import Source, open_sources
from data.survey import SETS, InputHash, Survey, document_stream, survey_inputs
from data.tokenizer import TextTokenizer, load_tokenizer, prepare_tokenizer, tokenizer_file
from data.tokenizer_training import even_sample
from data.workspace import Reached, Workspace

BATCH_BYTES = 1 << 20  # of text handed to a process at once
BYTES_WORTH_A_PROCESS = 2 << 20  # starting a process for less text than this costs more than it saves
SPARE_DISK_BYTES = 16 << 20


class InputChanged(InputError):
    """The second reading of the inputs gave other text than the first."""


class Label(NamedTuple):
    """Where a document goes: its set, the number of its source, its size in UTF-8 bytes, what is known about it."""

    set_name: str
    source: int
    utf8_bytes: int
    meta: Mapping[str, Any] | None


def prepare(options: PrepareOptions, progress: bool = True) -> PrepareReport:
    """Do all of it, or go on with what an interrupted run left, or say that it is done already.

    Raises InputError for options or inputs that cannot work, an OUT that holds something else, and a disk that is too
    small.
    """
    started = time.monotonic()
    show = ByteProgress(progress)
    check_options(options)
    sources = open_sources(options.inputs, source=options.source, form=options.form(), licence=options.licence)
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
        skipped = sum((Counter(source.skipped) for source in survey.sources["train"]), Counter[str]())
        report = report_sets(
            workspace.out, names, skipped, time.monotonic() - started, show.times, resumed, already_complete=not missing
        )
    for line in report.lines():
        show.say(line)
    return report


def _prepared_with(options: PrepareOptions, survey: Survey) -> dict[str, Any]:
    """Everything that determines the output, in a form that does not depend on where the files lie."""
    names = ("val_fraction", "shard_tokens", "chunk_tokens", "eos_token", "seed", "row_tokens", "max_document_tokens")
    record: dict[str, Any] = {name: getattr(options, name) for name in names}
    form = options.form()
    record["long_documents"] = options.long_documents if options.limit() else None
    record["row_packing"] = options.row_packing if options.row_tokens else None
    record["chat"] = form.chat.record() if form.chat else None
    record["chat_turns"] = form.chat_turns if form.chat else None
    record["condition_fields"] = list(form.condition_fields)
    record["licences"] = [source.licence for source in survey.sources["train"]]
    record["input_sha256"] = survey.input_sha256
    if options.tokenizer is None:
        return record | {"vocab_size": options.vocab_size, "train_bytes": options.train_bytes}
    path = tokenizer_file(options.tokenizer)
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            f"tokenizer: {path} cannot be read ({error.strerror}); give another one, or leave it out"
        ) from error
    return record | {"tokenizer_sha256": sha256, "tokenizer_pattern": options.tokenizer_pattern}


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
    reached = {name: copy.deepcopy(shards[-1].reached) if shards else Reached() for name, shards in finished.items()}
    resumed = sum(len(shards) for shards in finished.values())
    remaining = sum(survey.utf8_bytes(name) - reached[name].utf8_bytes for name in names)
    for other in workspace.other_unfinished():
        show.say(f"note: {other} is unfinished work with other options or input; remove it if it is not needed")
    if resumed:
        show.say(f"going on after {resumed} finished shards")
    tokenizer = _tokenizer(options, sources, survey, workspace, show)
    _check_disk(workspace.out, remaining, 2 if token_dtype(tokenizer.vocab_size) == "uint16" else 4)
    limit = options.limit()

    def writer(name: str) -> ShardWriter:
        return ShardWriter(
            workspace.partial / name,
            dtype=token_dtype(tokenizer.vocab_size),
            chunk_tokens=options.chunk_tokens,
            shard_tokens=options.shard_tokens,
            piece_tokens=limit.tokens if limit else None,
            row_tokens=options.row_tokens,
            row_packing=options.row_packing,
            pad_id=tokenizer.special.pad,
            finished=[shard.entry for shard in finished[name]],
            on_shard=lambda entry: workspace.record(name, entry, reached[name]),
        )

    writers = {name: writer(name) for name in names}
    batches = _batches(sources, survey, options.limit_bytes, {name: reached[name].documents for name in names})
    encoding = encode_in_order(batches, tokenizer, _processes(options.processes, remaining), limit)
    with show.stage("encoding", remaining) as advance, contextlib.closing(encoding):
        for labels, encoded in encoding:
            for label, one in zip(labels, encoded, strict=True):
                # First, because adding a document may finish a shard, and then the journal says how far it reached.
                truncated = one.kept_bytes is not None
                kept = label.utf8_bytes if one.kept_bytes is None else min(one.kept_bytes, label.utf8_bytes)
                reached[label.set_name].add(label.source, label.utf8_bytes, kept, one.dropped)
                if not one.dropped:
                    writers[label.set_name].add_document(one.tokens, kept, one.spans, label.meta, truncated=truncated)
                advance(label.utf8_bytes)
    entries = {name: one.close() for name, one in writers.items()}
    for name in names:
        if not entries[name]:
            workspace.remove_partial()
            raise InputError(
                f"long_documents: every document of the {name} set was left out for its length; raise the limit or choose"
                " `--long_documents split`"
            )
    for name in names:
        _publish(workspace, options, tokenizer, _source_counts(survey, name, reached[name]), name, entries[name])
    return resumed


def _publish(
    workspace: Workspace,
    options: PrepareOptions,
    tokenizer: TextTokenizer,
    sources: tuple[SourceCount, ...],
    name: str,
    shards: list[ShardEntry],
) -> None:
    manifest = Manifest(
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=tokenizer.sha256,
        special=tokenizer.special,
        index_sha256=write_set_index(workspace.partial / name, shards),
        chunk_tokens=options.chunk_tokens,
        row_tokens=options.row_tokens,
        shards=tuple(shards),
        sources=sources,
        prepared_with=workspace.prepared_with,
        **{total: sum(getattr(shard, total) for shard in shards) for total in TOTALS},
    )
    workspace.publish(name, manifest)


def _source_counts(survey: Survey, name: str, reached: Reached) -> tuple[SourceCount, ...]:
    """What each source gave to a set, and what was left out of it: of the whole source, and of this set for its length."""
    return tuple(
        dataclasses.replace(
            source,
            documents=reached.kept.get(str(number), [0, 0])[0],
            utf8_bytes=reached.kept.get(str(number), [0, 0])[1],
            skipped=source.skipped | reached.dropped.get(str(number), {}),
        )
        for number, source in enumerate(survey.sources[name])
    )


def _tokenizer(
    options: PrepareOptions, sources: Sequence[Source], survey: Survey, workspace: Workspace, show: ByteProgress
) -> TextTokenizer:
    """The tokenizer of this work: trained or taken over once, then read back from the working folder."""
    path = workspace.partial / TOKENIZER_FILE
    template = options.form().chat
    if not path.exists():
        budget = min(options.train_bytes, survey.utf8_bytes("train"))
        if options.tokenizer is None:
            show.say(f"training a tokenizer of {options.vocab_size:,} entries on {budget / 1e6:,.1f} MB")
        train_texts = (
            placed.document.raw_text
            for placed in document_stream(sources, options.limit_bytes)
            if survey.set_of(placed.record, placed.document.record) == "train"
        )
        tokenizer = prepare_tokenizer(
            path,
            options.tokenizer,
            texts=even_sample(train_texts, survey.utf8_bytes("train"), budget),
            vocab_size=options.vocab_size,
            eos_token=options.eos_token,
            pattern=options.tokenizer_pattern,
            more_special=template.special_tokens if template else (),
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
) -> Iterator[tuple[list[Label], list[tuple[Segment, ...]]]]:
    """Group documents of the wanted sets into batches of about BATCH_BYTES: labels, and the segments of each document.

    The first `already[set]` documents of each set are left out, they lie in finished shards. Raises InputError when
    the input is no longer what the survey read.
    """
    seen = dict.fromkeys(already, 0)
    input_hash = InputHash()
    labels: list[Label] = []
    documents: list[tuple[Segment, ...]] = []
    size = 0
    for source, record, document, utf8_bytes in document_stream(sources, limit_bytes, input_hash=input_hash):
        name = survey.set_of(record, document.record)
        if name not in already:
            continue
        seen[name] += 1
        if seen[name] <= already[name]:
            continue
        labels.append(Label(name, source, utf8_bytes, document.meta))
        documents.append(document.segments)
        size += utf8_bytes
        if size >= BATCH_BYTES:
            yield labels, documents
            labels, documents, size = [], [], 0
    if input_hash.hexdigest() != survey.input_sha256:
        raise InputChanged(
            "inputs: the files changed while they were read; run the command again when they are at rest"
        )
    if documents:
        yield labels, documents


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
