"""Side by side: reading training tokens, ours and others, from the page cache; then our whole pipeline, stage by stage.

    python bench/data.py                                  # 64 M tokens in a temporary folder, about two minutes
    python bench/data.py --litdata .venv-litdata/bin/python   # with litdata, from an environment of its own (make bench-data)

`readers` delivers blocks of 4096 tokens at random places (whole chunks or documents where that is what a format has) and counts
tokens per cpu-second of the reading process. `pipeline` is our path from shards to the batch that a worker ships, in this
process, and through one and two worker processes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import webdataset as wds

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.tables import Table  # noqa: E402
from data.chunk_index import write_set_index  # noqa: E402
from data.loader import Slice, StageOptions, training_batches  # noqa: E402
from data.manifest import TOTALS, Manifest, SpecialIds  # noqa: E402
from data.masking import MaskingOptions  # noqa: E402
from data.shard_set import ShardSet  # noqa: E402
from data.shard_writer import ShardWriter  # noqa: E402
from data.stream import BlockStream  # noqa: E402

LENGTH, BATCH, MICRO = 4096, 128, 8
VOCAB = 32000
OURS = "palimpsest, any block of the set"
READERS = (
    OURS,
    "Megatron-style memmap, any block of the file",
    "litdata TokensLoader, shuffled",
    "webdataset on the same tars, chunk by chunk",
    "webdataset, one document a sample",
)


def documents(tokens: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Random ids in documents of 665 tokens at the median (a log-normal law), EOS at the end of each."""
    rng, total = np.random.default_rng(seed), 0
    while total < tokens:
        ids = rng.integers(2, VOCAB, int(rng.lognormal(6.5, 1)) + 2).astype(np.uint16)
        ids[-1] = 1
        total += len(ids)
        yield ids


def write_shards(folder: Path, tokens: int) -> None:
    folder.mkdir()
    writer = ShardWriter(folder, dtype="uint16", chunk_tokens=1 << 16, shard_tokens=1 << 22)
    for ids in documents(tokens):
        writer.add_document(ids, 4 * len(ids))
    entries = writer.close()
    tokenizer = b"{}"
    (folder / "tokenizer.json").write_bytes(tokenizer)
    manifest = Manifest(
        dtype="uint16", vocab_size=VOCAB, tokenizer_file="tokenizer.json",
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(), index_sha256=write_set_index(folder, entries),
        special=SpecialIds(0, 1, 1), chunk_tokens=1 << 16, row_tokens=0, shards=tuple(entries), sources=(), prepared_with={},
        **{total: sum(getattr(entry, total) for entry in entries) for total in TOTALS},
    )  # fmt: skip
    (folder / "manifest.json").write_bytes(manifest.to_bytes())


def write_document_tars(folder: Path, tokens: int) -> None:
    """What a vanilla webdataset user has: a sample for each document."""
    folder.mkdir()
    archive = None
    for number, ids in enumerate(documents(tokens)):
        if number % 20000 == 0:
            if archive:
                archive.close()
            archive = tarfile.open(folder / f"{number // 20000:04d}.tar", "w")
        buffer = io.BytesIO()
        np.save(buffer, ids)
        member = tarfile.TarInfo(f"{number:08d}.tok.npy")
        member.size = buffer.tell()
        buffer.seek(0)
        archive.addfile(member, buffer)
    archive.close()


