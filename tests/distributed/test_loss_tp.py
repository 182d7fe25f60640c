"""Laws of the tensor-parallel diffusion loss on real gloo ranks: one launch of four, groups of 2, 3 and 4."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORLD = 4
LAWS = (
    "equals_dense",
    "bits_are_equal_on_all_ranks_and_runs",
    "a_shard_of_nothing_but_padding_is_exact_and_gets_no_gradient",
    "ties_across_shards_go_to_the_lowest_token_id",
    "grad_output_scales_every_gradient",
    "one_gather_and_one_reduction_a_chunk_and_none_without_masked_rows",
    "broken_rows_are_non_finite_on_every_rank",
    "unequal_or_short_shards_are_refused_on_every_rank",
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict[str, str]]:
    """Each rank's {law/tpN: "held" or a traceback}; laws after a rank's first broken one are missing."""
    folder = tmp_path_factory.mktemp("loss_tp")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    worker = Path(__file__).with_name("loss_tp_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(WORLD), str(folder)],
            env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    deadline = time.monotonic() + 120
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
        if any(process.returncode for process in ranks):  # the others would wait for it until their own timeout
            deadline = min(deadline, time.monotonic() + 2)
    for process in ranks:
        process.kill()
    said = [process.communicate()[0] for process in ranks]
    written = [folder / f"{rank}.json" for rank in range(WORLD)]
    assert any(path.exists() for path in written), "\n".join(said)
    return [json.loads(path.read_text()) for path in written if path.exists()]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_on_every_rank(reports, law, ranks):
    found = [report[f"{law}/tp{ranks}"] for report in reports if f"{law}/tp{ranks}" in report]
    members = WORLD // ranks * ranks  # of the groups that the world has room for
    assert found == ["held"] * members, "\n".join(["a rank ended before this law", *found])


def test_every_law_the_ranks_ran_is_asserted(reports):
    assert {name.split("/")[0] for report in reports for name in report} == set(LAWS)
