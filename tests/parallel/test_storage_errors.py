"""Whether a fault of the storage may pass is known on all ranks, not only on the one that met it."""

from __future__ import annotations

import json

from tests.distributed.launch import run


def test_a_fault_of_one_rank_s_storage_is_one_that_may_pass_on_all_and_damage_is_not(tmp_path):
    run("tests.parallel.storage_error_worker", [str(tmp_path)], 2)
    found = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert {name: passing for name, (passing, _) in found[0].items()} == {
        "save": True,
        "load": True,
        "damaged": False,
        "missing": False,
    }
    assert found[0] == found[1]
    assert "cannot be written: Input/output error" in found[0]["save"][1]
    assert "its values cannot be read (rank 1: Input/output error)" in found[0]["load"][1]
