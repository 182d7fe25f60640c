"""What tracking costs a training loop: `python -m tests.pretrain.tracking_cost` prints the table of docs/tracking.md.

Each row is a loop of 1000 steps of about 10 ms of matrix products, 30 metrics a step, with the time-outs and pauses of a real run.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.tracking.metric_log import MetricLog
from pretrain.tracking.shipper import Shipper
from pretrain.tracking.system_metrics import Host
from pretrain.tracking.system_spool import SystemSpool
from tests.pretrain.mlflow_server import Proxy, Server, free_port

STEPS, METRICS = 1000, 30
ROWS = (
    ("none", "", 0.0),
    ("sqlite", "", 0.0),
    ("a server", "", 0.0),
    ("refused", "", 0.0),
    ("500 on every call", "500", 0.0),
    ("429 on every call", "429", 0.0),
    ("black hole", "black hole", 0.0),
    ("5 s an answer", "slow", 5.0),
)


@dataclass
class Cost:
    """Of one loop: seconds of each step and of each call into tracking, of the close; processor seconds of the second half, of the
    loop's thread and of all others (the first half imports MLflow and makes the store's tables, once).
    """

    steps: list[float]
    calls: list[float]
    closing: float
    mine: float
    others: float
    said: str


def loop(folder: Path, uri: str | None) -> Cost:
    folder.mkdir(parents=True)
    a = torch.randn(700, 700)
    began = time.perf_counter()
    shipper = Shipper(folder, uri, "cost", folder.name, {"train": {"steps": STEPS}}, None) if uri else None
    log = MetricLog(folder)
    calls, steps = [time.perf_counter() - began], []
    thread = process = 0.0
    for step in range(1, STEPS + 1):
        if step == STEPS // 2:
            thread, process = time.thread_time(), time.process_time()
        began = time.perf_counter()
        for _ in range(3):
            a = (a @ a).clamp(-1, 1)
        called = time.perf_counter()
        log.write(step, {f"train/metric_{n}": step / (n + 1) for n in range(METRICS)})
        calls.append(time.perf_counter() - called)
        steps.append(time.perf_counter() - began)
    mine = time.thread_time() - thread
    others = time.process_time() - process - mine
    log.close()
    began = time.perf_counter()
    said = (shipper.close() if shipper else None) or "-"
    return Cost(steps, calls, time.perf_counter() - began, mine, others, said)


def main(wanted: list[str]) -> None:
    """wanted: rows, all by default."""
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="tracking-cost-"))
    server = Server(root, root / "mlflow.db")
    try:
        server.start()
        print(
            "| tracker | median step, ms | in tracking calls, ms a step | longest call, ms | "
            "other threads, % of the loop's processor time | close, s |\n|---|---|---|---|---|---|"
        )
        for name, mode, delay in [row for row in ROWS if not wanted or row[0] in wanted]:
            proxy = Proxy(server.port)
            proxy.mode, proxy.delay = mode or "ok", delay
            uri = {
                "none": None,
                "sqlite": f"sqlite:///{root}/own.db",
                "refused": f"http://127.0.0.1:{free_port()}",
            }.get(name, proxy.uri)
            cost = loop(root / f"{name}-{time.time_ns()}".replace(" ", "-"), uri)
            print(
                f"| {name} | {statistics.median(cost.steps) * 1e3:.1f} | {sum(cost.calls) / STEPS * 1e3:.3f} | "
                f"{max(cost.calls) * 1e3:.1f} | {cost.others / cost.mine * 100:.2f} | {cost.closing:.1f} |",
                flush=True,
            )
            print(f"  closed: {cost.said[:150]}", file=sys.stderr)
            proxy.close()
        _single_calls(root)
    finally:
        server.kill()
        shutil.rmtree(root, ignore_errors=True)


def _single_calls(root: Path) -> None:
    folder = root / "single"
    folder.mkdir()
    log, count = MetricLog(folder), 20_000
    metrics = {f"train/metric_{n}": n / 7 for n in range(METRICS)}
    began, processor = time.perf_counter(), time.thread_time()
    for step in range(count):
        log.write(step, metrics)
    wall, processor = time.perf_counter() - began, time.thread_time() - processor
    print(
        f"\nMetricLog.write, {METRICS} metrics: {processor / count * 1e6:.0f} us of processor, {wall / count * 1e6:.0f} us of time"
    )
    began = time.perf_counter()
    log.roll_back(count - 1000)
    print(f"roll back by 1000 of {count} steps: {(time.perf_counter() - began) * 1e3:.1f} ms")
    log.close()
    host, spool = Host(folder), SystemSpool(folder, "h")
    began = time.thread_time()
    for step in range(200):
        spool.append(step, {f"system/h/{name}": value for name, value in host.sample().items()})
    each = (time.thread_time() - began) / 200
    size = spool.path.stat().st_size / 200
    print(
        f"system sample: {each * 1e3:.2f} ms of processor time, {each / 30 * 100:.4f}% of a core at 30 s; {size:.0f} bytes"
    )
    spool.close()


if __name__ == "__main__":
    main(sys.argv[1:])
