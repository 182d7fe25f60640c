"""What a host does while it trains: processor, memory, disk, network, GPUs. One thread of one process a host."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import psutil

from pretrain.launch import rank_and_world
from pretrain.tracking.gpu_metrics import Gpus
from pretrain.tracking.spool import say_on_stderr
from pretrain.tracking.system_spool import SystemSpool, claim_name

_GIB = 2**30
_INFINIBAND = Path("/sys/class/infiniband")
_WORD = 4  # bytes; port_xmit_data and port_rcv_data count words of four (Linux, Documentation/ABI/stable/sysfs-class-infiniband)


class Host:
    """Readings of this host. Rates are means since the reading before, so the first one has none."""

    def __init__(self, folder: Path, gpus: Optional[Gpus] = None, infiniband: Path = _INFINIBAND):
        self._folder, self._infiniband = folder, infiniband
        self._gpus = Gpus() if gpus is None else gpus
        psutil.cpu_percent()  # begins its first interval
        self._moved, self._at = self._bytes_moved(), time.monotonic()

    def sample(self) -> dict[str, float]:
        """Names as they stand behind `system/HOST/`. What the machine cannot say is left out."""
        memory = psutil.virtual_memory()
        found = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_used_gib": round((memory.total - memory.available) / _GIB, 3),
            "memory_percent": memory.percent,
        }
        with contextlib.suppress(OSError):
            disk = psutil.disk_usage(str(self._folder))
            found |= {"disk_free_gib": round(disk.free / _GIB, 3), "disk_used_percent": disk.percent}
        moved, at = self._bytes_moved(), time.monotonic()
        for name, count in moved.items():
            before = self._moved.get(name, count)
            if count >= before and at > self._at:  # a counter that began anew has no rate
                found[f"{name}_mb_per_second"] = round((count - before) / (at - self._at) / 1e6, 3)
        self._moved, self._at = moved, at
        return found | self._gpus.sample()

    def _bytes_moved(self) -> dict[str, int]:
        moved: dict[str, int] = {}
        with contextlib.suppress(Exception):  # psutil without /proc/net
            ports = psutil.net_io_counters(pernic=True)
            real = [name for name in ports if (Path("/sys/class/net") / name / "device").exists()]
            real = real or [name for name in ports if name != "lo"]  # a container has no hardware of its own
            moved["network_sent"] = sum(ports[name].bytes_sent for name in real)
            moved["network_received"] = sum(ports[name].bytes_recv for name in real)
        for file, name in (("port_xmit_data", "infiniband_sent"), ("port_rcv_data", "infiniband_received")):
            for counter in self._infiniband.glob(f"*/ports/*/counters/{file}"):
                with contextlib.suppress(OSError, ValueError):
                    moved[name] = moved.get(name, 0) + _WORD * int(counter.read_text())
        return moved


class SystemMetrics:
    """A daemon thread that writes RUN/system-HOST.jsonl every `every` seconds; `step()` is the training step of the moment.

    Its x-axis is the training step, as that of every other metric, so a dip in throughput and a GPU that got hot stand
    above each other; by time MLflow shows it anyway. One process a host starts it (local rank 0). Of two hosts of one name the
    second is HOST-rN, N being that process's rank.
    """

    def __init__(
        self,
        run_folder: Path,
        every: float,
        step: Callable[[], int],
        host: str = "",
        say: Callable[[str], None] = say_on_stderr,
        rank: Optional[int] = None,
    ):
        """host, rank: this host's own name and this process's rank, unless given."""
        self._every, self._step = every, step
        self._host = host or socket.gethostname()
        self._rank = rank_and_world(os.environ)[0] if rank is None else rank
        self._folder, self._say = run_folder, say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        held: Optional[int] = None
        try:
            name, held = claim_name(self._folder, self._host, self._rank)
            host, spool = Host(self._folder), SystemSpool(self._folder, name, self._say)
            while not self._stop.wait(self._every):
                self._sample(host, spool, name)
            self._sample(host, spool, name)  # a run shorter than the interval has one sample too
            spool.close()
        except Exception as error:  # a machine that cannot be read is no reason to stop
            self._say(f"system metrics end here: {type(error).__name__}: {error}")
        finally:
            if held is not None:
                os.close(held)

    def _sample(self, host: Host, spool: SystemSpool, name: str) -> None:
        spool.append(self._step(), {f"system/{name}/{what}": value for what, value in host.sample().items()})

    def close(self, seconds: float = 2.0) -> None:
        """Takes a last sample; does not wait longer than `seconds` for a file system that hangs."""
        self._stop.set()
        self._thread.join(seconds)
