"""The 512-byte header before each member of a tar, read by hand: nothing is extracted, evaluated or trusted."""

from __future__ import annotations

import re
from typing import NamedTuple

from data.chunk_index import TAR_BLOCK

KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a named pipe",
    b"7": "a contiguous file",
    b"D": "a GNU dump folder",
    b"K": "a GNU long-link header",
    b"L": "a GNU long-name header",
    b"M": "a GNU continued volume",
    b"N": "a GNU old long name",
    b"S": "a GNU sparse file",
    b"V": "a GNU volume label",
    b"X": "a Solaris extended header",
    b"g": "a pax global header",
    b"x": "a pax extended header",
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


class Member(NamedTuple):
    """One header: `name` as stored, `size` of the payload in bytes, and what is wrong with it ("" if nothing)."""

    name: str
    size: int
    fault: str


def read_member(block: bytes) -> Member:
    """The member that a 512-byte header describes: `fault` says why it is no regular file with a plain name.

    Raises ValueError, saying why, when it is no tar header at all, so that what follows cannot be found through it.
    """
    if len(block) != TAR_BLOCK:
        raise ValueError("the archive ends inside a header")
    checksum, size = _number(block[148:156]), _number(block[124:136])
    if checksum is None or checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise ValueError("no tar header (its checksum is wrong)")
    if size is None:
        raise ValueError("a tar header without a plain size")
    name = block[:100].split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
    kind = block[156:157]
    if kind not in (b"0", b"\0"):
        fault = f"{KINDS.get(kind, f'a member of unknown type {kind!r}')} instead of a regular file"
    elif block[345:500].strip(b"\0") or not _PLAIN_NAME.fullmatch(name):
        fault = "not a plain name inside the archive"
    else:
        fault = ""
    return Member(name, size, fault)


def _number(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None
