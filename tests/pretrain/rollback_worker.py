"""One rank of: python -m tests.pretrain.rollback_worker FAULTS train ... - a training run whose engine meets planted faults.

FAULTS is JSON: {KIND: [calls], ...}, calls of train_step counted from 1, through roll-backs, in which on the second rank
- `gradient`: the weights of the loss are NaN, and so are all gradients;
- `loss`: the same, and the losses of one sample of its first microbatch are NaN too;
- `flip`: one bit of its moments has flipped before the call;
and `spike`: the losses of every rank come out fifty times as large.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import pretrain.train
from pretrain import cli

RANK = 1


def main() -> None:
    faults = {kind: set(calls) for kind, calls in json.loads(sys.argv[1]).items()}
    build = pretrain.train.engine_for

    def engine_for(*arguments: Any) -> Any:
        engine = build(*arguments)
        train_step, calls = engine.train_step, 0

        def faulty(microbatches: list[dict[str, torch.Tensor]], *rest: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls in faults.get("flip", ()) and engine.mesh.rank == RANK:
                engine.state()["exp_avg_sq/head.weight"].parts[0][1].view(torch.int32)[0] ^= 1
            broken = [
                kind for kind in ("gradient", "loss") if calls in faults.get(kind, ()) and engine.mesh.rank == RANK
            ]
            if broken:
                microbatches[0]["weight"] = torch.where(microbatches[0]["masked"], torch.nan, microbatches[0]["weight"])
            result = train_step(microbatches, *rest, **options)
            if "loss" in broken:
                first = result.outputs[0]
                value = first.value.clone()
                value[microbatches[0]["masked"].sum(1).argmax()] = torch.nan
                result.outputs[0] = first._replace(value=value)
            if calls in faults.get("spike", ()):
                result.outputs = [o._replace(value=50 * o.value) for o in result.outputs]
            return result

        engine.train_step = faulty
        return engine

    pretrain.train.engine_for = engine_for
    del sys.argv[1]
    cli.main()


if __name__ == "__main__":
    main()
