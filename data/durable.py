"""Write a file so that a crash leaves either the old content or the new one, never half of it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder (a rename or a deletion just done) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: write beside it, fsync, rename, fsync the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def keep_file(path: Path, content: bytes) -> None:
    """`write_durably`, unless that is what stands there."""
    if not path.exists() or path.read_bytes() != content:
        write_durably(path, content)


def take_lock(path: Path) -> int:
    """An open descriptor that holds the kernel's lock on `path` until it is closed or the process ends, however it ends.

    Raises BlockingIOError when another process holds it. On a file system without locks nothing is held: that is no
    reason to stop.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return descriptor
        os.close(descriptor)
        raise
    return descriptor
