"""Walk through a tar member by member, by its headers alone: nothing is extracted, and every oddity gets a line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

from data.chunk_index import TAR_BLOCK
from data.tar_member import Member, read_member

SUFFIXES = ("tok.npy", "lens.npy", "spans.npy", "meta.json")
ZEROS_AT_ONCE = 1 << 20


class Placed(NamedTuple):
    """A regular file with a plain name; `payload`: the byte in the tar at which it begins."""

    member: Member
    payload: int


class Sample(NamedTuple):
    """The members of one chunk by suffix. `fault`: what is wrong with which there are and their order, "" if nothing."""

    key: str
    members: dict[str, Placed]
    fault: str


def walk(file: int, size: int, resume_at: Sequence[int]) -> Iterator[Placed | str]:
    """The regular members of the tar behind a descriptor, in order, and a line for everything else that is in it.

    size: bytes of the file. resume_at: ascending, the headers at which to go on where the chain of headers breaks.
    """
    at, names = 0, set()
    while True:
        block = os.pread(file, TAR_BLOCK, at)
        if len(block) < TAR_BLOCK:
            yield f"byte {at}: the archive ends without its two empty blocks"
            return
        if not block.strip(b"\0"):
            yield from _end_faults(file, at, size)
            return
        try:
            member = read_member(block)
            if member.size > size - at - TAR_BLOCK:
                raise ValueError(f"{member.name!r:.120} claims {member.size} bytes, the archive has no so many left")
        except ValueError as error:
            yield f"byte {at}: {error}"
            following = next((header for header in resume_at if header > at), None)
            if following is None:
                return
            at = following
            continue
        if member.fault:
            yield f"member {member.name!r:.120} is {member.fault}"
        elif member.name in names:
            yield f"member {member.name!r:.120} is there twice"
        else:
            names.add(member.name)
            yield Placed(member, at + TAR_BLOCK)
        at += TAR_BLOCK + member.size + -member.size % TAR_BLOCK


def samples(members: Sequence[Placed]) -> list[Sample]:
    """Neighbours with one key make a sample, as in webdataset: the name up to its first dot."""
    found: list[Sample] = []
    group: list[Placed] = []
    key: Optional[str] = None
    for placed in members:
        if group and placed.member.name.split(".", 1)[0] != key:
            found.append(_sample(key or "", group))
            group = []
        key = placed.member.name.split(".", 1)[0]
        group.append(placed)
    return found + ([_sample(key or "", group)] if group else [])


def _sample(key: str, group: Sequence[Placed]) -> Sample:
    suffixes = [placed.member.name.partition(".")[2] for placed in group]
    in_order = [suffix for suffix in SUFFIXES if suffix in suffixes]
    fault = ""
    if suffixes != in_order or in_order[:2] != list(SUFFIXES[:2]):
        shown = ", ".join(suffixes[:6])
        fault = f"sample {key} holds {shown:.200}; it must be tok.npy, lens.npy and perhaps spans.npy, meta.json, in this order"
    return Sample(key, dict(zip(suffixes, group)), fault)


def _end_faults(file: int, at: int, size: int) -> Iterator[str]:
    if size - at < 2 * TAR_BLOCK:
        yield f"byte {at}: the archive ends without its two empty blocks"
    while at < size:
        zeros = os.pread(file, ZEROS_AT_ONCE, at)
        if not zeros:
            return
        if zeros.strip(b"\0"):
            place = at + len(zeros) - len(zeros.lstrip(b"\0"))
            yield f"byte {place}: there is something behind the end of the archive"
            return
        at += len(zeros)
