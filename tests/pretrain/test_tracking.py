"""The spool is the source of truth; no tracker, however broken, holds the loop up or loses a point."""

from __future__ import annotations

import json
import math
import socket
import time
from pathlib import Path

import pytest

from pretrain import tracking
from pretrain.tracking import MetricLog, Shipper, read_metrics, ship, truncate_metrics


def points(folder: Path, steps: range) -> list[float]:
    """Writes the steps; returns how long each write took, in seconds."""
    log, took = MetricLog(folder), []
    for step in steps:
        began = time.perf_counter()
        log.write(step, {"train/loss": step / 2, "val/nelbo": step / 4} if step % 5 == 0 else {"train/loss": step / 2})
        took.append(time.perf_counter() - began)
        time.sleep(0.002)
    log.close()
    return took


@pytest.fixture(params=["refused", "black hole"])
def dead_uri(request):
    """A tracking server that refuses connections, and one that takes them and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "black hole":
            server.listen(16)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_dead_tracker_never_blocks_a_write_and_a_later_sync_ships_every_point_once(dead_uri, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "SHIP_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 1.0)
    run = tmp_path / "run"
    run.mkdir()
    shipper = Shipper(run, dead_uri, "e", "r", {"a": {"b": 1}}, None)
    took = points(run, range(1, 41))
    began = time.monotonic()
    assert shipper.close() is not None, "a tracker that answers nothing must be reported"
    assert time.monotonic() - began < 10
    assert sum(took) < 5.0, "one call that waited for the tracker would take its whole time-out of 5 s"
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert ship(run, uri, "e", "r", {"a": {"b": 1}}) == 40 + 8
    assert ship(run, uri, "e", "r", {}) == 0
    assert history(uri, run, "train/loss") == [(s, s / 2) for s in range(1, 41)]


def history(uri: str, run: Path, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    return sorted((m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, name))


def test_a_resume_ships_steps_that_are_taken_again_only_if_they_had_not_been_shipped(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = tmp_path / "run"
    run.mkdir()
    points(run, range(1, 11))
    assert ship(run, uri, "e", "r", {}) == 12
    truncate_metrics(run, 6)
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 7))
    points(run, range(7, 16))
    assert ship(run, uri, "e", "r", {}) == 5 + 1  # steps 11..15, and the validation of 15
    assert history(uri, run, "train/loss") == [(s, s / 2) for s in range(1, 16)]
    assert history(uri, run, "val/nelbo") == [(5, 1.25), (10, 2.5), (15, 3.75)]


def test_steps_that_were_shipped_and_are_taken_again_are_named_by_a_tag(tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = tmp_path / "run"
    run.mkdir()
    points(run, range(1, 11))
    ship(run, uri, "e", "r", {})
    truncate_metrics(run, 10)  # a resume that takes nothing again
    ship(run, uri, "e", "r", {})
    truncate_metrics(run, 6)
    ship(run, uri, "e", "r", {})
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    tags = {k: v for k, v in MlflowClient(uri).get_run(run_id).data.tags.items() if k.startswith("rolled_back")}
    assert tags == {"rolled_back.6": "steps 7..10 were taken again"}


def test_a_kill_in_the_middle_of_a_roll_back_leaves_a_spool_that_is_shipped_right(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = tmp_path / "run"
    run.mkdir()
    points(run, range(1, 11))
    ship(run, uri, "e", "r", {})
    for survives in (0, 1):  # killed at the first replacement of a file, then at the second
        sound, left = tracking.os.replace, [survives]

        def die(*names, sound=sound, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            sound(*names)

        with monkeypatch.context() as patch:
            patch.setattr(tracking.os, "replace", die)
            with pytest.raises(KeyboardInterrupt):
                truncate_metrics(run, 6)
        assert ship(run, uri, "e", "r", {}) == 0
    truncate_metrics(run, 6)
    log = MetricLog(run)
    for step in range(7, 13):  # longer lines than before, so that an old offset would point into the middle of one
        log.write(step, {"train/loss": step / 2, "train/of_the_second_try": 0.123456789})
    log.close()
    assert ship(run, uri, "e", "r", {}) == 2 * 2  # steps 11 and 12
    assert history(uri, run, "train/loss") == [(s, s / 2) for s in range(1, 13)]


def test_a_tracker_that_fails_half_way_through_the_start_of_a_run_gets_one_run_with_all_its_params(
    tmp_path, monkeypatch
):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = tmp_path / "run"
    run.mkdir()
    points(run, range(1, 4))
    sound = MlflowClient.log_batch
    failures = iter([True, True, True, False])

    def sometimes(self, *arguments, **options):
        if next(failures, False):
            raise ConnectionError("500")
        return sound(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", sometimes)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            ship(run, uri, "e", "r", {"a": {"b": 1}})
    assert ship(run, uri, "e", "r", {"a": {"b": 1}}) == 3
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert len(runs) == 1 and runs[0].data.params == {"a.b": "1"}


def test_what_was_shipped_is_not_read_again(tmp_path, monkeypatch):
    """The cost of a round follows from what is new, not from how long the run is."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = tmp_path / "run"
    run.mkdir()
    points(run, range(1, 31))
    ship(run, uri, "e", "r", {})
    read = []
    sound = tracking.json.loads
    monkeypatch.setattr(tracking.json, "loads", lambda text, **k: read.append(text) or sound(text, **k))
    points(run, range(31, 33))
    assert ship(run, uri, "e", "r", {}) == 2
    assert len([text for text in read if b"train/loss" in (text if isinstance(text, bytes) else text.encode())]) == 2


def test_a_line_cut_off_by_a_kill_is_left_out_and_does_not_spoil_the_next_one(tmp_path):
    points(tmp_path, range(1, 4))
    with open(tmp_path / tracking.SPOOL, "a") as file:
        file.write('{"step": 4, "train/lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    truncate_metrics(tmp_path, 3)
    points(tmp_path, range(4, 6))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_value_that_is_not_finite_is_kept_as_a_flag_and_the_spool_stays_json(tmp_path):
    log = MetricLog(tmp_path)
    log.write(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.1})
    log.close()
    line = json.loads(
        (tmp_path / tracking.SPOOL).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert line["train/loss"] == "nan" and line["train/grad_norm"] == "inf" and line["train/lr"] == 0.1
    assert line["train/loss_nonfinite"] == line["train/grad_norm_nonfinite"] == 1.0
