"""What a host says of itself: nothing invented, files of bounded size, every sample shipped once, hardly any processor time."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pretrain.tracking import system_spool
from pretrain.tracking.gpu_metrics import Gpus, chosen
from pretrain.tracking.shipping import read_state, ship
from pretrain.tracking.system_metrics import Host, SystemMetrics
from pretrain.tracking.system_spool import SystemSpool, claim_name, new_samples, plain_host, spool_name, spools
from tests.pretrain.mlflow_server import runs_of, stored

pytest_plugins = ("tests.pretrain.tracking_fixtures",)


def lines(path: Path) -> list[dict]:
    return [json.loads(raw) for raw in path.read_bytes().splitlines()]


def test_a_host_says_what_the_kernel_says(tmp_path):
    host = Host(tmp_path)
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    found = host.sample()
    assert 0 < found["cpu_percent"] <= 100
    kernel = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    used = (int(kernel["MemTotal"].split()[0]) - int(kernel["MemAvailable"].split()[0])) / 2**20
    assert found["memory_used_gib"] == pytest.approx(used, abs=0.5)
    shown = subprocess.run(["df", "-B1", "--output=avail", str(tmp_path)], capture_output=True, text=True).stdout
    assert found["disk_free_gib"] == pytest.approx(int(shown.split()[1]) / 2**30, abs=1.0)


def test_rates_are_bytes_over_the_time_between_two_readings_and_a_counter_that_began_anew_has_none(tmp_path):
    counters = tmp_path / "mlx5_0" / "ports" / "1" / "counters"
    counters.mkdir(parents=True)
    (counters / "port_xmit_data").write_text("1000\n")
    (counters / "port_rcv_data").write_text("99999999999\n")
    host = Host(tmp_path, infiniband=tmp_path)
    host._at -= 2.0  # two seconds ago
    (counters / "port_xmit_data").write_text(str(1000 + 50_000_000) + "\n")
    (counters / "port_rcv_data").write_text("5\n")
    found = host.sample()
    assert found["infiniband_sent_mb_per_second"] == pytest.approx(4 * 50_000_000 / 2.0 / 1e6, rel=0.1)
    assert "infiniband_received_mb_per_second" not in found


def test_where_there_is_no_driver_no_gpu_is_invented(tmp_path):
    none = Gpus({}, "libthere-is-no-such-library.so.1")
    assert len(none) == 0 and none.sample() == {}
    assert not [name for name in Host(tmp_path, none).sample() if "gpu" in name]
    assert Gpus({}, "libc.so.6").sample() == {}, "a library without NVIDIA's calls"


DRIVER = """
#include <string.h>
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned long long total, free, used; } memory;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = (void *)(long)(i + 1); return 0; }
int nvmlDeviceGetUtilizationRates(void *h, utilization *u) { if ((long)h == 2) return 3; u->gpu = 97; u->memory = 40; return 0; }
int nvmlDeviceGetMemoryInfo(void *h, memory *m) { m->total = 80ull << 30; m->free = 20ull << 30; m->used = 60ull << 30; return 0; }
int nvmlDeviceGetPowerUsage(void *h, unsigned *w) { *w = 612345; return 0; }
int nvmlDeviceGetTemperature(void *h, unsigned s, unsigned *t) { *t = s ? 0 : 71; return 0; }
"""


def test_a_gpu_says_what_its_driver_says_in_the_driver_s_own_layout(tmp_path):
    """Against a library with NVML's signatures, compiled from C; its second GPU has no utilisation, as a MIG slice."""
    (tmp_path / "driver.c").write_text(DRIVER)
    built = subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", tmp_path / "nvml.so", tmp_path / "driver.c"], capture_output=True
    )
    if built.returncode:
        pytest.skip("needs a C compiler")
    found = Gpus({}, str(tmp_path / "nvml.so")).sample()
    assert found == {
        "gpu0_utilization_percent": 97.0,
        "gpu0_memory_used_gib": 60.0,
        "gpu0_memory_percent": 75.0,
        "gpu0_power_watts": 612.345,
        "gpu0_temperature_celsius": 71.0,
        "gpu1_memory_used_gib": 60.0,
        "gpu1_memory_percent": 75.0,
        "gpu1_power_watts": 612.345,
        "gpu1_temperature_celsius": 71.0,
    }
    assert set(Gpus({"CUDA_VISIBLE_DEVICES": "1"}, str(tmp_path / "nvml.so")).sample()) == {
        n for n in found if "gpu1" in n
    }


