"""What opening a very large shard set costs: time, memory of each process, the first read.

    python bench/index.py                       # 1,000,000 chunks, 64 G tokens, as 15,625 tars and as 1,000
    python bench/index.py --chunks 35000000 --shards 1000

The tars are sparse: only the headers that `verify auto` reads and one chunk are real. Index and manifest are real. Each row is
two processes on one host that open the set at the same time and read a block at a random place; memory is what the kernel
says (/proc/self/smaps_rollup): `private` belongs to a process alone, `Pss` also counts its share of what both have mapped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.chunk_index import ROWS, npy_bytes, payloads  # noqa: E402
from data.manifest import INDEX_FILE, MANIFEST_FILE, TOKENIZER_FILE, TOTALS, Manifest, ShardEntry, SpecialIds  # noqa: E402
from data.shard_writer import TAR_RECORD, member_header, token_member_bytes  # noqa: E402

CHUNK_TOKENS, PIECES = 64_000, 128
BLOCK = 4096


def build(folder: Path, chunks: int, shards: int) -> None:
    """Writes the set: `chunks` chunks of 64,000 tokens in `shards` tars."""
    tokens_npy = npy_bytes(np.zeros(CHUNK_TOKENS, "<u2"))[:128]
    lengths_npy = npy_bytes(np.full(PIECES, CHUNK_TOKENS // PIECES, "<i4"))
    first = payloads(640, CHUNK_TOKENS, PIECES, 0, "uint16")
    chunk_bytes = first.end - 0
    counts = np.diff(np.linspace(0, chunks, shards + 1).astype(int))
    index = np.empty((len(ROWS), chunks), "<i8")
    index[0] = np.arange(chunks) * CHUNK_TOKENS
    index[1] = np.concatenate([np.arange(n) * chunk_bytes for n in counts]) + 640
    index[2:] = np.array([PIECES, 1, 0, 0])[:, None]
    content = npy_bytes(index)
    (folder / INDEX_FILE).write_bytes(content)
    (folder / TOKENIZER_FILE).write_bytes(b"{}")
    entries = []
    for number, n in enumerate(counts.tolist()):
        size = n * chunk_bytes + 1024
        size += -size % TAR_RECORD
        name = f"shard-{number:06d}"
        with open(folder / f"{name}.tar", "wb") as file:
            os.truncate(file.fileno(), size)
            for chunk in {0, n - 1}:
                key = f"{number:06d}-{chunk:06d}"
                head = member_header(f"{key}.tok.npy", token_member_bytes(CHUNK_TOKENS, "uint16")) + tokens_npy
                os.pwrite(file.fileno(), head, chunk * chunk_bytes)
                lengths = member_header(f"{key}.lens.npy", len(lengths_npy)) + lengths_npy
                os.pwrite(file.fileno(), lengths, chunk * chunk_bytes + first.lengths - 640)
        sha = hashlib.sha256(name.encode()).hexdigest()  # nobody reads 128 GB of zeros to compare it
        entry = dict.fromkeys([field.name for field in dataclasses.fields(ShardEntry)], 0)
        entry |= {"file": f"{name}.tar", "bytes": size, "sha256": sha, "index_sha256": sha, "tokens": n * CHUNK_TOKENS}
        entries.append(ShardEntry(**entry | {"documents": n, "utf8_bytes": n * CHUNK_TOKENS * 4, "chunks": n}))  # type: ignore[arg-type]
    manifest = Manifest(
        dtype="uint16",
        vocab_size=50_000,
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
        index_sha256=hashlib.sha256(content).hexdigest(),
        special=SpecialIds(mask=2, eos=1, pad=1),
        chunk_tokens=CHUNK_TOKENS,
        row_tokens=0,
        shards=tuple(entries),
        sources=(),
        prepared_with={},
        **{total: sum(getattr(entry, total) for entry in entries) for total in TOTALS},
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())


def memory() -> dict[str, float]:
    """Megabytes of this process, from the kernel's own account of its pages."""
    fields: dict[str, float] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes = line.split()[:2]
        fields[name.rstrip(":")] = int(kilobytes) / 1000
    private = fields["Private_Clean"] + fields["Private_Dirty"]
    return {"private": private, "pss": fields["Pss"], "rss": fields["Rss"]}


def measure(folder: str, verify: str) -> None:
    """One process: open, read a block twice, say so, and wait for a line before the memory is counted."""
    from data.shard_set import ShardSet

    before = memory()
    begun = time.perf_counter()
    shards = ShardSet.open(folder, verify)  # type: ignore[arg-type]
    opened = time.perf_counter()
    start = (shards.manifest.chunks - 1) * CHUNK_TOKENS + 5000
    shards.read_tokens(start, BLOCK), shards.read_pieces(start, BLOCK)
    first = time.perf_counter()
    starts = np.random.default_rng(0).integers(0, shards.tokens - BLOCK, 1000).tolist()
    for start in starts:  # so that the file system has the bytes at hand
        shards.read_tokens(start, BLOCK)
    again = time.process_time()
    for start in starts:
        shards.read_tokens(start, BLOCK)
    later = (time.process_time() - again) / len(starts)
    print("ready", flush=True)
    sys.stdin.readline()
    after = memory()
    seconds = {"open": opened - begun, "first": first - opened, "random": later}
    print(json.dumps(seconds | {"before": before, "after": after}), flush=True)
    sys.stdin.readline()


def two_processes(folder: Path, verify: str) -> list[dict]:
    command = [sys.executable, __file__, "--measure", str(folder), "--verify", verify]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = []
    for process in both:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin and process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        found.append(json.loads(process.stdout.readline()))
    for process in both:
        process.communicate("\n", timeout=60)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, nargs="+", default=[15_625, 1_000])
    parser.add_argument("--folder", help="where to build the sets (default: a temporary folder)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--verify", default="size", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.verify)
    print("| chunks | tars | verify | open s | first read ms | later reads cpu us | private MB | Pss MB | both MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shards in options.shards:
        folder = Path(tempfile.mkdtemp(prefix="index-", dir=options.folder))
        try:
            build(folder, options.chunks, shards)
            for verify in ("size", "auto"):
                runs = two_processes(folder, verify)
                worst = max(runs, key=lambda run: run["open"])
                base = runs[0]["before"]["private"]
                both = sum(run["after"]["pss"] for run in runs)
                print(
                    f"| {options.chunks:,} | {shards:,} | {verify} | {worst['open']:.2f} | {1e3 * worst['first']:.2f}"
                    f" | {1e6 * worst['random']:.0f} | {worst['after']['private']:.0f} (before: {base:.0f})"
                    f" | {worst['after']['pss']:.0f} | {both:.0f} |",
                    flush=True,
                )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
