"""Lines of a plain, gzip or zstandard file in bounded memory, with damage noticed."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from data.errors import InputError

_READ_BYTES = 1 << 12  # compressed: even a file made to expand gives no more than some 130 MB for it
_SKIP_BYTES = 1 << 20


def text_lines(path: Path, most_bytes: int) -> Iterator[bytes | None]:
    """Each line with its line end, or None for one of more than `most_bytes`, which is passed over unread.

    Raises InputError when the file cannot be read, or its compressed stream is damaged or cut short.
    """
    name = path.name.lower()
    try:
        if name.endswith(".zst"):
            with open(path, "rb") as raw:
                yield from _lines(io.BufferedReader(_Zstandard(raw), 1 << 17), most_bytes)
        elif name.endswith(".gz"):
            with gzip.open(path, "rb") as unpacked:
                yield from _lines(unpacked, most_bytes)
        else:
            with open(path, "rb") as plain:
                yield from _lines(plain, most_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"inputs: {path} is damaged or cut short ({error}); copy it again") from error
    except OSError as error:
        raise InputError(f"inputs: cannot read {path}: {error.strerror}") from error


def _lines(file: io.BufferedIOBase, most_bytes: int) -> Iterator[bytes | None]:
    while line := file.readline(most_bytes + 1):
        if len(line) <= most_bytes:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_SKIP_BYTES)
        yield None


class _Zstandard(io.RawIOBase):
    """Decompresses frame after frame.

    The library's own stream reader ends without an error at the end of the first frame and at a cut in the middle of one;
    both would lose text silently.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if not self._compressed and not (compressed := self._file.read(_READ_BYTES)):
                if self._frame is not None:
                    raise EOFError("the last zstandard frame has no end")
                return 0
            self._compressed = self._compressed or compressed
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._compressed, self._frame = (self._frame.unused_data, None) if self._frame.eof else (b"", self._frame)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
