"""The data path of training, end to end, as one webdataset pipeline:

    BlockReader -> [random_length] -> [prefix_condition] -> corruption -> cfg_dropout -> collate -> CompactBatch

The corruption is masking, or another objective's (data.corruption, data.flow).

Which samples a rank reads follows from (step, data-parallel rank) alone: step s owns samples [s B, (s + 1) B), rank r the
r-th contiguous slice of them, cut into microbatches. Workers deal out whole microbatches, so their number changes
nothing. The state of the stream is one integer: samples consumed.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Optional

import webdataset as wds
from torch.utils.data import DataLoader

from data import cfg_dropout as cfg
from data.batch import Kind
from data.compact import CompactBatch, collate
from data.corruption import no_corruption, uniform_corruption, with_first_tokens_given
from data.errors import InputError
from data.flow import FlowOptions, flow_corruption
from data.masking import MaskingOptions, masking, random_length
from data.samples import BlockReader, Blocks

BUNDLE_TOKENS = 1 << 17  # a worker ships microbatches of about so many tokens at once: each shipment has a price
WAIT_SECONDS = 600.0  # longest wait for a worker's next microbatch


@dataclass(frozen=True)
class Slice:
    """The samples of one data-parallel rank: which part of each global batch, in microbatches of which size."""

    global_batch: int
    micro_batch: int
    dp_rank: int = 0
    dp_size: int = 1

    @property
    def microbatches_per_step(self) -> int:
        return self.global_batch // self.dp_size // self.micro_batch

    def samples(self, microbatch: int) -> range:
        """Global sample indices of this rank's n-th microbatch since the start of training."""
        step, k = divmod(microbatch, self.microbatches_per_step)
        first = step * self.global_batch + self.dp_rank * (self.global_batch // self.dp_size) + k * self.micro_batch
        return range(first, first + self.micro_batch)


@dataclass(frozen=True)
class StageOptions:
    """The stages between the block reader and the batch.

    kind: the objective, whose corruption is used. shift: the first token of each text is given. vocab_size: ids that `uniform`
    corruption may give. isolate, eos_in_loss, skip_bad_shards: data.samples.
    """

    masking: MaskingOptions
    random_length_prob: float = 0.0
    cfg_dropout: float = 0.0
    cfg_condition: Optional[str] = None  # None, "prefix" or "spans"
    isolate: bool = False
    eos_in_loss: bool = False
    skip_bad_shards: bool = False
    kind: Kind = "masked"
    shift: bool = False
    vocab_size: int = 0
    flow: Optional[FlowOptions] = None


def corruption(options: StageOptions) -> Callable[[Iterable[dict]], Iterator[dict]]:
    """The stage that decides what the model sees and what counts in the loss. ValueError if it lacks an option."""
    if options.shift:
        return partial(with_first_tokens_given, corruption=corruption(replace(options, shift=False)))
    if options.kind == "autoregressive":
        return no_corruption
    if options.kind == "uniform":
        if options.vocab_size < 2:
            raise ValueError("uniform corruption needs vocab_size")
        return partial(uniform_corruption, options=options.masking, vocab_size=options.vocab_size)
    if options.kind == "flow":
        if options.flow is None:
            raise ValueError("flow corruption needs flow options")
        return partial(flow_corruption, options=options.masking, flow=options.flow)
    return partial(masking, options=options.masking)


def stages(options: StageOptions) -> list[Callable[[Iterable[dict]], Iterator[dict]]]:
    """The stages in order, each usable in any webdataset pipeline through `.compose(stage)`."""
    seed = options.masking.seed
    chain: list[Callable] = []
    if options.random_length_prob > 0:
        chain.append(partial(random_length, seed=seed, probability=options.random_length_prob))
    if options.cfg_dropout > 0 and options.cfg_condition == "prefix":
        chain.append(partial(cfg.prefix_condition, seed=seed))
    chain.append(corruption(options))
    chain.append(
        partial(cfg.cfg_dropout, seed=seed, rate=options.cfg_dropout) if options.cfg_dropout > 0 else cfg.no_dropout
    )
    return chain


@dataclass(frozen=True)
class _Fault:
    """An error on its way out of a worker: shipped as a value so that its one-line message arrives unwrapped."""

    message: str
    passing: bool


def _report_faults(batches: Iterable[CompactBatch]) -> Iterator[CompactBatch | _Fault]:
    try:
        yield from batches
    except InputError as error:
        yield _Fault(str(error), error.passing)


def _bundled(batches: Iterable[CompactBatch | _Fault], size: int) -> Iterator[list[CompactBatch | _Fault]]:
    """Lists of `size` batches, the last one perhaps shorter."""
    source = iter(batches)
    while bundle := list(itertools.islice(source, size)):
        yield bundle


def _training_indices(
    worker: int, workers: int, *, part: Slice, start: int, end: Optional[int], bundle: int
) -> Iterator[int]:
    """Bundles of microbatches are dealt out to the workers in turn."""
    for number in itertools.count(worker, workers):
        first = start + number * bundle
        if end is not None and first >= end:
            return
        for microbatch in range(first, first + bundle if end is None else min(first + bundle, end)):
            yield from part.samples(microbatch)


def _validation_indices(worker: int, workers: int, *, part: Slice, total: int) -> Iterator[int]:
    """Blocks 0 .. total - 1 once over all ranks: contiguous slices of whole microbatches, uneven slices allowed."""
    batches = -(-total // part.micro_batch)
    for k in range(part.dp_rank + worker * part.dp_size, batches, part.dp_size * workers):
        yield from range(k * part.micro_batch, min((k + 1) * part.micro_batch, total))


def _load(
    blocks: Blocks,
    indices: Callable,
    options: StageOptions,
    micro_batch: int,
    pad_id: int,
    workers: int = 0,
    bundle: int = 1,
) -> Iterator[CompactBatch]:
    pipeline = wds.DataPipeline(
        BlockReader(
            blocks,
            indices,
            isolate=options.isolate,
            eos_in_loss=options.eos_in_loss,
            skip_bad_shards=options.skip_bad_shards,
        ),
        *stages(options),
        partial(collate, size=micro_batch, pad_id=pad_id),
        _report_faults,
        partial(_bundled, size=bundle),
    )
    alive, held = multiprocessing.Pipe(duplex=False)
    loader = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        timeout=WAIT_SECONDS if workers else 0,
        worker_init_fn=partial(_end_with_parent, alive) if workers else None,
    )
    try:
        for batch in itertools.chain.from_iterable(loader):
            if isinstance(batch, _Fault):
                raise InputError(batch.message, passing=batch.passing)
            yield batch
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        raise InputError(
            f"data: the loader's workers gave nothing for {WAIT_SECONDS:.0f} s: the storage of the shards (or the way to it) is "
            "too slow or hangs; use more data.workers, a data.shuffle_window, or a copy nearer by",
            passing=True,
        ) from error
    finally:
        held.close()


def _end_with_parent(alive: Connection, worker: int) -> None:
    """Ends this worker when the process that it works for is gone, however that ended: nobody else would. Its parent is the server
    that it was forked from, which lives as long as the worker does.
    """

    def wait() -> None:
        with contextlib.suppress(OSError):
            alive.poll(None)  # nothing is ever sent: this is the end of the other side
        os._exit(0)

    threading.Thread(target=wait, name="parent watch", daemon=True).start()


def training_batches(
    blocks: Blocks,
    options: StageOptions,
    part: Slice,
    pad_id: int,
    *,
    consumed: int = 0,
    workers: int = 0,
    steps: Optional[int] = None,
) -> Iterator[list[CompactBatch]]:
    """This rank's microbatches, a list for each optimizer step, starting behind `consumed` samples (whole steps).

    Ends after `steps` steps if given. Raises InputError with the shard's name for data that cannot be read.
    """
    first_step, rest = divmod(consumed, part.global_batch)
    if rest:
        raise ValueError(f"{consumed} consumed samples are not whole steps of {part.global_batch}")
    per_step = part.microbatches_per_step
    start = first_step * per_step
    end = None if steps is None else start + steps * per_step
    bundle = max(1, BUNDLE_TOKENS // (part.micro_batch * blocks.sequence_length)) if workers else 1
    indices = partial(_training_indices, part=part, start=start, end=end, bundle=bundle)
    source = _load(blocks, indices, options, part.micro_batch, pad_id, workers, bundle)
    while group := list(itertools.islice(source, per_step)):
        yield group


def validation_batches(
    blocks: Blocks, total: int, options: StageOptions, part: Slice, pad_id: int
) -> Iterator[CompactBatch]:
    """Blocks 0 .. total - 1, each exactly once over all data-parallel ranks, with masks that depend on the block alone."""
    return _load(blocks, partial(_validation_indices, part=part, total=total), options, part.micro_batch, pad_id)
