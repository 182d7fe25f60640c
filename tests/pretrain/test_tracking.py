"""Whatever becomes of the store, of mlflow.json or of the process: one run, every point in it once, with its own time."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from pretrain.tracking import mlflow_run, shipping
from pretrain.tracking.metric_log import SPOOL, MetricLog, truncate_metrics
from pretrain.tracking.mlflow_run import NotNow
from pretrain.tracking.shipping import read_state, ship, shipping_lock, write_state
from tests.pretrain.mlflow_server import points, runs_of, spooled, stored

pytest_plugins = ("tests.pretrain.tracking_fixtures",)


def shipped(store: str, run: Path, name: str = "train/loss") -> list[tuple[int, int, float]]:
    return stored(store, read_state(run)["run_id"], name)


def test_every_point_is_shipped_once_with_its_own_time(store, run):
    points(run, range(1, 41), pause=0.002)
    assert ship(run, store, "e", "r", {}) == 40 + 8
    assert ship(run, store, "e", "r", {}) == 0
    for name in ("train/loss", "val/nelbo"):
        assert shipped(store, run, name) == spooled(run, name)


def test_the_store_itself_keeps_a_point_that_is_sent_twice_once(store):
    """What the design stands on when an answer is lost: MLflow's key of a point is its name, step, time and value."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(store)
    run_id = client.create_run(client.create_experiment("e")).info.run_id
    for _ in range(2):
        client.log_batch(run_id, [Metric("m", 1.5, 1000, 7), Metric("m", 2.5, 1001, 8)])
    client.log_batch(run_id, [Metric("m", 2.5, 1001, 8), Metric("m", 3.5, 1002, 9)])  # half of it was there
    assert stored(store, run_id, "m") == [(7, 1000, 1.5), (8, 1001, 2.5), (9, 1002, 3.5)]
    client.log_batch(run_id, [Metric("m", 1.5, 1003, 7)])  # another time is another point: why times are kept
    assert len(stored(store, run_id, "m")) == 4


def test_a_resume_ships_steps_that_are_taken_again_only_if_they_had_not_been_shipped(store, run):
    points(run, range(1, 11))
    first = spooled(run, "train/loss")
    assert ship(run, store, "e", "r", {}) == 12
    truncate_metrics(run, 6)
    points(run, range(7, 16))
    assert ship(run, store, "e", "r", {}) == 5 + 1  # steps 11..15, and the validation of 15
    assert shipped(store, run) == first + spooled(run, "train/loss")[10:]
    assert [step for step, _, _ in shipped(store, run, "val/nelbo")] == [5, 10, 15]


def test_steps_that_are_taken_again_are_named_by_a_tag(store, run):
    points(run, range(1, 11))
    ship(run, store, "e", "r", {})
    truncate_metrics(run, 10)  # a resume that takes nothing again
    ship(run, store, "e", "r", {})
    truncate_metrics(run, 6)
    ship(run, store, "e", "r", {})
    log = MetricLog(run)
    for step in range(7, 9):
        log.write(step, {"train/loss": 0.0})
    log.roll_back(3)  # while the run goes on
    log.close()
    ship(run, store, "e", "r", {})
    tags = {k: v for k, v in runs_of(store)[0].data.tags.items() if k.startswith("rolled_back")}
    assert tags == {"rolled_back.6": "steps 7..10 were taken again", "rolled_back.3": "steps 4..8 were taken again"}


