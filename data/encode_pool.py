"""Encode batches of texts on several processes, giving results back in the order of the batches."""

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
from typing import TypeVar

import numpy as np

from data.manifest import SpecialIds, token_dtype
from data.tokenizer import TextTokenizer, load_tokenizer

Label = TypeVar("Label")
_tokenizer: TextTokenizer | None = None  # one for each worker process, set by _start_worker


def encode_documents(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text with EOS at the end, in the narrowest type that holds the vocabulary."""
    dtype = token_dtype(tokenizer.vocab_size)
    eos = np.array([tokenizer.special.eos], dtype=dtype)
    return [np.concatenate([ids.astype(dtype), eos]) for ids in tokenizer.encode_batch(texts)]


def encode_in_order(
    batches: Iterable[tuple[Label, Sequence[str]]], tokenizer: TextTokenizer, processes: int
) -> Generator[tuple[Label, list[np.ndarray]], None, None]:
    """Yield (label, documents) for each (label, texts), in order, with at most two batches per process in memory.

    One process works in place. Raises RuntimeError when a worker dies.
    """
    if processes == 1:
        for label, texts in batches:
            yield label, encode_documents(tokenizer, texts)
        return
    pool = ProcessPoolExecutor(
        processes,
        # A fork would copy the tokenizer's threads in an unknown state.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.path, tokenizer.special),
    )
    waiting: deque[tuple[Label, Future[list[np.ndarray]]]] = deque()
    try:
        for label, texts in batches:
            waiting.append((label, pool.submit(_encode_in_worker, list(texts))))
            if len(waiting) > 2 * processes:
                label, future = waiting.popleft()
                yield label, future.result()
        while waiting:
            label, future = waiting.popleft()
            yield label, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "an encoding process died, perhaps for lack of memory; run the same command again, it goes on from the last"
            " finished shard (fewer --processes need less memory)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(tokenizer_path: Path, special: SpecialIds) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops the pool
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _tokenizer = load_tokenizer(tokenizer_path, special=special)


def _die_with_parent() -> None:
    """A pool's own queue does not tell workers that a killed parent is gone; without this they would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    assert _tokenizer is not None, "_start_worker runs first"
    return encode_documents(_tokenizer, texts)