def test_the_gpus_of_the_real_driver_are_within_their_limits():
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        pytest.skip("needs an NVIDIA driver")
    gpus = Gpus({})
    found = gpus.sample()
    assert len(gpus) > 0
    for index in range(len(gpus)):
        assert 0 <= found[f"gpu{index}_memory_percent"] <= 100
        assert 0 < found[f"gpu{index}_power_watts"] < 1500 and 0 < found[f"gpu{index}_temperature_celsius"] < 110


@pytest.mark.parametrize(
    "count, environ, expected",
    [
        (8, {}, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, {"SLURM_JOB_GPUS": "2,3"}, [2, 3]),
        (2, {"SLURM_JOB_GPUS": "2,3"}, [0, 1]),  # a device cgroup shows the job's only, renumbered
        (1, {"SLURM_JOB_GPUS": "3"}, [0]),
        (8, {"CUDA_VISIBLE_DEVICES": "4,5", "LOCAL_WORLD_SIZE": "2"}, [4, 5]),
        (
            8,
            {"CUDA_VISIBLE_DEVICES": "4", "LOCAL_WORLD_SIZE": "8"},
            [0, 1, 2, 3, 4, 5, 6, 7],
        ),  # one shown to each process
        (8, {"CUDA_VISIBLE_DEVICES": "GPU-8a3f"}, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0, {"CUDA_VISIBLE_DEVICES": "0"}, []),
    ],
)
def test_only_the_gpus_of_the_job_are_reported(count, environ, expected):
    assert chosen(count, environ) == expected


@pytest.mark.parametrize(
    "name, plain", [("node-1.cluster", "node-1.cluster"), ("../etc", "_etc"), ("a b/c", "a_b_c"), ("", "host")]
)
def test_a_host_s_name_can_stand_in_a_file_name(name, plain):
    assert plain_host(name) == plain


def test_the_thread_writes_a_sample_each_interval_with_the_step_of_the_moment(tmp_path):
    step = 7
    metrics = SystemMetrics(tmp_path, 0.1, lambda: step, host="node 1")
    time.sleep(0.55)
    step = 8
    metrics.close()
    found = lines(tmp_path / "system-node_1.jsonl")
    assert 4 <= len(found) <= 7
    assert found[0]["step"] == 7 and found[-1]["step"] == 8, "the last sample is taken at the end"
    assert found[0]["system/node_1/memory_percent"] > 0
    assert all(a["time"] < b["time"] for a, b in zip(found, found[1:]))


def test_two_hosts_of_one_name_write_files_and_metrics_of_their_own_and_are_both_shipped(store, run):
    name = "n" * 70  # cut, and still apart
    hosts = {rank: SystemMetrics(run, 0.05, lambda rank=rank: rank, host=name, rank=rank) for rank in (0, 8, 16)}
    until = time.monotonic() + 20
    while len(spools(run)) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    for metrics in hosts.values():
        metrics.close()
    assert len(spools(run)) == 3
    cut = "n" * 64
    by_file = {path.name: lines(path) for path in spools(run)}
    assert spool_name(cut) in by_file, "one of them has the name alone"
    prefixes = set()
    for file, found in by_file.items():
        host = file.removeprefix("system-").removesuffix(".jsonl")
        assert len(host) == 64 and spool_name(host) == file, "the store's names lead back to the file"
        (step,) = {line["step"] for line in found}
        assert host in (cut, f"{cut[: 64 - len(f'-r{step}')]}-r{step}")
        names = {key for line in found for key in line if key not in ("step", "time")}
        assert all(key.startswith(f"system/{host}/") for key in names) and f"system/{host}/memory_percent" in names
        prefixes.add(host)
    assert len(prefixes) == 3
    ship(run, store, "e", "r", {})
    for file, found in by_file.items():
        host = file.removeprefix("system-").removesuffix(".jsonl")
        assert len(stored(store, read_state(run)["run_id"], f"system/{host}/memory_percent")) == len(found)


def test_a_host_has_its_own_name_again_at_the_next_start(tmp_path):
    for step in (1, 2):
        metrics = SystemMetrics(tmp_path, 30.0, lambda step=step: step, host="h", rank=8)
        metrics.close()
    assert [path.name for path in spools(tmp_path)] == ["system-h.jsonl"]
    assert [line["step"] for line in lines(tmp_path / "system-h.jsonl")] == [1, 2]


