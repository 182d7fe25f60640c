"""Encode batches of documents on several processes, giving results back in the order of the batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Optional, TypeVar

from data.document import Segment
from data.encoding import Encoded, Limit, encode_documents
from data.manifest import SpecialIds
from data.tokenizer import TextTokenizer, load_tokenizer

Label = TypeVar("Label")
IN_FLIGHT_CHARS = 64 << 20  # of text handed out and not taken back; a single larger document goes alone


# What each worker process has, set by _start_worker.
_tokenizer: Optional[TextTokenizer] = None
_limit: Optional[Limit] = None


def encode_in_order(
    batches: Iterable[tuple[Label, Sequence[Sequence[Segment]]]],
    tokenizer: TextTokenizer,
    processes: int,
    limit: Optional[Limit] = None,
) -> Generator[tuple[Label, list[Encoded]], None, None]:
    """Yield (label, documents) for each (label, segments of documents), in order.

    At most two batches per process are in memory, and fewer when they are large. One process works in place. Raises
    RuntimeError when a worker dies.
    """
    if processes == 1:
        for label, documents in batches:
            yield label, encode_documents(tokenizer, documents, limit)
        return
    pool = ProcessPoolExecutor(
        processes,
        # A fork would copy the tokenizer's threads in an unknown state.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.path, tokenizer.special, limit),
    )
    waiting: deque[tuple[Label, int, Future[list[Encoded]]]] = deque()
    in_flight = 0  # characters
    try:
        for label, documents in batches:
            size = sum(len(segment.text) for segments in documents for segment in segments)
            while waiting and (len(waiting) >= 2 * processes or in_flight + size > IN_FLIGHT_CHARS):
                done, freed, future = waiting.popleft()
                yield done, future.result()
                in_flight -= freed
            waiting.append((label, size, pool.submit(_encode_in_worker, documents)))
            in_flight += size
        while waiting:
            label, _, future = waiting.popleft()
            yield label, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "an encoding process died, perhaps for lack of memory; run the same command again, it goes on from the last"
            " finished shard (fewer --processes need less memory)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(tokenizer_path: Path, special: SpecialIds, limit: Optional[Limit]) -> None:
    global _tokenizer, _limit
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops the pool
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _tokenizer, _limit = load_tokenizer(tokenizer_path, special=special), limit


def _die_with_parent() -> None:
    """A pool's own queue does not tell workers that a killed parent is gone; without this they would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(documents: Sequence[Sequence[Segment]]) -> list[Encoded]:
    assert _tokenizer is not None, "_start_worker runs first"
    return encode_documents(_tokenizer, documents, _limit)
