"""A real Slurm on this machine alone: one controller and some nodes, all on 127.0.0.1.

    python -m tests.slurm.lab up [--folder build/slurm-lab] [--nodes 4]     starts it, or says that it runs; prints SLURM_CONF
    python -m tests.slurm.lab down [--folder build/slurm-lab]               stops it

Everything it writes lies in the folder: keys, sockets, state, logs. Its timers are short, so that what takes minutes on a
cluster takes seconds here: a requeued job waits `cred_expire`, a killed one has `KillWait` (both slurm.conf(5)). Two partitions:
`lab`, whose jobs are preempted (requeued) by those of `urgent`.
"""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "slurm-lab"
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "sinfo")
READY_SECONDS = 60
PORTS = range(17000, 30000, 32)  # below what the kernel hands out by itself

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
MpiDefault=none
JobRequeue=1
ReturnToService=1
KillWait=5
MinJobAge=1200
MessageTimeout=20
SlurmctldTimeout=60
SlurmdTimeout=60
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
{nodes}
PartitionName=lab Nodes=n[1-{count}] Default=YES PriorityTier=1 GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n[1-{count}] PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class LabError(RuntimeError):
    """Why there is no lab, and what to do, in one line."""


@dataclass(frozen=True)
class Lab:
    """One lab, running or not; all of it lies in `folder`."""

    folder: Path = FOLDER
    count: int = 4
    cpus: int = 8
    gpus: int = 2

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    def environment(self, **extra: str) -> dict[str, str]:
        """This process's environment, in which Slurm's commands speak to this lab."""
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**outside, "SLURM_CONF": str(self.conf), **extra}

    def ask(self, *command: str, **extra: str) -> str:
        """What one of Slurm's commands prints, `extra` in its environment; LabError if it fails."""
        done = subprocess.run(command, env=self.environment(**extra), text=True, capture_output=True, timeout=60)
        if done.returncode:
            raise LabError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout.strip()

    def runs(self) -> bool:
        """Whether every daemon of it is alive and every node can take jobs."""
        daemons = ["munged", "slurmctld", *(f"slurmd.n{i}" for i in range(1, self.count + 1))]
        if not all(self.pid(name) for name in daemons):
            return False
        try:
            return len(self._usable()) == self.count
        except (LabError, subprocess.TimeoutExpired):
            return False

    def up(self) -> None:
        """Starts what does not run and waits until every node is idle; LabError after READY_SECONDS."""
        install()
        if self.runs():
            return
        self.down()
        for name in ("etc", "run", "log", "state", "spool", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name).chmod(0o755)  # munged trusts no folder that others may write to
        self._write_key()
        self._write_conf()
        self._start(
            *("munged", "--force", f"--key-file={self.folder}/etc/munge.key", f"--socket={self.folder}/run/munge.sock"),
            *(f"--pid-file={self.folder}/run/munged.pid", f"--log-file={self.folder}/log/munged.log"),
            *(f"--seed-file={self.folder}/state/munge.seed", "--num-threads=2"),
        )
        self._start("slurmctld", "-f", str(self.conf))
        for i in range(1, self.count + 1):
            (self.folder / "spool" / f"n{i}").mkdir(exist_ok=True)
            self._start("slurmd", "-f", str(self.conf), "-N", f"n{i}")
        self._until(self.runs, "idle")

    def down(self) -> None:
        """Ends its jobs and daemons, whatever of them is left."""
        if self.pid("slurmctld"):
            subprocess.run(
                ["scancel", f"--user={getpass.getuser()}"],
                env=self.environment(),
                capture_output=True,
                timeout=30,
                check=False,
            )
        names = [f"slurmd.n{i}" for i in range(1, self.count + 1)] + ["slurmctld", "munged"]
        for name in names:
            if pid := self.pid(name):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while (alive := [pid for name in names if (pid := self.pid(name))]) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        for name in names:
            (self.folder / "run" / f"{name}.pid").unlink(missing_ok=True)

    def clear(self) -> None:
        """No jobs, every node up; LabError if that takes longer than READY_SECONDS."""
        for job in self.ask("squeue", "-h", "-o", "%A").splitlines():
            self.ask("scancel", job)
        for line in self.ask("sinfo", "-h", "-N", "-o", "%N %T").splitlines():
            node, state = line.split()
            if state.startswith(("down", "drain")):
                self.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self._until(lambda: not self.ask("squeue", "-h") and self.runs(), "free")

    def _until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not done():
            if time.monotonic() > deadline:
                raise LabError(f"the lab's nodes were not {what} after {READY_SECONDS} s: see {self.folder}/log")
            time.sleep(0.2)

    def _usable(self) -> list[str]:
        """Nodes that take jobs or run some."""
        nodes = dict(line.split() for line in self.ask("sinfo", "-h", "-N", "-o", "%N %T").splitlines())
        return [node for node, state in nodes.items() if state in ("idle", "mixed", "allocated")]

    def pid(self, daemon: str) -> int:
        """Its process, 0 if there is none; a stale file that names another program's counts for nothing."""
        try:
            pid = int((self.folder / "run" / f"{daemon}.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return 0
        name, _, node = daemon.partition(".")
        return (
            pid if name.encode() in command and str(self.folder).encode() in command and node.encode() in command else 0
        )

    def _start(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment(), text=True, capture_output=True, timeout=30)
        if done.returncode:
            raise LabError(f"{command[0]} did not start ({done.stderr.strip()[:300]}): see {self.folder}/log")

    def _write_key(self) -> None:
        key = self.folder / "etc" / "munge.key"
        if not key.exists():
            with open(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
                file.write(os.urandom(1024))

    def _write_conf(self) -> None:
        port = _free_ports(self.count + 1)
        names = range(1, self.count + 1)
        nodes = [f"NodeName=n{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port + i}" for i in names]
        devices = [self.folder / "dev" / f"n{i}-gpu{g}" for i in names for g in range(self.gpus)]
        for device in devices:  # any file will do: nothing confines jobs to devices here
            device.touch()
        gres = [f"NodeName=n{i} Name=gpu File={self.folder}/dev/n{i}-gpu[0-{self.gpus - 1}]" for i in names]
        (self.folder / "etc" / "gres.conf").write_text("\n".join(gres) + "\n")
        values = {"folder": self.folder, "user": getpass.getuser(), "port": port, "count": self.count}
        self.conf.write_text(SLURM_CONF.format(nodes="\n".join(nodes), cpus=self.cpus, gpus=self.gpus, **values))


def install() -> None:
    """Debian's packages, where they are missing and we may; LabError else."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if not missing:
        return
    command = f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise LabError(f"{', '.join(missing)} not found: as root, {command}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["apt-get", "update", "-qq"], [*command.split(), "-y", "-qq"]):
        done = subprocess.run(step, env=quiet, text=True, capture_output=True, timeout=600)
        if done.returncode:
            raise LabError(f"{' '.join(step)}: {done.stderr.strip()[-300:]}")


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nothing listens on: another lab may run on this machine."""
    for base in PORTS:
        if all(_is_free(base + i) for i in range(count)):
            return base
    raise LabError(f"no {count} free ports in a row between {PORTS.start} and {PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.lab", description="A Slurm on this machine alone")
    parser.add_argument("what", choices=("up", "down"))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where all of it lies")
    parser.add_argument("--nodes", type=int, default=4)
    options = parser.parse_args(arguments)
    lab = Lab(options.folder.resolve(), options.nodes)
    try:
        if options.what == "down":
            lab.down()
            return 0
        began = time.monotonic()
        lab.up()
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(lab.ask("sinfo", "-N", "-o", "%N %T %c cpus %G"))
    print(f"ready after {time.monotonic() - began:.1f} s; for Slurm's commands in this shell:")
    print(f"export SLURM_CONF={lab.conf}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