def test_a_kill_in_the_middle_of_a_roll_back_leaves_a_spool_that_is_shipped_right(store, run, monkeypatch):
    points(run, range(1, 11))
    ship(run, store, "e", "r", {})
    with monkeypatch.context() as patch:  # killed between what is said of it and the cut

        def die(*ignored: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("pretrain.tracking.metric_log.os.fsync", die)
        with pytest.raises(KeyboardInterrupt):
            truncate_metrics(run, 6)
    assert ship(run, store, "e", "r", {}) == 0
    truncate_metrics(run, 6)
    log = MetricLog(run)
    for step in range(7, 13):  # longer lines than before, so that an old offset would point into the middle of one
        log.write(step, {"train/loss": step / 2, "train/loss_again": 0.123456789})
    log.close()
    assert ship(run, store, "e", "r", {}) == 2 + 6  # steps 11 and 12, and a metric that was never shipped before
    assert [(s, v) for s, _, v in shipped(store, run)] == [(s, s / 2) for s in range(1, 13)]


def test_an_answer_that_was_lost_and_a_resume_behind_it_double_nothing(store, run, monkeypatch):
    """The store took steps 1..10, nobody heard of it, and the run went on from step 6: their times are other ones by now."""
    points(run, range(1, 6))
    ship(run, store, "e", "r", {})
    points(run, range(6, 11))
    with monkeypatch.context() as patch:
        patch.setattr(shipping._Round, "keep", lambda self: None)  # killed before it could note that they were taken
        ship(run, store, "e", "r", {})
    truncate_metrics(run, 6)
    points(run, range(7, 16), pause=0.002)
    ship(run, store, "e", "r", {})
    assert [step for step, _, _ in shipped(store, run)] == list(range(1, 16))


@pytest.mark.fault(
    "mlflow.json is lost or spoilt by a crash",
    happens="the run id comes from the checkpoint, what was shipped from MLflow itself",
    lost="nothing",
)
@pytest.mark.parametrize("loss", ["removed", "spoilt", "old form"])
def test_a_lost_mlflow_json_goes_on_with_the_run_of_the_checkpoint_and_doubles_nothing(loss, store, run):
    points(run, range(1, 11))
    ship(run, store, "e", "r", {"a": 1})
    run_id = read_state(run)["run_id"]
    if loss == "removed":
        (run / "mlflow.json").unlink()
    elif loss == "spoilt":
        (run / "mlflow.json").write_bytes(b"\0" * 80)
    else:  # of an earlier version: steps by kind of metric, an offset without the line before it
        write_state(run, {"run_id": run_id, "shipped": {"train": 10, "val": 10}, "params": True, "offset": 333})
    truncate_metrics(run, 6)
    points(run, range(7, 16))
    ship(run, store, "e", "r", {"a": 1}, run_id=None if loss == "old form" else run_id)
    assert read_state(run)["run_id"] == run_id and len(runs_of(store)) == 1
    assert [step for step, _, _ in shipped(store, run)] == list(range(1, 16))


@pytest.mark.fault(
    "the tracking store is wiped",
    happens="a new run that names the old one, with every point of the run folder",
    lost="nothing",
)
def test_a_store_that_was_wiped_gets_a_new_run_that_names_the_old_one_and_everything_anew(store, run, empty_store):
    points(run, range(1, 11))
    ship(run, store, "e", "r", {"a": 1})
    old = read_state(run)["run_id"]
    other = store.replace("mlflow.db", "other.db")
    shutil.copyfile(empty_store, run.parent.parent / "other.db")
    points(run, range(11, 13))
    assert ship(run, other, "e", "r", {"a": 1}, run_id=old) == 12 + 2
    assert read_state(run)["run_id"] != old
    (found,) = runs_of(other)
    assert found.data.tags["palimpsest.replaces"] == old and found.data.params == {"a": "1"}
    assert shipped(other, run) == spooled(run, "train/loss")
    assert ship(run, other, "e", "r", {"a": 1}, run_id=old) == 0 and len(runs_of(other)) == 1


def test_a_run_that_was_deleted_in_mlflow_is_neither_replaced_nor_written(store, run):
    from mlflow import MlflowClient

    points(run, range(1, 3))
    ship(run, store, "e", "r", {})
    run_id = read_state(run)["run_id"]
    MlflowClient(store).delete_run(run_id)
    with pytest.raises(RuntimeError, match="was deleted in MLflow: restore it"):
        ship(run, store, "e", "r", {})
    MlflowClient(store).restore_run(run_id)
    points(run, range(3, 5))
    assert ship(run, store, "e", "r", {}) == 2


def test_a_creation_whose_answer_was_lost_gives_one_run(store, run, monkeypatch):
    from mlflow import MlflowClient

    points(run, range(1, 4))
    sound = MlflowClient.create_run

    def lost(self, *arguments, **options):
        sound(self, *arguments, **options)
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", lost)
        with pytest.raises(ConnectionError):
            ship(run, store, "e", "r", {})
    assert ship(run, store, "e", "r", {}) == 3
    assert len(runs_of(store)) == 1


def test_a_creation_that_may_still_be_under_way_is_not_repeated(store, run, monkeypatch):
    from mlflow import MlflowClient

    points(run, range(1, 4))

    def slow(self, *arguments, **options):
        raise TimeoutError("no answer yet")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", slow)
        with pytest.raises(TimeoutError):
            ship(run, store, "e", "r", {})
        with pytest.raises(NotNow, match="looked for first"):
            ship(run, store, "e", "r", {})
    monkeypatch.setattr(mlflow_run, "CREATE_PATIENCE", 0.0)
    assert ship(run, store, "e", "r", {}) == 3 and len(runs_of(store)) == 1


def test_a_tracker_that_fails_at_every_call_in_turn_gets_one_run_with_all_of_it(store, run, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setattr(mlflow_run, "CREATE_PATIENCE", 0.0)
    points(run, range(1, 4))
    calls = ("get_experiment_by_name", "create_experiment", "search_runs", "create_run", "log_batch", "get_run")
    failures: dict[str, int] = dict.fromkeys(calls, 1)
    sound_calls = {name: getattr(MlflowClient, name) for name in calls}
    for name, sound in sound_calls.items():

        def sometimes(self, *arguments, name=name, sound=sound, **options):
            if failures[name]:
                failures[name] -= 1
                raise ConnectionError("500")
            return sound(self, *arguments, **options)

        monkeypatch.setattr(MlflowClient, name, sometimes)
    rounds = 0
    while True:
        rounds += 1
        assert rounds < 20
        try:
            sent = ship(run, store, "e", "r", {"a": {"b": 1}})
            break
        except ConnectionError:
            continue
    assert sent == 3 and not any(failures.values())
    (found,) = runs_of(store)
    assert found.data.params == {"a.b": "1"}


def test_what_was_shipped_is_not_read_again(store, run, monkeypatch):
    """The cost of a round follows from what is new, not from how long the run is."""
    points(run, range(1, 31))
    ship(run, store, "e", "r", {})
    read = []
    sound = shipping.parse
    monkeypatch.setattr(shipping, "parse", lambda *arguments: read.append(arguments) or sound(*arguments))
    points(run, range(31, 33))
    assert ship(run, store, "e", "r", {}) == 2
    assert len(read) == 2


def test_a_line_of_more_metrics_than_a_call_takes_and_names_that_mlflow_refuses_are_shipped(store, run):
    wide = {f"data/source {n}/loss": float(n) for n in range(2500)}
    log = MetricLog(run)
    log.write(1, {"train/loss": 1.0})
    log.write(2, wide)
    log.write(3, {"train/loss": 3.0, "val/{odd}*name": 4.0, "x" * 400: 5.0, "/a//b/": 6.0, "..": 7.0})
    log.close()
    assert ship(run, store, "e", "r", {}) == 1 + 2500 + 5
    found = runs_of(store)[0].data.metrics
    assert found["data/source 2499/loss"] == 2499.0 and found["val/_odd__name"] == 4.0
    assert found["x" * 250] == 5.0 and found["a/b"] == 6.0 and found["_"] == 7.0


def test_a_value_that_is_not_finite_is_shipped_as_its_flag(store, run):
    log = MetricLog(run)
    log.write(1, {"train/loss": float("nan"), "train/lr": 0.5})
    log.close()
    assert ship(run, store, "e", "r", {}) == 2
    assert runs_of(store)[0].data.metrics == {"train/loss_nonfinite": 1.0, "train/lr": 0.5}


def _sync_beside(run: str, store: str, done) -> None:
    while not done.is_set():
        try:
            ship(Path(run), store, "e", "r", {}, wait=60.0)
            time.sleep(0.05)  # a lock is taken by who asks first
        except Exception:  # a database that is busy: tried again, as every caller does
            continue


@pytest.mark.parity
def test_two_processes_that_ship_the_same_growing_run_double_nothing(store, run):
    points(run, range(1, 4))
    ship(run, store, "e", "r", {})
    context = multiprocessing.get_context("spawn")
    done = context.Event()
    other = context.Process(target=_sync_beside, args=(str(run), store, done), daemon=True)
    other.start()
    log, step, mine, others = MetricLog(run), 3, 0, 0
    until = time.monotonic() + 60
    try:
        while (others < 5 or mine < 5) and time.monotonic() < until:
            step += 1
            log.write(step, {"train/loss": step / 2})
            mine += ship(run, store, "e", "r", {}, check=False, wait=60.0)
            others = read_state(run)["shipped"]["train/loss"] - 3 - mine
            time.sleep(0.05)
    finally:
        log.close()
        done.set()
        other.join(60)
    assert other.exitcode == 0
    assert mine >= 5 and others >= 5, "both must have shipped some"
    ship(run, store, "e", "r", {})
    assert shipped(store, run) == spooled(run, "train/loss") and len(runs_of(store)) == 1


def test_the_lock_is_free_although_a_process_that_was_forked_meanwhile_still_lives(run):
    with shipping_lock(run, 0.0):
        with pytest.raises(NotNow, match="another process"):
            with shipping_lock(run, 0.0):
                pass
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        with shipping_lock(run, 0.0):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_spool_that_came_back_from_a_backup_is_shipped_from_its_start_and_doubles_nothing(store, run):
    points(run, range(1, 11))
    ship(run, store, "e", "r", {})
    lines = (run / SPOOL).read_bytes().splitlines(keepends=True)
    (run / SPOOL).write_bytes(
        b"".join(lines[:8]) + json.dumps({"step": 12, "time": 5.0, "train/loss": 0.5}).encode() + b"\n"
    )
    assert ship(run, store, "e", "r", {}) == 1
    assert [step for step, _, _ in shipped(store, run)] == [*range(1, 11), 12]