def test_the_lock_of_a_rank_that_died_with_its_node_does_not_keep_its_next_start_from_writing(tmp_path):
    first, held = claim_name(tmp_path, "h", 8)
    second, kept = claim_name(tmp_path, "h", 8)
    assert (first, second) == ("h", "h-r8") and claim_name(tmp_path, "h", 8) == ("h-r8", None)
    assert held is not None and kept is not None
    os.close(held)
    os.close(kept)


def test_a_folder_that_cannot_be_written_and_a_step_that_fails_end_nothing(tmp_path):
    said: list[str] = []
    metrics = SystemMetrics(tmp_path / "gone", 0.02, lambda: 1, host="h", say=said.append)
    time.sleep(0.2)
    metrics.close()
    assert said and "cannot be written" in said[0]

    def broken() -> int:
        raise KeyError("step")

    before = threading.active_count()
    metrics = SystemMetrics(tmp_path, 0.02, broken, host="h", say=said.append)
    time.sleep(0.2)
    metrics.close()
    assert threading.active_count() <= before and "KeyError" in said[-1]


def test_a_thread_costs_less_than_a_thousandth_of_a_processor(tmp_path):
    """By the processor time of a sample, at the default interval of 30 s."""
    host, spool = Host(tmp_path), SystemSpool(tmp_path, "h")
    began, count = time.thread_time(), 50
    for step in range(count):
        spool.append(step, {f"system/h/{name}": value for name, value in host.sample().items()})
    spool.close()
    assert (time.thread_time() - began) / count / 30.0 < 0.001


def read_on(folder: Path, position: dict, steps: list[int]) -> dict:
    """Reads what is new of host h; the position behind it."""
    for line, behind in new_samples(folder / spool_name("h"), position):
        steps.append(line["step"])
        position = behind
    return position


def test_the_files_of_a_host_are_bounded_and_no_sample_between_them_is_lost_or_doubled(tmp_path, monkeypatch):
    monkeypatch.setattr(system_spool, "FULL_BYTES", 2000)
    spool, position = SystemSpool(tmp_path, "h"), {}
    read: list[int] = []
    for step in range(1, 301):
        spool.append(step, {"system/h/cpu_percent": float(step)})
        if step % 17 == 0:  # less than two files are written between two readings
            position = read_on(tmp_path, position, read)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * 2200
    spool.close()
    read_on(tmp_path, position, read)
    assert read == list(range(1, 301))
    assert [path.name for path in spools(tmp_path)] == ["system-h.jsonl"] and len(list(tmp_path.iterdir())) == 2


def test_a_clock_that_goes_back_and_a_line_that_was_cut_off_lose_no_later_sample(tmp_path, monkeypatch):
    first = SystemSpool(tmp_path, "h")
    first.append(1, {"system/h/cpu_percent": 1.0})
    first.close()
    with open(tmp_path / "system-h.jsonl", "ab") as file:
        file.write(b'{"step": 2, "ti')
    now = time.time()
    monkeypatch.setattr(system_spool.time, "time", lambda: now - 3600)
    position = read_on(tmp_path, {}, [])
    again = SystemSpool(tmp_path, "h")
    again.append(3, {"system/h/cpu_percent": 3.0})
    again.append(4, {"system/h/cpu_percent": 4.0})
    again.close()
    assert [line["step"] for line, _ in new_samples(tmp_path / "system-h.jsonl", position)] == [3, 4]
    assert [line["step"] for line, _ in new_samples(tmp_path / "system-h.jsonl", {})] == [1, 3, 4]


def test_samples_are_shipped_once_also_when_mlflow_json_is_lost(store, run):
    spool = SystemSpool(run, "h")
    for step in (5, 6, 5, 5):
        spool.append(step, {"system/h/cpu_percent": float(step), "system/h/gpu0_power_watts": 100.0})
    ship(run, store, "e", "r", {})
    run_id = read_state(run)["run_id"]
    (run / "mlflow.json").unlink()
    spool.append(7, {"system/h/cpu_percent": 7.0, "system/h/gpu0_power_watts": 100.0})
    spool.close()
    for _ in range(2):
        ship(run, store, "e", "r", {}, run_id=run_id)
    assert len(runs_of(store)) == 1
    found = stored(store, run_id, "system/h/cpu_percent")
    assert sorted((at, step) for step, at, _ in found) == [
        (int(line["time"] * 1000), line["step"]) for line in lines(run / "system-h.jsonl")
    ]
