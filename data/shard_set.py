"""Open a shard set, prove that it is whole, and read any range of its tokens.

Tokens are numbered through all shards in manifest order: a flat range [start, start + count) is found by bisection in
the mapped index and read with `pread`, without touching the tar structure.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional

import numpy as np

from data.chunk_index import OFFSET, PIECES, SPANS, TAR_BLOCK, TOKEN_START, payloads
from data.chunk_layout import ChunkLayout, LayoutCache, parse_layout
from data.errors import InputError, ShardError
from data.manifest import INDEX_FILE, ITEM_BYTES, MANIFEST_FILE, REMEDY, Manifest, ShardEntry, SpecialIds, read_manifest
from data.shard_check import Depth, check_counts, check_shards, check_tokenizer, map_index, read_set_index
from data.shard_files import FolderShards, OpenShards, ShardSource, shard_error
from data.shard_writer import NO_SPANS, clip_spans
from data.tar_member import read_member

if TYPE_CHECKING:
    from data.remote_options import CacheOptions

FULL_CHECK_BYTES = 2 << 30
OPEN_FILES = 64
LAYOUT_BYTES = 16 << 20  # of document starts and spans that a process keeps
NAMED_FAULTS = 5  # bad shards that an error names; it counts the others


class _Part(NamedTuple):
    """What one chunk gives to a range: `tokens` from `inside` on, which lie at `at` in the range."""

    chunk: int
    inside: int
    tokens: int
    at: int


class ShardSet:
    """A set of shards, in a folder or at an address, behind one flat token axis.

    Safe to pickle and to use after a fork: files are opened on first use in each process, at most OPEN_FILES of them, and the
    index is mapped, not read. Attributes: `location` as errors show it; `folder`, where manifest, tokenizer and index lie on
    this host; `bad`, {number: reason} of the shards that cannot be read.
    """

    def __init__(
        self,
        location: str,
        folder: Path,
        manifest: Manifest,
        index: np.ndarray,
        source: ShardSource,
        bad: dict[int, str],
    ) -> None:
        self.location, self.folder, self.manifest, self.bad = location, folder, manifest, bad
        self._source = source
        self._starts, self._offsets = index[TOKEN_START], index[OFFSET]
        self._pieces, self._spans = index[PIECES], index[SPANS]
        self._chunk_ends = np.cumsum([shard.chunks for shard in manifest.shards]).tolist()  # of each shard, plus one
        self._shard_ends = np.cumsum([shard.tokens for shard in manifest.shards]).tolist()
        self._item_bytes = ITEM_BYTES[manifest.dtype]
        self._any_id_fits = manifest.vocab_size == 1 << 8 * self._item_bytes
        self._tokens, self._dtype, self._vocab_size = manifest.tokens, np.dtype(manifest.dtype), manifest.vocab_size
        self._fresh()

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        verify: Literal["auto", "full", "size"] = "auto",
        *,
        tolerate: int = 0,
        cache: Optional[CacheOptions] = None,
    ) -> ShardSet:
        """Open a set after checking it.

        `size` checks the manifest, the file sizes, the index and the tokenizer; `full` also hashes every tar; `auto` is `full`
        below 2 GiB in total and else reads the first and last token headers of each tar. Up to `tolerate` shards may be
        missing, cut or changed: they are in `bad`, and reading them raises ShardError. At an address (https, s3, gs) a shard is
        hashed when it comes into the `cache`, so nothing of the shards is read here unless verify is `full`.

        Raises InputError, one line that names the file, for anything else missing, cut short, changed or inconsistent.
        """
        if verify not in ("auto", "full", "size"):
            raise InputError(f"verify: {verify!r} is unknown; allowed are auto, full and size")
        name = os.fspath(location)
        if "://" in name:
            from data.remote import local_path, open_remote  # what it needs is loaded only for an address

            if not name.startswith("file://"):
                remote = open_remote(name, cache)
                manifest, index = remote.manifest, read_set_index(remote.folder, remote.manifest, full=True)
                bad = remote.shards.fetch_all() if verify == "full" else {}
                _refuse_more_than(tolerate, bad, remote.shards)
                return cls(remote.location, remote.folder, manifest, index, remote.shards, bad)
            name = local_path(name)
        folder = Path(name)
        manifest = read_manifest(folder)
        check_counts(folder / MANIFEST_FILE, manifest)
        depth: Depth
        if verify == "auto":
            depth = "full" if sum(shard.bytes for shard in manifest.shards) < FULL_CHECK_BYTES else "headers"
        else:
            depth = verify
        check_tokenizer(folder, manifest)
        index = read_set_index(folder, manifest, full=depth != "size")
        stamps, bad = check_shards(folder, manifest, index, depth)
        source = FolderShards(folder, manifest.shards, stamps)
        _refuse_more_than(tolerate, bad, source)
        return cls(name, folder, manifest, index, source, bad)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    @property
    def special(self) -> SpecialIds:
        return self.manifest.special

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def documents(self) -> int:
        return self.manifest.documents

    @property
    def utf8_bytes(self) -> int:
        return self.manifest.utf8_bytes

    @property
    def row_tokens(self) -> int:
        """No document crosses a multiple of it; 0: documents lie end to end."""
        return self.manifest.row_tokens

    @property
    def has_spans(self) -> bool:
        return self.manifest.spans > 0

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        return self.manifest.shards

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / self.manifest.tokenizer_file

    def read_tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the whole set, 1-D in the set's dtype.

        Raises IndexError for a range outside [0, tokens), and ShardError naming shard and chunk when the file cannot be read,
        ends early, or holds an id outside the vocabulary.
        """
        out = np.empty(max(count, 0), dtype=self._dtype)
        files = self._open_files()
        for chunk, inside, part_count, at in self._parts(start, count):
            part = out if part_count == count else out[at : at + part_count]
            shard = bisect.bisect_right(self._chunk_ends, chunk)
            if shard in self.bad:
                raise self._bad(shard)
            offset = int(self._offsets[chunk]) + inside * self._item_bytes
            files.read(shard, part.view(np.uint8).data, offset)
            if not self._any_id_fits and int(part.max()) >= self._vocab_size:
                raise self._fault(
                    chunk, f"holds the token id {int(part.max())}, outside the vocabulary of {self._vocab_size}"
                )
        return out

    def read_pieces(self, start: int, count: int) -> np.ndarray:
        """int64 [n]: positions in [0, count), ascending, at which a piece (document) begins in [start, start + count).

        Raises as read_tokens.
        """
        found = []
        for part in self._parts(start, count):
            begins = self._layout(part.chunk).begins
            first, last = begins.searchsorted((part.inside, part.inside + part.tokens))
            found.append(begins[first:last] + (part.at - part.inside))
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.int64), *found])

    def read_spans(self, start: int, count: int) -> np.ndarray:
        """int32 [k, 3]: (start, length, kind) of the spans in [start, start + count), clipped to it; starts count from `start`.

        Raises as read_tokens.
        """
        found = [NO_SPANS]
        for part in self._parts(start, count):
            if self._spans[part.chunk]:
                spans = clip_spans(self._layout(part.chunk).spans, part.inside, part.tokens)
                spans[:, 0] += part.at
                found.append(spans)
        return np.concatenate(found)

    def read_meta(self, chunk: int) -> list[Optional[dict[str, Any]]]:
        """What is known about each piece of a chunk (numbered through the set): an object, or None. Raises as read_tokens."""
        if not 0 <= chunk < self.manifest.chunks:
            raise IndexError(f"chunk {chunk} is outside [0, {self.manifest.chunks}) of {self.location}")
        pieces, shard = int(self._pieces[chunk]), bisect.bisect_right(self._chunk_ends, chunk)
        at = self._payloads(chunk).end
        limit = self.shards[shard].bytes
        if chunk + 1 < self._chunk_ends[shard]:
            limit = int(self._offsets[chunk + 1])
        if at + TAR_BLOCK > limit:
            return [None] * pieces
        header = self._read_bytes(shard, at, TAR_BLOCK)
        if not header.strip(b"\0"):
            return [None] * pieces
        try:
            member = read_member(bytes(header))
            if not member.name.endswith(".meta.json"):
                return [None] * pieces
            if member.fault or at + TAR_BLOCK + member.size > limit:
                raise ValueError("its header cannot be right")
            meta = json.loads(self._read_bytes(shard, at + TAR_BLOCK, member.size))
            if (
                not isinstance(meta, list)
                or len(meta) != pieces
                or any(type(m) not in (dict, type(None)) for m in meta)
            ):
                raise ValueError(f"not a list of {pieces} objects")
        except ShardError:
            raise
        except (ValueError, RecursionError) as error:
            raise self._fault(chunk, f"has an unusable .meta.json ({error!s:.60})") from error
        return meta

    def shards_of(self, start: int, count: int) -> list[int]:
        """Numbers of the shards in which tokens [start, start + count) lie, ascending."""
        self._check_range(start, count)
        if count == 0:
            return []
        first = bisect.bisect_right(self._shard_ends, start)
        return list(range(first, bisect.bisect_right(self._shard_ends, start + count - 1) + 1))

    def chunk_ranges(self, chunks: Sequence[int]) -> list[tuple[int, int]]:
        """(first token, tokens) of each of these chunks."""
        return [(int(self._starts[chunk]), self._chunk_tokens(chunk)) for chunk in chunks]

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to bring these shards here in the background, in this order; nothing to do for a folder."""
        ahead = getattr(self._source, "prefetch", None)
        if ahead:
            ahead([shard for shard in shards if shard not in self.bad])

    def close(self) -> None:
        """Close the files this process has open; reading opens them again."""
        self._fresh()

    def __getstate__(self) -> dict[str, Any]:
        names = ("location", "folder", "manifest", "bad")
        return {name: getattr(self, name) for name in names} | {"source": self._source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path = state["folder"] / INDEX_FILE
        try:
            index = map_index(path, state["manifest"].chunks)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: the index cannot be mapped again ({error!s:.80}); {REMEDY}") from error
        self.__init__(index=index, **state)  # type: ignore[misc]

    def _fresh(self) -> None:
        self._files = OpenShards(self._source, getattr(self._source, "open_files", OPEN_FILES))
        self._layouts = LayoutCache(LAYOUT_BYTES)

    def _open_files(self) -> OpenShards:
        if self._files.process != os.getpid():  # after a fork another thread may have left the locks taken
            self._fresh()
        return self._files

    def _check_range(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self._tokens:
            raise IndexError(f"tokens [{start}, {start + count}) are outside [0, {self._tokens}) of {self.location}")

    def _parts(self, start: int, count: int) -> list[_Part]:
        """The chunks that hold tokens [start, start + count), in order."""
        self._check_range(start, count)
        if count == 0:
            return []
        chunk = int(self._starts.searchsorted(start, "right")) - 1
        inside = start - int(self._starts[chunk])
        part = min(count, self._chunk_tokens(chunk) - inside)
        parts = [_Part(chunk, inside, part, 0)]
        while part < count:
            chunk += 1
            more = min(count - part, self._chunk_tokens(chunk))
            parts.append(_Part(chunk, 0, more, part))
            part += more
        return parts

    def _chunk_tokens(self, chunk: int) -> int:
        after = self._starts[chunk + 1] if chunk + 1 < len(self._starts) else self._tokens
        return int(after - self._starts[chunk])

    def _payloads(self, chunk: int):
        return payloads(
            int(self._offsets[chunk]),
            self._chunk_tokens(chunk),
            int(self._pieces[chunk]),
            int(self._spans[chunk]),
            self.manifest.dtype,
        )

    def _layout(self, chunk: int) -> ChunkLayout:
        self._open_files()
        layout = self._layouts.get(chunk)
        if layout is None:
            shard = bisect.bisect_right(self._chunk_ends, chunk)
            pieces, spans, places = int(self._pieces[chunk]), int(self._spans[chunk]), self._payloads(chunk)
            size = places.spans - places.lengths + 12 * spans if spans else 4 * pieces
            content = self._read_bytes(shard, places.lengths, size)
            try:
                layout = parse_layout(content, places, self._chunk_tokens(chunk), pieces, spans)
            except ValueError as error:
                raise self._fault(chunk, str(error)) from error
            self._layouts.put(chunk, layout)
        return layout

    def _read_bytes(self, shard: int, offset: int, size: int) -> bytearray:
        if shard in self.bad:
            raise self._bad(shard)
        content = bytearray(size)
        self._open_files().read(shard, memoryview(content), offset)
        return content

    def _bad(self, shard: int) -> ShardError:
        return shard_error(self._source, shard, self.bad[shard])

    def _fault(self, chunk: int, what: str) -> ShardError:
        shard = bisect.bisect_right(self._chunk_ends, chunk)
        inside = chunk - (self._chunk_ends[shard - 1] if shard else 0)
        return shard_error(self._source, shard, f"chunk {inside} {what}")


def _refuse_more_than(tolerate: int, bad: dict[int, str], source: ShardSource) -> None:
    if len(bad) <= tolerate:
        return
    named = "; ".join(f"{source.where(shard)}: {bad[shard]}" for shard in list(bad)[:NAMED_FAULTS])
    more = f" and {len(bad) - NAMED_FAULTS} more shards" if len(bad) > NAMED_FAULTS else ""
    allowed = f" ({len(bad)} bad shards, {tolerate} are tolerated)" if tolerate else ""
    raise InputError(f"{named}{more}{allowed}; {REMEDY}")
