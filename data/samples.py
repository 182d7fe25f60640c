"""What the stages work on: a dict for each sample, from the blocks of a stream or the chunks of a plain webdataset pipeline.

sample_id  int, every draw depends on it            tokens   [L], uint16 or uint32
length     tokens after it are padding              prompt   [L] bool, shown clean and without loss (absent: none)
borders    [L] bool, where documents that do not see each other begin (absent: one text)
source     int, which source of a mixture           bad_shard   int, only where nothing could be read
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from torch.utils.data import get_worker_info

from data.chunk_index import PADDING
from data.errors import InputError, ShardError
from data.shard_writer import clip_spans
from data.stream import NO_SPANS, Block


class Blocks(Protocol):
    """Numbered blocks of tokens (data.stream, data.mixture)."""

    sequence_length: int

    def block(self, g: int) -> Block: ...

    def source(self, g: int) -> tuple[int, int]: ...


class BlockReader:
    """First stage of training: yields the sample of each global sample index that `indices(worker, workers)` names.

    skip_bad_shards: a block that cannot be read comes as a sample in which nothing counts, not as an error.
    """

    def __init__(
        self,
        blocks: Blocks,
        indices: Callable[[int, int], Iterable[int]],
        *,
        isolate: bool = False,
        eos_in_loss: bool = False,
        skip_bad_shards: bool = False,
    ):
        self.blocks, self.indices = blocks, indices
        self.isolate, self.eos_in_loss, self.skip_bad_shards = isolate, eos_in_loss, skip_bad_shards

    def __call__(self) -> Iterator[dict]:
        worker = get_worker_info()
        size = self.blocks.sequence_length
        for g in self.indices(*((worker.id, worker.num_workers) if worker else (0, 1))):
            try:
                sample = sample_of(g, self.blocks.block(g), size, self.isolate, self.eos_in_loss)
            except ShardError as error:
                if not self.skip_bad_shards or _disk_is_full(error):
                    raise
                nothing = np.zeros(size, np.uint16)
                source, _ = self.blocks.source(g)
                sample = {"sample_id": g, "tokens": nothing, "length": 0, "source": source, "bad_shard": error.shard}
            yield {"__key__": f"{g:012d}", **sample}


def _disk_is_full(error: BaseException) -> bool:
    """Whether it failed for want of space here (a cache): that says nothing about the shard."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def sample_of(sample_id: int, block: Block, size: int, isolate: bool = False, eos_in_loss: bool = False) -> dict:
    """The sample of one block, `size` tokens long; a shorter block is padded.

    eos_in_loss: padding at the end of a row is text like any other and belongs to the document before it (LLaDA's SFT: the model
    learns to end); else it is neither seen nor counted.
    """
    tokens, length = block.tokens, len(block.tokens)
    if length < size:
        tokens = np.concatenate([tokens, np.zeros(size - length, tokens.dtype)])
    elif not tokens.flags.writeable:
        tokens = tokens.copy()
    sample: dict[str, Any] = {"sample_id": sample_id, "tokens": tokens, "length": length, "source": block.source}
    padding = 0
    if len(block.spans):
        prompt, padded = np.zeros(size, bool), np.zeros(size, bool)
        for start, count, kind in block.spans.tolist():
            (padded if kind == PADDING else prompt)[start : start + count] = True
        sample["prompt"], padding = prompt, int(padded.sum())
        if padding and not padded[length - padding : length].all():
            raise InputError(
                f"sample {sample_id}: padding in the middle of a sample: rows of whole documents need a sequence length that is "
                "the rows' (row_tokens in manifest.json)"
            )
    if not eos_in_loss:
        sample["length"] -= padding
    if isolate:
        borders = np.zeros(size, bool)
        borders[block.borders] = True
        if eos_in_loss and padding < length:
            borders[length - padding : length] = False
        sample["borders"] = borders
    return sample


def blocks_of_chunks(
    samples: Iterable[dict],
    sequence_length: int,
    isolate: bool = False,
    eos_in_loss: bool = False,
    epoch: int = 0,
    name: str = "",
) -> Iterator[dict]:
    """A stage for plain `webdataset.WebDataset(tars).decode()`: cuts each chunk of a tar into samples of `sequence_length` tokens.

    The last one of a chunk is shorter. Sample ids follow from `name` (tell sets apart by it), `epoch` (count it, else masks
    repeat) and the chunk's key, so draws do not depend on the order of reading; with them noise levels are independent
    (t_sampling `iid`). A set of rows needs its own row_tokens as `sequence_length`.
    """
    for chunk in samples:
        tokens, spans = chunk["tok.npy"], chunk.get("spans.npy", NO_SPANS)
        starts = np.cumsum(chunk["lens.npy"]) - chunk["lens.npy"]
        for first in range(0, len(tokens), sequence_length):
            part = tokens[first : first + sequence_length]
            inside = starts[(starts >= first) & (starts < first + len(part))] - first
            key = f"{chunk['__key__']}/{first}"
            digest = hashlib.blake2b(f"{name}/{epoch}/{key}".encode(), digest_size=8).digest()
            block = Block(part, inside, clip_spans(spans, first, len(part)))
            sample_id = int.from_bytes(digest, "little") >> 1
            yield {"__key__": key, **sample_of(sample_id, block, sequence_length, isolate, eos_in_loss)}
