"""The engine benchmark at tiny sizes: every row is there, bytes are those of closed formulas, and a wrong loss is a fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.engines import KINDS, disagreements, last_line, overheads
from bench.engines_cases import ON_MANY, Sizes, why_not
from bench.engines_run import merged
from bench.step_trace import PARTS, _add_up
from parallel.shape import parameter_table
from pretrain.model import model_shape
from tests.distributed import launch

pytestmark = pytest.mark.parity

ROOT = Path(__file__).resolve().parents[2]
SIZES = Sizes(ranks=2, hidden=32, layers=4, sequence=16, micro_batch=1, accumulation=2, vocab=512, steps=2)
FLOAT = 4  # bytes


def arguments() -> list[str]:
    return [word for name, value in vars(SIZES).items() for word in (f"--{name.replace('_', '-')}", str(value))]


def elements(part: str = "") -> int:
    """Of the parameters whose names begin with `part`."""
    total = 0
    for name, spec in parameter_table(model_shape(SIZES.model)).items():
        size = 1
        for n in spec.shape:
            size *= n
        total += size if name.startswith(part) else 0
    return total


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of three contenders on 2 ranks, one that cannot be, and two on one rank."""
    file = tmp_path_factory.mktemp("engines") / "engines.json"
    chosen = "ddp,z3,fsdp2,z3-hybrid"
    small = [f"--overhead-{name}" for name in ("hidden", "layers", "sequence", "micro-batch")]
    small = [word for pair in zip(small, ("32", "1", "16", "1")) for word in pair]
    done = subprocess.run(
        [sys.executable, "bench/engines.py", *arguments(), *small, "--only", chosen, "--json", str(file)],
        cwd=ROOT, env=launch.environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(text=done.stdout, **json.loads(file.read_text()))


def test_every_row_asked_for_has_figures_or_a_printed_reason_and_the_losses_agree(smoke):
    assert smoke.rows["layouts"].pop("z3-hybrid") == "not run: 2 ranks are one shard group: the row without it"
    assert smoke.rows == {
        "layouts": {"ddp": "ok", "z3": "ok", "fsdp2": "ok"},
        "where": {"z3": "ok", "fsdp2": "ok"},
        "overhead": {"plain": "ok", "z3": "ok", "fsdp2": "ok"},
    }
    for table in smoke.rows.values():
        for name in [*table, "z3-hybrid"]:
            assert f"\n| {name} " in smoke.text
    assert "layouts: all 3 rows have the same loss" in smoke.text and "overhead: all 3 rows" in smoke.text
    for figures in smoke.figures["layouts"].values():
        assert len(figures["wall_s"]) == len(figures["cpu_s"]) == SIZES.steps
        assert figures["peak_bytes"] > 0
        assert 5 < figures["loss"] < 7  # ln(512) = 6.24, and a few steps down


def volumes(smoke, name: str) -> dict[str, int]:
    """kind -> bytes of what was communicated at all."""
    return {kind: v["bytes"] for kind, v in smoke.figures["layouts"][name]["volumes"].items() if v["calls"]}


def test_ddp_reduces_every_gradient_once_a_step_and_nothing_else(smoke):
    assert volumes(smoke, "ddp") == {"all-reduce": FLOAT * elements()}


def test_fsdp2_gathers_all_forward_and_the_blocks_again_backward_and_reduces_with_every_microbatch(smoke):
    assert volumes(smoke, "fsdp2") == {
        "all-gather": SIZES.accumulation * FLOAT * (elements() + elements("blocks.")),
        "reduce-scatter": SIZES.accumulation * FLOAT * elements(),
        "all-reduce": 16,  # the norm, and whether it is finite
    }


def test_zero3_gathers_all_forward_and_again_backward_but_what_is_used_soon_and_reduces_with_every_microbatch(smoke):
    kept = elements("head.") + elements(f"blocks.{SIZES.layers - 1}.")
    found = volumes(smoke, "z3")
    assert found.pop("all-reduce") < 100
    assert found == {
        "all-gather": SIZES.accumulation * FLOAT * (2 * elements() - kept),
        "reduce-scatter": SIZES.accumulation * FLOAT * elements(),
    }


def test_the_parts_of_a_traced_step_add_up_to_it(smoke):
    for name in ("z3", "fsdp2"):
        trace = smoke.figures["layouts"][name]["trace"]
        assert sum(trace["parts"].values()) == pytest.approx(trace["seconds"], rel=1e-6)
        assert all(trace["parts"][part] > 0 for part in PARTS)


def test_the_counter_sees_every_call_forward_and_backward_with_the_bytes_of_its_full_buffer(tmp_path):
    launch.run("tests.bench.comm_worker", [str(tmp_path)], 2, timeout=120)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        expected = {
            "all-reduce": {"calls": 3, "bytes": 10 * 4 + 3 * 8 + 4 * 4},
            "all-gather": {"calls": 2, "bytes": 2 * 5 * 4 + 2 * 6 * 4},
            "reduce-scatter": {"calls": 1, "bytes": 8 * 4},
            "broadcast": {"calls": 1, "bytes": 7 * 2},
        }
        if rank == 0:
            expected["point-to-point"] = {"calls": 1, "bytes": 9 * 4}
        assert found["volumes"] == expected
        assert found["refused"]  # a kind of call that it cannot size does not pass uncounted


def test_a_loss_or_norm_that_differs_by_more_than_rounding_is_a_fault_and_so_is_no_number():
    rows = {"ddp": {"loss": 6.0, "norm": 2.0}, "z3": {"loss": 6.00005, "norm": 2.00001}}
    assert disagreements(rows) == []
    for value, wrong in (("loss", 6.0001), ("norm", 2.0001), ("loss", float("nan")), ("norm", float("inf"))):
        changed = {**rows, "z3": {**rows["z3"], value: wrong}}
        assert [line.split()[:2] for line in disagreements(changed)] == [["z3:", value]]
    assert disagreements({"ddp": {"loss": float("nan"), "norm": 2.0}})


def test_a_step_lasts_as_long_as_its_slowest_rank_and_costs_the_cpu_seconds_of_all():
    def rank(*walls: float) -> dict:
        steps = [{"wall": wall, "cpu": wall / 2, "loss": 6.0, "norm": 2.0} for wall in walls]
        volume = {"all-gather": {"calls": 1, "bytes": int(walls[0])}}
        return {"steps": steps, "volumes": volume, "peak_bytes": 10, "idle_bytes": 4, "build_peak_bytes": 7}

    found = merged([rank(1.0, 6.0), rank(3.0, 2.0)])
    assert found["wall_s"] == [3.0, 6.0] and found["cpu_s"] == [2.0, 4.0]
    assert found["volumes"]["all-gather"]["bytes"] == 3 and found["peak_bytes"] == 6


def test_an_overhead_is_taken_round_by_round():
    engine, plain = {"cpu_s": [1.1, 2.2, 4.0]}, {"cpu_s": [1.0, 2.0, 4.0]}
    assert overheads(engine, plain, "cpu_s") == pytest.approx([0.1, 0.1, 0.0])


def test_a_range_counts_without_the_ranges_inside_it_for_the_part_its_name_or_its_surroundings_say():
    def event(name: str, microseconds: float, *inner):
        time_range = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, time_range=time_range, cpu_children=inner)

    node = "autograd::engine::evaluate_function: "
    step = event(
        "bench::step", 100,
        event("bench::model", 30, event("aten::mm", 20), event("c10d::allreduce_", 4)),
        event(node + "MmBackward0", 25, event("aten::mm", 10), event("fsdp::all_gather_copy_in", 3)),
        event(node + "torch::autograd::AccumulateGrad", 12, event("aten::copy_", 5), event("bench::wait", 6)),
        event("Optimizer.step#AdamW.step", 8, event("aten::mul_", 8)),
    )  # fmt: skip
    parts, rest = dict.fromkeys(PARTS, 0.0), dict.fromkeys(("bench::step", "aten::copy_"), 0.0)
    rest |= {node + "torch::autograd::AccumulateGrad": 0.0, "fsdp::all_gather_copy_in": 0.0}
    _add_up(step, "rest", parts, rest)
    assert {part: round(s * 1e6) for part, s in parts.items()} == {
        "model": 26 + 22, "collectives": 4 + 6, "optimizer": 8, "rest": 25 + 3 + 6,
    }  # fmt: skip
    assert round(sum(rest.values()) * 1e6) == 34


def test_every_contender_is_legal_on_four_ranks_at_the_default_sizes():
    sizes = Sizes(4, 512, 8, 256, 2, 4, 8192, 7)
    assert {c.name: why for c in ON_MANY if (why := why_not(c, sizes))} == {}
    assert len({c.name for c in ON_MANY}) == len(ON_MANY) and KINDS[-1] == "other"


def test_a_failed_row_says_the_first_error_of_its_ranks():
    said = "exit codes [1, -9]\n--- rank 0\nTraceback\n  raise ValueError(1)\nValueError: no such thing\nNote: more"
    assert last_line(AssertionError(said)) == "ValueError: no such thing"
