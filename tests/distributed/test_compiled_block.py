"""A compiled block on two tensor-parallel ranks is one graph, collectives and recomputation included, and computes the same."""

from __future__ import annotations

import json

import pytest

from tests.distributed.launch import run


@pytest.mark.parity
def test_a_compiled_tensor_or_sequence_parallel_block_is_one_graph_with_the_eager_gradients(tmp_path):
    run("tests.distributed.compiled_block_worker", [str(tmp_path)], 2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 6
        for name, block in found.items():
            assert (block["graphs"], block["breaks"]) == (1, 0), name
            assert block["worst"] < 1e-6, name
