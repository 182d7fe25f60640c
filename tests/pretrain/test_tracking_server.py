"""A real MLflow server that is killed, and one that breaks in every way a proxy can: no step waits, no point is lost or doubled."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

import pytest

from pretrain.tracking import mlflow_run, shipper
from pretrain.tracking.artifacts import ship_artifacts
from pretrain.tracking.metric_log import MetricLog
from pretrain.tracking.shipper import Shipper
from pretrain.tracking.shipping import read_state, ship
from pretrain.tracking.system_spool import SystemSpool
from tests.pretrain.mlflow_server import points, runs_of, spooled, stored

pytest_plugins = ("tests.pretrain.tracking_fixtures",)

STEPS = 200
COMPUTE_SECONDS = 0.005  # a step of the loop beside its tracking


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The same pauses and time-outs, shorter."""
    monkeypatch.setattr(shipper, "SHIP_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(shipper, "ARTIFACTS_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(shipper, "LONGEST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(mlflow_run, "CREATE_PATIENCE", 3.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@pytest.fixture
def experiment() -> str:
    return f"e-{uuid.uuid4().hex[:8]}"


def loop(run: Path, uri: str, experiment: str, run_id: str | None = None, steps: range = range(1, STEPS + 1)):
    """A training loop: (the shipper, seconds of each call into tracking)."""
    began = time.perf_counter()
    shipping = Shipper(run, uri, experiment, "r", {"train": {"steps": STEPS}}, run_id)
    log = MetricLog(run)
    took = [time.perf_counter() - began]
    for step in steps:
        time.sleep(COMPUTE_SECONDS)
        began = time.perf_counter()
        log.write(step, {"train/loss": step / 2})
        if step % 50 == 0:  # what a checkpoint does
            log.sync()
            read_state(run).get("run_id")
        took.append(time.perf_counter() - began)
    log.close()
    return shipping, took


def settle(run: Path, uri: str, experiment: str) -> None:
    """`track sync` until it finds nothing left."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if ship(run, uri, experiment, "r", {}, wait=10.0) == 0:
                return
        except Exception:
            time.sleep(0.2)
    pytest.fail("the tracker did not take the rest")


FAULTS = {
    "refused": "a tracking server that refuses connections from the start",
    "500": "a tracking server that answers every call with 500",
    "429": "a tracking server that answers every call with 429",
    "black hole": "a tracking server that takes connections and never answers",
    "slow": "a tracking server that takes its time for every answer",
    "answer lost": "a tracking server that does what it is asked and whose answers are lost",
    "500 behind": "a tracking server that does what it is asked and answers 500",
}
HAPPENS = "training goes on; metrics stay in the run folder and are shipped, once, when the server is whole"


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=pytest.mark.fault(said, happens=HAPPENS, lost="nothing"))
        for name, said in FAULTS.items()
    ],
)
def test_a_broken_server_never_holds_a_step_up_and_gets_every_point_once_when_it_is_whole(
    fault, proxy, run, experiment, server, measured
):
    if fault == "refused":
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
    else:
        proxy.mode, uri = fault, proxy.uri
    shipping, took = loop(run, uri, experiment)
    began = time.monotonic()
    error = shipping.close(seconds=3.0)
    assert time.monotonic() - began < 4.0
    if fault != "slow":
        assert error is not None, "a tracker that takes nothing must be reported"
    if fault in ("refused", "500", "429"):
        assert error != "still busy", "the client itself must not retry: that takes minutes"
    if fault != "refused":
        assert proxy.calls[fault] > 0
    measured(
        f"time in tracking calls of {STEPS} steps", f"{sum(took) * 1e3:.0f} ms, the longest {max(took) * 1e3:.0f} ms"
    )
    assert sum(took) < 0.5 and max(took) < 0.3, "one call that waited for the tracker would take its time-out of 2 s"
    proxy.mode = "ok"
    proxy.released.set()
    settle(run, proxy.uri, experiment)
    assert len(runs_of(server.uri, experiment)) == 1
    assert stored(server.uri, read_state(run)["run_id"], "train/loss") == spooled(run, "train/loss")


def test_a_server_that_breaks_and_heals_in_mid_run_gets_every_point_once(proxy, run, experiment, server):
    shipping = Shipper(run, proxy.uri, experiment, "r", {"train": {"steps": STEPS}}, None)
    log = MetricLog(run)
    for at, fault in enumerate(["ok", "answer lost", "500 behind", "ok", "500", "answer lost"]):
        proxy.mode = fault
        for step in range(at * 50 + 1, at * 50 + 51):
            log.write(step, {"train/loss": step / 2})
            time.sleep(0.01)
    log.close()
    proxy.mode = "ok"
    assert shipping.close(seconds=30.0) is None
    assert proxy.calls["answer lost"] > 1 and proxy.calls["500 behind"] > 1
    (found,) = runs_of(server.uri, experiment)
    assert found.info.status == "FINISHED" and found.data.params == {"train.steps": str(STEPS)}
    assert stored(server.uri, found.info.run_id, "train/loss") == spooled(run, "train/loss")
    assert len(spooled(run, "train/loss")) == 300


def test_the_server_itself_keeps_a_point_that_is_sent_twice_once(server, experiment):
    """Over its own protocol, as an answer that was lost leads to."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(server.uri)
    run_id = client.create_run(client.create_experiment(experiment)).info.run_id
    for _ in range(2):
        client.log_batch(run_id, [Metric("m", 0.1 + 0.2, 1000, 7), Metric("m", 1e-300, 1001, 8)])
    assert stored(server.uri, run_id, "m") == [(7, 1000, 0.1 + 0.2), (8, 1001, 1e-300)]


@pytest.mark.fault(
    "a store of files (MLflow's artifacts) that answers 500",
    happens="metrics are shipped as ever; the files go out when it is whole",
    lost="nothing",
)
def test_files_go_through_the_server_and_a_store_of_files_that_is_broken_stops_no_metric(
    proxy, run, experiment, server, capfd
):
    from mlflow import MlflowClient

    proxy.only, proxy.mode = "/mlflow-artifacts/", "500"
    (run / "samples").mkdir()
    (run / "samples" / "step-00000010.txt").write_text("a sample")
    shipping, _ = loop(run, proxy.uri, experiment, steps=range(1, 51))
    error = str(shipping.close(seconds=20.0))
    assert "too many 500 error responses" in error and "config/config.v1.yaml" in error
    assert capfd.readouterr().out == "", "the client prints the run's address if it is let"
    run_id = read_state(run)["run_id"]
    assert stored(server.uri, run_id, "train/loss") == spooled(run, "train/loss")
    assert MlflowClient(server.uri).list_artifacts(run_id) == []
    proxy.mode = "ok"
    assert ship_artifacts(run, proxy.uri, last=True) == 3
    assert ship_artifacts(run, proxy.uri, last=True) == 0
    client = MlflowClient(server.uri)
    names = [f.path for folder in ("config", "code", "samples") for f in client.list_artifacts(run_id, folder)]
    assert names == ["config/config.v1.yaml", "code/code.v1.json", "samples/step-00000010.txt"]
    assert Path(client.download_artifacts(run_id, "samples/step-00000010.txt")).read_text() == "a sample"


def test_system_metrics_of_every_host_are_shipped_once_with_their_times(proxy, run, experiment, server):
    points(run, range(1, 6))
    hosts = {name: SystemSpool(run, name) for name in ("node-1", "node-2.cluster")}
    for step in (1, 1, 2, 1):  # two samples in one long step, and a resume that goes back
        for name, spool in hosts.items():
            spool.append(step, {f"system/{name}/cpu_percent": 10.0 + step})
    proxy.mode = "answer lost"
    for _ in range(2):
        with pytest.raises(Exception, match="failed|lost|aborted"):
            ship(run, proxy.uri, experiment, "r", {})
    proxy.mode = "ok"
    settle(run, proxy.uri, experiment)
    hosts["node-1"].append(3, {"system/node-1/cpu_percent": 99.0})
    settle(run, proxy.uri, experiment)
    run_id = read_state(run)["run_id"]
    assert [(s, v) for s, _, v in stored(server.uri, run_id, "system/node-2.cluster/cpu_percent")] == [
        (1, 11.0),
        (1, 11.0),
        (1, 11.0),
        (2, 12.0),
    ]
    found = stored(server.uri, run_id, "system/node-1/cpu_percent")
    assert len({at for _, at, _ in found}) == 5 and found[-1][::2] == (3, 99.0)


@pytest.mark.fault(
    "SIGKILL of a real MLflow server while points are on their way, twice, and a requeue of the run in between",
    happens="training goes on; one run in MLflow, and every point in it once with its own time when the server is back",
    lost="nothing",
)
@pytest.mark.parity
def test_a_server_that_is_killed_and_started_again_in_mid_run_has_every_point_once(server, run, experiment, measured):
    """SIGKILL while points are on their way, a requeue while it is away, and another SIGKILL."""
    first = Shipper(run, server.uri, experiment, "r", {"train": {"steps": STEPS}}, None)
    log, blocked = MetricLog(run), 0.0
    for step in range(1, 151):
        began = time.perf_counter()
        log.write(step, {"train/loss": step / 2, **({"val/nelbo": step / 4} if step % 5 == 0 else {})})
        blocked += time.perf_counter() - began
        if step == 80:
            until = time.monotonic() + 20
            while not read_state(run).get("shipped") and time.monotonic() < until:
                time.sleep(0.02)
            server.kill()
        time.sleep(0.01)
    log.close()
    assert read_state(run)["shipped"]["train/loss"] < 150
    assert first.close("preempted", seconds=3.0) is not None
    run_id = read_state(run)["run_id"]
    second = Shipper(run, server.uri, experiment, "r", {"train": {"steps": 2 * STEPS}}, run_id)
    log = MetricLog(run)
    for step in range(151, 201):
        log.write(step, {"train/loss": step / 2})
        time.sleep(0.01)
        if step == 170:
            server.start()
        if step == 190:
            server.kill()
    log.close()
    second.close("finished", seconds=1.0)
    measured("time in tracking calls of 150 steps", f"{blocked * 1e3:.0f} ms")
    assert blocked < 0.5
    server.start()
    settle(run, server.uri, experiment)
    (found,) = runs_of(server.uri, experiment)
    assert found.info.run_id == run_id and found.info.status == "FINISHED"
    assert found.data.tags["config.v2.train.steps"].startswith("200 -> 400 (step 150, ")
    for name, count in (("train/loss", 200), ("val/nelbo", 30)):
        points_of = stored(server.uri, run_id, name)
        assert points_of == spooled(run, name) and len(points_of) == count
