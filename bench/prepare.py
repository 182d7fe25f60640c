"""How much of `prepare` is the tokenizer's own work: python bench/prepare.py [--megabytes 30] [--tokenizer FILE]

One core, one process, the same text: first the tokenizer alone on texts that lie in memory, then the whole of `prepare` from
a .jsonl file to published shards. Rounds alternate, each in a process of its own; figures are medians, and megabytes of UTF-8
per second of processor time, which other work on the machine disturbs least. Peak memory is of that process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.prepare import BATCH_BYTES, PrepareOptions, prepare  # noqa: E402
from data.sources import iter_documents  # noqa: E402
from data.tokenizer import load_tokenizer, prepare_tokenizer  # noqa: E402
from data.tokenizer_training import even_sample  # noqa: E402


def write_corpus(path: Path, size: int) -> None:
    """The standard library's sources, again and again, one a line, until there are `size` bytes of text."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            for document in iter_documents("stdlib"):
                file.write(json.dumps({"text": document.text}) + "\n")
                written += len(document.text.encode())
                if written >= size:
                    return


def tokenizer_alone(corpus: Path, tokenizer_path: Path) -> dict[str, float]:
    """encode_batch and nothing else, in batches as large as prepare's."""
    tokenizer = load_tokenizer(tokenizer_path)
    batches: list[list[str]] = [[]]
    size = batch = 0
    for document in iter_documents([corpus]):
        batches[-1].append(document.text)
        size, batch = size + len(document.text.encode()), batch + len(document.text.encode())
        if batch >= BATCH_BYTES:
            batches.append([])
            batch = 0
    wall, cpu = time.monotonic(), time.process_time()
    for texts in batches:
        tokenizer.encode_batch(texts)
    return {"megabytes": size / 1e6, "wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}


def whole_prepare(corpus: Path, tokenizer_path: Path, out: Path) -> dict[str, float]:
    report = prepare(
        PrepareOptions(out=str(out), inputs=[str(corpus)], tokenizer=str(tokenizer_path), processes=1), progress=False
    )
    size = sum(one.utf8_bytes for one in report.sets.values())
    reading, encoding = report.times["reading"], report.times["encoding"]
    return {"megabytes": size / 1e6, "wall": encoding.wall, "cpu": encoding.cpu, "survey": reading.cpu}


def round_of(what: str, corpus: Path, tokenizer_path: Path) -> dict[str, float]:
    """One measurement in a fresh process, which encodes on one thread."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", what, str(corpus), str(tokenizer_path)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=30, help="of text, the standard library's sources")
    parser.add_argument("--tokenizer", help="any kind that prepare takes; left out, a BPE of 32768 entries is trained")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as folder:
        if options.measure:
            what, corpus, tokenizer_path = options.measure[0], Path(options.measure[1]), Path(options.measure[2])
            found = (
                tokenizer_alone(corpus, tokenizer_path)
                if what == "tokenizer"
                else whole_prepare(corpus, tokenizer_path, Path(folder, "out"))
            )
            found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
            print(json.dumps(found))
            return
        corpus, tokenizer_path = Path(folder, "corpus.jsonl"), Path(folder, "tokenizer.json")
        write_corpus(corpus, int(options.megabytes * 1e6))
        texts = (document.text for document in iter_documents([corpus]))
        sample = even_sample(texts, int(options.megabytes * 1e6), 10_000_000)
        tokenizer = prepare_tokenizer(tokenizer_path, options.tokenizer, texts=sample)
        rounds: dict[str, list[dict[str, float]]] = {"tokenizer": [], "prepare": []}
        for _ in range(options.rounds):
            for what, found in rounds.items():
                found.append(round_of(what, corpus, tokenizer_path))
        kind = type(tokenizer.backend).__name__
    table(rounds, f"{options.megabytes:g} MB of text, {kind} of {tokenizer.vocab_size:,} entries")


def table(rounds: dict[str, list[dict[str, float]]], title: str) -> None:
    def median(what: str, value: str) -> float:
        return statistics.median(found[value] for found in rounds[what])

    def rates(value: str) -> dict[str, list[float]]:
        return {what: [found["megabytes"] / found[value] for found in rows] for what, rows in rounds.items()}

    cpu, wall = rates("cpu"), rates("wall")
    survey = [found["megabytes"] / found["survey"] for found in rounds["prepare"]]
    both = [1 / (1 / encoding + 1 / reading) for encoding, reading in zip(cpu["prepare"], survey, strict=True)]

    def row(label: str, per_cpu: list[float], share: str = "", per_second: str = "", peak: str = "") -> None:
        print(f"| {label:<26} | {statistics.median(per_cpu):<17.2f} | {share:<18} | {per_second:<5} | {peak:<7} |")

    def share(per_cpu: list[float]) -> str:
        """Of each round, because what else the machine does changes from round to round."""
        of = [ours / alone for ours, alone in zip(per_cpu, cpu["tokenizer"], strict=True)]
        return f"{statistics.median(of):.0%} ({min(of):.0%}-{max(of):.0%})"

    print(f"{title}; medians (least-most) of {len(survey)} rounds\n")
    print("|                            | MB per cpu second | of the tokenizer's | MB/s  | peak MB |")
    print("| -------------------------- | ----------------- | ------------------ | ----- | ------- |")
    for what, label in (("tokenizer", "the tokenizer alone"), ("prepare", "prepare, encoding")):
        per_second = f"{statistics.median(wall[what]):.2f}"
        row(label, cpu[what], share(cpu[what]), per_second, f"{median(what, 'peak'):.0f}")
    row("prepare, survey", survey)
    row("prepare, survey + encoding", both, share(both))


if __name__ == "__main__":
    main()
