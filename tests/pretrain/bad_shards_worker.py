"""Two ranks that read the same samples; the second one's copy of the data lacks a shard. Writes what each ends up with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from data.errors import InputError
from data.loader import Slice, StageOptions, training_batches
from data.masking import MaskingOptions
from data.shard_set import ShardSet
from data.stream import BlockStream
from parallel.mesh import build_mesh, leave
from pretrain.loop.bad_shards import BadShards
from pretrain.training_data import TrainingData

LENGTH, GLOBAL, STEPS = 32, 16, 6


def read(mesh, folder: Path, limit: int, saved: list, first: int = 0, damaged: str = "") -> dict:
    shards = ShardSet.open(folder, "size", tolerate=limit)
    if damaged:
        (folder / damaged).unlink()
    data = TrainingData(("text",), (shards,), (1.0,), (None,))
    blocks = BlockStream(shards, LENGTH, 0)
    said: list[str] = []
    bad = BadShards(limit, data, blocks, mesh, said.append)
    found: dict = {"digests": [], "lost": [], "said": said}
    options = StageOptions(MaskingOptions(0, GLOBAL), skip_bad_shards=limit > 0)
    try:
        bad.begin(first, saved)
        found["at the start"] = [entry["shard"] for entry in bad.saved()]
        source = training_batches(blocks, options, Slice(GLOBAL, 4), 1, consumed=first * GLOBAL, steps=STEPS - first)
        for step, group in enumerate(source, start=first):
            group = bad.settle(step, group)
            found["digests"].append(np.concatenate([c.digest for c in group]).tolist())
            found["lost"].append(bad.lost)
        found["saved"] = bad.saved()
    except InputError as error:
        found["error"] = str(error)
    return found


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    mesh = build_mesh(tensor=2, timeout_seconds=60)
    mine = folder / f"rank{mesh.rank}"
    gone = "shard-000002.tar" if mesh.rank else ""
    found = {"whole": read(mesh, folder / "whole", 1, [])}
    found["none allowed"] = read(mesh, folder / "whole", 0, [])
    found["lost on the way"] = read(mesh, mine, 1, [], damaged=gone)
    found["lost before the start"] = read(mesh, mine, 1, [])  # on rank 1 alone
    found["resumed"] = read(mesh, mine, 1, found["lost on the way"]["saved"], first=3)
    known = found["lost on the way"]["saved"]
    found["limit gone"] = read(mesh, folder / "whole", 0, known, first=3)
    found["moved"] = read(mesh, folder / "whole", 1, known, first=3)
    if mesh.rank == 0:
        (mine / "shard-000004.tar").unlink()
    found["too many"] = read(mesh, mine, 1, [])
    (out / f"{mesh.rank}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
