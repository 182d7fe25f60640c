"""The doctor reports what is there, never crashes, never hangs, and says what to do about everything that is not ok."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import time
from pathlib import Path

import pytest

from data.errors import InputError
from parallel.apex_support import ApexStatus
from pretrain.doctor import checks, probes
from pretrain.doctor import command as module
from pretrain.doctor.checks import Machine, pinned_versions
from pretrain.doctor.command import Finding, doctor, print_doctor, run_checks, run_doctor
from pretrain.doctor.probes import REPOSITORY, link_kinds

PINS = pinned_versions(REPOSITORY / "requirements.txt")


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A PATH of fake commands only: commands(name, shell script)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(name: str, script: str) -> None:
        file = folder / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    return write


def machine(folder: Path, **more) -> Machine:
    return Machine(folder=folder, pins=PINS, **more)


def files(root: Path, **texts: str) -> None:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_real_report_is_complete_quick_leaves_nothing_behind_and_runs_no_compiler(tmp_path, monkeypatch, capsys):
    fake, runs = tmp_path / "bin", tmp_path / "runs"
    fake.mkdir(), runs.mkdir()
    for name in ("cc", "gcc", "g++", "c++", "x86_64-linux-gnu-gcc", "nvcc", "ninja"):
        (fake / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/compiled\nexit 1\n')
        (fake / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    for variable in ("CC", "CXX", "DS_ACCELERATOR"):
        monkeypatch.delenv(variable, raising=False)
    begun = time.monotonic()
    assert doctor(str(tmp_path / "report.json"), str(runs)) == 0
    assert time.monotonic() - begun < 15
    findings = json.loads((tmp_path / "report.json").read_text())["findings"]
    names = [finding["name"] for finding in findings]
    for expected in (
        "Python",
        "torch",
        "deepspeed",
        "megatron-core",
        "webdataset",
        "tokenizers",
        "mlflow",
        "Slurm",
        "NVIDIA apex",
        "DeepSpeed ops",
        "tracking store",
        "disk",
        "RAM",
        "CPU cores",
        "/dev/shm",
        "open files",
    ):
        assert names.count(expected) == 1, expected
    for finding in findings:
        assert finding["status"] == "ok" or finding["advice"], finding
        assert "check failed" not in finding["detail"], finding
    assert not list(runs.iterdir()) and not (tmp_path / "compiled").exists()
    printed = capsys.readouterr().out
    assert all(f"{f['name']:<15} {f['detail']}" in printed for f in findings)


def test_a_check_that_raises_or_hangs_becomes_a_finding_and_the_others_stay():
    def broken(_):
        raise RuntimeError("no such\nthing")

    def hanging(_):
        time.sleep(30)

    def fine(_):
        return [Finding("fine", "ok", "here"), Finding("more", "ok", "too")]

    begun = time.monotonic()
    findings = run_checks({"a": hanging, "b": fine, "c": broken, "d": fine}, machine(Path(".")), seconds=0.5)
    assert time.monotonic() - begun < 2
    assert [(f.name, f.status) for f in findings] == [
        ("a", "warn"),
        ("fine", "ok"),
        ("more", "ok"),
        ("c", "warn"),
        ("fine", "ok"),
        ("more", "ok"),
    ]
    assert "0.5 s" in findings[0].detail and findings[3].detail == "the check failed: RuntimeError: no such thing"


def test_bad_arguments_are_refused_before_anything_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_checks", lambda *a: pytest.fail("looked"))
    with pytest.raises(InputError, match="not a folder"):
        run_doctor(tmp_path / "absent")
    with pytest.raises(InputError, match="absent/report.json"):
        doctor(str(tmp_path / "absent" / "report.json"), str(tmp_path))


def test_what_is_printed_is_literal(capsys):
    print_doctor([Finding("x", "warn", "[red]not markup[/red]", "do [this]"), Finding("y", "ok", "z" * 300)])
    printed = capsys.readouterr().out
    assert "[red]not markup[/red]" in printed and "-> do [this]" in printed and "z" * 300 in printed
    assert "1 ok, 0 missing, 1 to look at" in printed


def test_on_a_terminal_long_lines_break_between_words_and_go_on_below_their_start(monkeypatch, capsys):
    words = [f"word{i}" for i in range(40)]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_doctor([Finding("x", "warn", " ".join(words), " ".join(words)), Finding("y", "ok", "/" + "z" * 200)])
    *lines, path, _, _ = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert path == f"ok      {'y':<15} /{'z' * 200}", "a path stays whole: it can be copied"
    assert max(map(len, lines)) <= 80 and len(lines) < 12
    begin = next(i for i, line in enumerate(lines) if "-> " in line)
    for column, part in ((24, lines[:begin]), (27, lines[begin:])):
        assert " ".join(line[column:] for line in part).split(" ") == words
        assert not "".join(line[:column] for line in part[1:]).strip()


def test_pins_are_read_from_requirements_and_written_nowhere_else(tmp_path):
    lines = [x for x in (REPOSITORY / "requirements.txt").read_text().splitlines() if "==" in x]
    assert len(PINS) == len(lines) >= 5 and f"deepspeed=={PINS['deepspeed']}" in lines
    source = "".join(Path(part.__file__).read_text() for part in (module, checks, probes))
    assert not [version for version in PINS.values() if version in source]
    files(tmp_path, r="a-b==1.2  # why\n# c==3\n-r other.txt\nd>=4\ne.f[x,y]==5.0; python_version > '3'\n")
    assert pinned_versions(tmp_path / "r") == {"a-b": "1.2", "e.f": "5.0"}


def test_packages_are_compared_with_their_pins(tmp_path, monkeypatch):
    installed = {"deepspeed": "9.9", "torch": "2.13.0+cpu", "webdataset": PINS["webdataset"]}

    def version(name):
        if name not in installed:
            raise checks.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(checks.metadata, "version", version)
    found = {f.name: f for f in checks.check_packages(machine(tmp_path))}
    assert found["deepspeed"].status == "warn"
    assert found["deepspeed"].advice == f"pip install deepspeed=={PINS['deepspeed']}"
    assert found["webdataset"].status == "ok" and found["mlflow"].status == "missing"
    assert found["other packages"].status == "warn" and "numpy: not installed" in found["other packages"].detail
    assert checks.package_finding("torch", {"torch": "2.13.0"}, "").status == "ok", "+cpu is a build, not a version"
    assert checks.package_finding("torch", {"torch": "2.12.0"}, "").status == "warn"


def test_apex_is_ok_only_when_both_kernels_are_there(monkeypatch, tmp_path):
    for status, expected in (
        (ApexStatus(False, False, False, False, None, "none"), "missing"),
        (ApexStatus(True, False, False, False, "1", "foreign"), "warn"),
        (ApexStatus(True, True, True, False, "0.1", "half"), "warn"),
        (ApexStatus(True, True, True, True, "0.1", "all"), "ok"),
    ):
        monkeypatch.setattr(checks, "detect_apex", lambda status=status: status)
        (finding,) = checks.check_apex(machine(tmp_path))
        assert finding.status == expected and status.reason in finding.detail
        assert ("pip uninstall apex" in finding.advice) == (status.reason == "foreign")


def statuses(probe: dict, driver: bool = False) -> dict[str, Finding]:
    return {f.name: f for f in checks.torch_findings(probe, "2.13.0", driver)}


def test_torch_versions_gpus_and_communication_are_judged():
    cpu = {"version": "2.13.0+cpu", "cuda": None, "devices": [], "nccl": ""}
    found = statuses(cpu)
    assert [found[n].status for n in ("torch", "GPUs", "NCCL", "gloo")] == ["ok", "missing", "missing", "ok"]
    assert "CUDA build" in statuses(cpu, driver=True)["GPUs"].advice
    h800 = {"version": "2.12.1+cu130", "cuda": "13.0", "devices": [["NVIDIA H800", 80 * 2**30]] * 8, "nccl": "2.28.3"}
    found = statuses(h800, driver=True)
    assert {f.status for f in found.values()} == {"ok"} and found["GPUs"].detail == "8 x NVIDIA H800 (80 GiB)"
    assert "CUDA_VISIBLE_DEVICES" in statuses({**h800, "devices": []}, driver=True)["GPUs"].advice
    for version in ("2.11.0", "2.13.1+cu130"):
        assert statuses({**h800, "version": version})["torch"].status == "ok"
    for version in ("2.10.0", "2.14.0a0+git1", "3.0"):
        assert statuses({**h800, "version": version})["torch"].status == "warn"
    assert "GLOO_SOCKET_IFNAME" in statuses({**cpu, "gloo_error": "no interface"})["gloo"].advice
    assert statuses({"error": "no answer"})["torch"].status == "warn"


def test_a_child_that_dies_or_hangs_is_an_error_and_no_crash(tmp_path, monkeypatch):
    assert "KeyError" in probes.run_probe("unknown")["error"]
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho noise\necho 'Segmentation fault' >&2\nexit 139\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    assert probes.run_probe("torch") == {"error": "Segmentation fault"}
    dying.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(probes, "COMMAND_SECONDS", 0.3)
    begun = time.monotonic()
    assert probes.run_probe("torch") == {"error": "no answer in 0.3 s"}
    (finding,) = checks.check_deepspeed_ops(machine(tmp_path))
    assert finding.status == "warn" and "no answer" in finding.detail and time.monotonic() - begun < 10


def test_deepspeed_tells_its_ops_and_takes_a_machine_without_a_gpu_for_a_cpu(tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(probes, "COMMAND_SECONDS", 60)  # the law is about the answer; a busy machine imports slowly
    (finding,) = checks.check_deepspeed_ops(machine(tmp_path))
    assert finding.status == "ok" and finding.detail.startswith("compiled: ") and "cpu_adam" in finding.detail
    if checks.shutil.which("nvidia-smi") is None and not Path("/dev/nvidiactl").exists():
        assert "deepspeed_shm_comm" in finding.detail, "an op that only the CPU accelerator has"


NVLINK = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    + "".join(
        f"GPU{i}\t" + "\t".join(" X " if i == j else "NV18" for j in range(4)) + "\tPXB\t0-51\t0\t\tN/A\n"
        for i in range(4)
    )
    + "NIC0\tPXB\tPXB\tPXB\tPXB\t X \t\t\t\t\n\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing NVLinks\n"
)
PCIE = "\tGPU0\tGPU1\tGPU2\tCPU Affinity\nGPU0\t X \tPHB\tSYS\t0\nGPU1\tPHB\t X \tSYS\t0\nGPU2\tSYS\tSYS\t X \t8\n"
SINGLE = "\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-51\t0\n"


def test_links_are_counted_once_per_pair():
    assert link_kinds(NVLINK) == {"NV18": 6} and link_kinds(PCIE) == {"PHB": 1, "SYS": 2} and link_kinds(SINGLE) == {}
    assert link_kinds("") == {}


@pytest.mark.parametrize(
    "script, status, detail",
    [
        (f"cat <<'E'\n{NVLINK}\nE", "ok", "NV18 between 6 pairs"),
        (f"cat <<'E'\n{PCIE}\nE", "warn", "PHB between 1 pair, SYS between 2 pairs"),
        (f"cat <<'E'\n{SINGLE}\nE", "ok", "one GPU"),
        ("echo 'driver not loaded' >&2; exit 9", "warn", "driver not loaded"),
    ],
)
def test_gpu_links(commands, tmp_path, script, status, detail):
    commands("nvidia-smi", f"[ \"$1 $2\" = 'topo -m' ] || exit 3\nPATH=/bin:/usr/bin\n{script}")
    (finding,) = checks.check_gpu_links(machine(tmp_path))
    assert finding.status == status and detail in finding.detail
    os.unlink(tmp_path / "bin" / "nvidia-smi")
    assert checks.check_gpu_links(machine(tmp_path)) == []


def test_infiniband_ports(tmp_path):
    look = lambda: checks.check_infiniband(machine(tmp_path, root=tmp_path))[0]  # noqa: E731
    assert look().status == "missing"
    port = "sys/class/infiniband/mlx5_{}/ports/1/{}"
    files(tmp_path, **{port.format(0, "state"): "1: DOWN\n", port.format(0, "rate"): "10 Gb/sec (4X)\n"})
    assert look().status == "warn" and "mlx5_0 port 1" in look().detail
    files(tmp_path, **{port.format(1, "state"): "4: ACTIVE\n", port.format(1, "rate"): "400 Gb/sec (4X NDR)\n"})
    assert look() == Finding("InfiniBand", "ok", "mlx5_1 port 1 (400 Gb/sec (4X NDR), 4: ACTIVE)")


def test_slurm_absent_answering_dead_and_hanging(commands, tmp_path, monkeypatch):
    look = lambda: checks.check_slurm(machine(tmp_path))[0]  # noqa: E731
    assert look().status == "missing" and "no sbatch, srun, scontrol, sinfo" in look().detail
    for name in ("srun", "scontrol", "sbatch"):
        commands(name, "echo slurm 22.05.8")
    assert look().status == "missing" and "no sinfo" in look().detail
    commands("sinfo", "echo 'gpu*    4  idle'; echo 'cpu  2  down'")
    assert look() == Finding("Slurm", "ok", "slurm 22.05.8; partition, nodes, state: gpu* 4 idle; cpu 2 down")
    commands("sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    assert look().status == "warn" and "Unable to contact" in look().detail and "scontrol ping" in look().advice
    monkeypatch.setattr(probes, "COMMAND_SECONDS", 0.3)
    commands("sinfo", "exec /bin/sleep 60")
    assert look().status == "warn" and "no answer in 0.3 s" in look().detail


def test_tracking_store_is_really_written_and_its_absence_explained(tmp_path):
    (good,) = checks.check_tracking_store(machine(tmp_path))
    assert good.status == "ok" and not list(tmp_path.iterdir())
    (bad,) = checks.check_tracking_store(machine(Path("/proc")))
    assert bad.status == "warn" and "tracking.uri" in bad.advice
    assert "error" in probes.run_probe("sqlite", str(tmp_path / "absent"))


def test_memory_honours_the_limit_of_the_container(tmp_path):
    meminfo = "MemTotal:       67108864 kB\nMemFree:  1 kB\nMemAvailable:   33554432 kB\n"
    files(tmp_path, **{"proc/meminfo": meminfo, "sys/fs/cgroup/memory.max": "max\n"})
    (free,) = checks.check_memory(machine(tmp_path, root=tmp_path))
    assert (free.status, free.detail) == ("ok", "64 GiB, 32 GiB available")
    files(tmp_path, **{"sys/fs/cgroup/memory.max": str(2 * 2**30)})
    (tight,) = checks.check_memory(machine(tmp_path, root=tmp_path))
    assert tight.status == "warn" and "limited to 2 GiB" in tight.detail


def test_small_limits_are_warned_about_with_the_command_that_lifts_them(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.os, "sched_getaffinity", lambda _: {3})
    monkeypatch.setattr(checks.resource, "getrlimit", lambda _: (1024, 20000))
    usage = type("Usage", (), {"free": 64 * 2**20})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    found = {f.name: f for f in [*checks.check_limits(machine(tmp_path)), *checks.check_disk(machine(tmp_path))]}
    assert {f.status for f in found.values()} == {"warn"}
    assert "ulimit -n 20000" in found["open files"].advice and "--shm-size" in found["/dev/shm"].advice
    monkeypatch.setattr(checks.resource, "getrlimit", lambda _: (checks.resource.RLIM_INFINITY,) * 2)
    assert checks.check_limits(machine(tmp_path))[2].status == "ok"
