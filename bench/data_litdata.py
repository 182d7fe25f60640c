"""litdata's side of bench/data.py, run by a Python that has it: FOLDER TOKENS ROUNDS LENGTH -> one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from litdata import StreamingDataset, TokensLoader
from litdata.streaming.writer import BinaryWriter

PIECE = 1 << 22  # tokens written at once


def write(folder: Path, flat: np.ndarray, length: int) -> None:
    writer = BinaryWriter(str(folder), chunk_size=PIECE, item_loader=TokensLoader(block_size=length))
    for number, start in enumerate(range(0, len(flat), length)):
        writer[number] = torch.from_numpy(flat[start : start + length].astype(np.int32))
    writer.done()
    writer.merge()


def main() -> None:
    folder, tokens, rounds, length = Path(sys.argv[1]), *(int(word) for word in sys.argv[2:5])
    out = folder / "litdata"
    flat = np.fromfile(folder / "flat.bin", np.uint16)
    write(out, flat[: len(flat) // length * length], length)
    best_cpu = best_wall = 0.0
    for epoch in range(rounds + 1):
        dataset = StreamingDataset(
            str(out), item_loader=TokensLoader(block_size=length), shuffle=True, drop_last=False, seed=epoch
        )
        count = 0
        cpu, wall = time.process_time(), time.perf_counter()
        for block in dataset:
            count += len(block)
            if count >= tokens:
                break
        best_cpu = max(best_cpu, count / (time.process_time() - cpu))
        best_wall = max(best_wall, count / (time.perf_counter() - wall))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(json.dumps({"cpu": best_cpu, "wall": best_wall, "bytes": size}))


if __name__ == "__main__":
    main()