def tars(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.tar"))


def read_ours(folder: Path, tokens: int) -> Iterator[np.ndarray]:
    stream = BlockStream(ShardSet.open(folder / "shards", "size"), LENGTH, 0)
    for g in range(tokens // LENGTH):
        yield stream.block(g).tokens


def read_memmap(folder: Path, tokens: int) -> Iterator[np.ndarray]:
    """One flat file and a shuffled table of block numbers, as Megatron's indexed datasets read."""
    flat = np.memmap(folder / "flat.bin", np.uint16, "r")
    order = np.random.default_rng(0).permutation(len(flat) // LENGTH)
    for number in order[: tokens // LENGTH]:
        yield np.array(flat[number * LENGTH : (number + 1) * LENGTH])


def read_samples(folder: Path, tokens: int, name: str) -> Iterator[np.ndarray]:
    total = 0
    for sample in wds.WebDataset(tars(folder / name), shardshuffle=False).decode():
        yield sample["tok.npy"]
        total += len(sample["tok.npy"])
        if total >= tokens:
            return


def timed(read: Callable[[], Iterator[np.ndarray]], rounds: int) -> tuple[float, float]:
    """(tokens per cpu-second, tokens/s), the best of some rounds: others share this machine. Counted from the first delivery on."""
    best_cpu = best_wall = 0.0
    for _ in range(rounds + 1):  # the first one warms caches
        source, count = read(), 0
        next(source)  # opens files, starts worker processes
        cpu, wall = time.process_time(), time.perf_counter()
        for tokens in source:
            count += len(tokens)
        best_cpu = max(best_cpu, count / (time.process_time() - cpu))
        best_wall = max(best_wall, count / (time.perf_counter() - wall))
    return best_cpu, best_wall


def bytes_of(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def readers(folder: Path, tokens: int, rounds: int, litdata: str) -> Table:
    table = Table.planned(
        "readers", f"Reading {tokens / 1e6:.0f} M tokens", ("Mtokens/cpu-s", "Mtokens/s", "x ours", "bytes a token"),
        list(READERS), "best of the rounds; one process; files in the page cache; x ours: tokens per cpu-second over ours",
    )  # fmt: skip
    contenders = {
        OURS: (partial(read_ours, folder, tokens), "shards"),
        READERS[1]: (partial(read_memmap, folder, tokens), "flat.bin"),
        READERS[3]: (partial(read_samples, folder, tokens, "shards"), "shards"),
        READERS[4]: (partial(read_samples, folder, tokens // 8, "documents"), "documents"),
    }
    held = ShardSet.open(folder / "shards", "size").tokens
    ours = 0.0
    for label, (read, where) in contenders.items():
        print(f"{label} ...", file=sys.stderr, flush=True)
        cpu, wall = timed(read, rounds)
        ours = ours or cpu
        table.fill(label, row(cpu, wall, ours, bytes_of(folder / where) / held))
    if not litdata:
        table.refuse(READERS[2], "not run: --litdata names no Python that has it (make bench-data makes one)")
        return table
    command = [litdata, str(ROOT / "bench" / "data_litdata.py"), str(folder), str(tokens), str(rounds), str(LENGTH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        table.refuse(READERS[2], f"failed: {(done.stderr.strip().splitlines() or ['no word'])[-1][:200]}")
    else:
        found = json.loads(done.stdout.strip().splitlines()[-1])
        table.fill(READERS[2], row(found["cpu"], found["wall"], ours, found["bytes"] / held))
    return table


def row(cpu: float, wall: float, ours: float, size: float) -> dict[str, float | str]:
    return {
        "Mtokens/cpu-s": f"{cpu / 1e6:.1f}",
        "Mtokens/s": f"{wall / 1e6:.1f}",
        "x ours": cpu / ours,
        "bytes a token": f"{size:.2f}",
    }


def pipeline(folder: Path, tokens: int, rounds: int) -> Table:
    masked = MaskingOptions(0, BATCH)
    everything = dict(random_length_prob=0.01, cfg_dropout=0.1, cfg_condition="prefix")
    rows = {
        "blocks alone": None,
        "masking, collation": (StageOptions(masked), 0),
        "fixed-count masking, collation": (StageOptions(MaskingOptions(0, BATCH, masking="fixed_count")), 0),
        "random length, masking, CFG dropout, collation": (StageOptions(masked, **everything), 0),
        "the same, documents isolated": (StageOptions(masked, isolate=True, **everything), 0),
        "the same, from 1 worker process": (StageOptions(masked, isolate=True, **everything), 1),
        "the same, from 2 worker processes": (StageOptions(masked, isolate=True, **everything), 2),
    }
    table = Table.planned(
        "pipeline", f"From shards to batches of {MICRO} x {LENGTH}", ("Mtokens/cpu-s", "Mtokens/s"), list(rows),
        "Mtokens/cpu-s: of the process that works (not with worker processes); Mtokens/s: as the training process receives them",
    )  # fmt: skip
    shards = ShardSet.open(folder / "shards", "size")
    steps = tokens // LENGTH // BATCH

    def batches(options: StageOptions, workers: int) -> Iterator[np.ndarray]:
        stream = BlockStream(shards, LENGTH, 0, borders=options.isolate)
        source = training_batches(stream, options, Slice(BATCH, MICRO), 1, workers=workers, steps=steps)
        for group in source:
            for compact in group:
                yield compact.tokens.reshape(-1)

    for label, case in rows.items():
        print(f"{label} ...", file=sys.stderr, flush=True)
        cpu, wall = timed(partial(batches, *case) if case else partial(read_ours, folder, tokens), rounds)
        workers = bool(case and case[1])
        table.fill(label, {"Mtokens/cpu-s": "-" if workers else f"{cpu / 1e6:.1f}", "Mtokens/s": f"{wall / 1e6:.1f}"})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64_000_000, help="tokens to write and to read")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the best counts")
    parser.add_argument("--litdata", default="", help="a Python that has litdata")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("writing ...", file=sys.stderr, flush=True)
        write_shards(folder / "shards", options.tokens)
        write_document_tars(folder / "documents", options.tokens)
        np.concatenate(list(documents(options.tokens))).tofile(folder / "flat.bin")
        for table in (
            readers(folder, options.tokens, options.rounds, options.litdata),
            pipeline(folder, options.tokens, options.rounds),
        ):
            print(table.markdown(), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
