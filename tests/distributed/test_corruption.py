"""No finding on clean runs at any layout, every planted bit found and its rank named, and an engine that nobody disturbed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable

import pytest

from tests.distributed.launch import run

CLEAN = {
    2: (
        "z0", "z1", "z1 bf16", "z2", "z2 bf16", "z3", "z3 bf16", "z3 tp2", "z3 pp2", "z1 pp2 interleaved bf16",
        "z3 pp2 interleaved bf16", "fsdp2", "fsdp2 bf16", "fsdp2 tp2", "fsdp2 pp2", "fsdp2 pp2 zbv bf16",
    ),
    4: ("shard_group", "fsdp2 shard_group", "z3 tp2", "z1 tp2 bf16", "z3 pp2 interleaved", "fsdp2 pp2"),
}  # fmt: skip
# The others are heavier proofs, `make parity`.
EVERYDAY = {
    (2, "clean z1 bf16"), (2, "clean z3"), (2, "clean z3 tp2"), (2, "clean fsdp2 pp2 zbv bf16"), (2, "gain of a tp rank"),
    (2, "master shard z3 bf16"), (2, "moment fsdp2"), (2, "forward copy z1 bf16"), (2, "gathered z3 bf16"),
}  # fmt: skip
# (ranks, scenario) -> what must be found: by comparing copies, and by ranks in their own memory: (what, tensor, ranks, copies).
PLANTED = {
    (2, "gain of a tp rank"): (
        [["copies", "weight/final_norm.weight", [0, 1], 2], ["rounded", "forward/final_norm.weight", [1], 1]],
        [["changed", "weight/final_norm.weight", [1], 1]],
    ),
    (2, "gain of a tp rank, fsdp2"): (
        [
            ["copies", "forward/blocks.1.ffn_norm.weight", [0, 1], 2],
            ["copies", "weight/blocks.1.ffn_norm.weight", [0, 1], 2],
        ],
        [["changed", "weight/blocks.1.ffn_norm.weight", [1], 1]],
    ),
    (2, "master shard z3"): (
        [["rounded", "forward/blocks.2.up_proj.weight", [1], 1]],
        [["changed", "weight/blocks.2.up_proj.weight", [1], 1]],
    ),
    # The lowest of 23 bits does not reach the seven that the forward reads.
    (2, "master shard z3 bf16"): ([], [["changed", "weight/blocks.2.up_proj.weight", [1], 1]]),
    (2, "moment z3"): ([], [["changed", "exp_avg_sq/blocks.0.q_proj.weight", [1], 1]]),
    (2, "moment fsdp2"): ([], [["changed", "exp_avg_sq/blocks.0.q_proj.weight", [1], 1]]),
    (2, "moment z0"): (
        [["copies", "exp_avg_sq/blocks.0.q_proj.weight", [0, 1], 2]],
        [["changed", "exp_avg_sq/blocks.0.q_proj.weight", [1], 1]],
    ),
    (2, "swap z3"): ([], [["changed", "exp_avg/head.weight", [1], 1]]),
    (2, "swap z3 without places"): ([], []),  # what a checksum is for that knows places
    # The second rank made this part of the copy from its own weights, so it knows whose is wrong.
    (2, "forward copy z1 bf16"): (
        [
            ["copies", "forward/blocks.3.down_proj.weight", [0, 1], 2],
            ["rounded", "forward/blocks.3.down_proj.weight", [1], 1],
        ],
        [],
    ),
    # Every rank gathers the same wrong value: only what it was made from tells.
    (2, "gathered z3 bf16"): ([["rounded", "forward/blocks.3.down_proj.weight", [1], 1]], []),
    (4, "forward copy z1 bf16"): ([["copies", "forward/blocks.0.down_proj.weight", [2], 4]], []),
    (4, "gain of a tp rank"): (
        [
            ["copies", "forward/blocks.3.attention_norm.weight", [2], 4],
            ["rounded", "forward/blocks.3.attention_norm.weight", [2], 1],
        ],
        [],
    ),
    (4, "moment of a replica"): (
        [["copies", "exp_avg_sq/head.weight", [0, 2], 2]],
        [["changed", "exp_avg_sq/head.weight", [2], 1]],
    ),
    (4, "master of a replica, fsdp2"): (
        [["copies", "forward/head.weight", [0, 1, 2, 3], 4], ["copies", "weight/head.weight", [0, 2], 2]],
        [["changed", "weight/head.weight", [2], 1]],
    ),
}


def cases(names: Iterable[tuple[int, str]]) -> list:
    return [pytest.param(*case, marks=[] if case in EVERYDAY else pytest.mark.parity) for case in names]


@pytest.fixture(scope="module")
def found(request, tmp_path_factory) -> dict[tuple[int, str], dict]:
    """What each selected scenario gave, the same on every rank; all scenarios of a world in one launch."""
    selected = {
        (item.callspec.params["world"], item.callspec.params["name"])
        for item in request.session.items
        if item.fspath == request.fspath
    }
    results = {}
    for world in sorted({world for world, _ in selected}):
        folder = tmp_path_factory.mktemp(f"corruption{world}")
        names = sorted(name for at, name in selected if at == world)
        run("tests.distributed.corruption_worker", [str(folder), *names], world, timeout=280)
        ranks = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
        assert sorted(ranks[0]) == names
        assert all(rank == ranks[0] for rank in ranks), "every rank must come to the same findings"
        results |= {(world, name): result for name, result in ranks[0].items()}
    return results


@pytest.mark.parametrize(
    "world, name", cases((world, f"clean {name}") for world, names in CLEAN.items() for name in names)
)
def test_a_clean_run_has_no_finding_and_goes_on_as_if_nobody_had_looked(found, world, name):
    clean = {"findings": [], "undisturbed": True, "whole": True, "released": True, "forgotten": True}
    assert found[world, name] == clean


@pytest.mark.parametrize("world, name", cases(PLANTED))
@pytest.mark.fault(
    "one flipped bit: in a weight, a moment, a copy that the forward uses",
    happens="found at the next comparison, bit by bit; tensor, rank and host are named; nothing of it is saved",
    lost="the steps since the newest complete checkpoint, which the next start takes again",
)
def test_one_flipped_bit_is_found_and_its_rank_named(found, world, name):
    copies, own = PLANTED[world, name]
    result = found[world, name]
    assert result["before"] == []
    assert [finding[:4] for finding in result["copies"]] == copies
    assert [finding[:4] for finding in result["own"]] == own
    for *_, ranks, _, sentence in result["copies"] + result["own"]:
        assert all(f"rank {rank} on {socket.gethostname()}" in sentence for rank in ranks)
