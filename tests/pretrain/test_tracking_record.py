"""What is recorded beside points: params once, changes as tags, code version, files, how the run stands; no credential anywhere."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from data.errors import InputError
from pretrain.addresses import plain_address
from pretrain.config import Config
from pretrain.load_config import save_config
from pretrain.tracking import artifacts, code_version, shipper
from pretrain.tracking import sync as sync_command
from pretrain.tracking.artifacts import ship_artifacts
from pretrain.tracking.mlflow_run import plain_error
from pretrain.tracking.run_events import read_events, record_state, record_version
from pretrain.tracking.run_tags import cut
from pretrain.tracking.shipper import Shipper
from pretrain.tracking.shipping import read_state, ship
from pretrain.tracking.sync import sync, sync_all
from tests.pretrain.mlflow_server import points, runs_of, spooled, stored

pytest_plugins = ("tests.pretrain.tracking_fixtures",)

FIRST = {"train": {"steps": 1000, "lr": 0.1}, "run": {"name": "r"}, "long": "x" * 9000}


def test_params_are_recorded_once_and_every_change_is_a_tag_of_its_own_version(store, run):
    record_version(run, "config", FIRST, 0)
    ship(run, store, "e", "r", {})
    second = {**FIRST, "train": {"steps": 2000, "lr": 0.1, "new": True}}
    assert record_version(run, "config", second, 500) == 2
    assert record_version(run, "config", second, 600) == 2, "the same config is no new version"
    third = {"train": {"steps": 2000, "lr": 0.2, "new": True}, "run": {"name": "r"}}
    record_version(run, "config", third, 700)  # two versions while the tracker was away
    ship(run, store, "e", "r", {})
    ship(run, store, "e", "r", {})
    (found,) = runs_of(store)
    params, tags = found.data.params, found.data.tags
    assert params["train.steps"] == "1000" and params["train.lr"] == "0.1" and "train.new" not in params
    assert tags["config.version"] == "3"
    changes = {k: v for k, v in tags.items() if k.startswith("config.v") and k != "config.version"}
    assert sorted(changes) == ["config.v2.train.new", "config.v2.train.steps", "config.v3.long", "config.v3.train.lr"]
    assert changes["config.v2.train.steps"].startswith("1000 -> 2000 (step 500, 20")
    assert changes["config.v2.train.new"].startswith("(none) -> True (step 500, ")
    assert changes["config.v3.train.lr"].startswith("0.1 -> 0.2 (step 700, ")
    assert changes["config.v3.long"].startswith("xxx") and " -> (none) (step 700" in changes["config.v3.long"]


def test_a_value_that_is_longer_than_mlflow_takes_is_cut_where_one_sees_it(store, run):
    ship(run, store, "e", "r", FIRST)
    value = runs_of(store)[0].data.params["long"]
    assert len(value) == 6000
    assert value.endswith(" ...[cut, 9000 characters; whole in artifact config/config.v1.yaml]")
    assert cut("y" * 6000, 6000) == "y" * 6000


def test_a_run_whose_params_were_recorded_by_another_config_gets_tags_and_no_refusal(store, run):
    ship(run, store, "e", "r", {"a": 1, "b": 2})
    run_id = read_state(run)["run_id"]
    for name in ("mlflow.json", "events.jsonl"):
        (run / name).unlink()
    record_version(run, "config", {"a": 5, "b": 2, "c": 3}, 7)
    ship(run, store, "e", "r", {}, run_id=run_id)
    (found,) = runs_of(store)
    assert found.data.params == {"a": "1", "b": "2", "c": "3"}
    assert found.data.tags["config.v1.a"].startswith("1 -> 5 (step 7, ")


def test_two_hundred_params_are_more_than_a_call_takes(store, run):
    ship(run, store, "e", "r", {f"key{n}": n for n in range(200)})
    assert len(runs_of(store)[0].data.params) == 200


SECRET = "hunter2"
ADDRESSES = {
    f"https://ann:{SECRET}@host:5000/path": "https://host:5000/path",
    f"postgresql://ann:{SECRET}/x@host/db?password={SECRET}": "postgresql://host/db",
    f"mysql+pymysql://ann:{SECRET}@host/db": "mysql+pymysql://host/db",
    f"https://host/set?X-Amz-Signature={SECRET}": "https://host/set",
    "s3://bucket/run@v2/shards": "s3://bucket/run@v2/shards",
    "sqlite:////runs/mlflow.db": "sqlite:////runs/mlflow.db",
    "no address, but an @ and a ?": "no address, but an @ and a ?",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_shown_without_what_gives_access(address):
    assert plain_address(address) == ADDRESSES[address]
    assert plain_address(f"at '{address}' it is") == f"at '{ADDRESSES[address]}' it is"


def test_no_credential_reaches_a_file_of_the_run_the_store_or_a_message(store, run, monkeypatch, capfd, tmp_path):
    """Of the config's addresses, of the environment, and of what a client's error says about the address that it called."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(shipper, "SHIP_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(shipper, "ARTIFACTS_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(shipper, "SAY_AFTER_SECONDS", 0.0)
    config = {"tracking": {"uri": f"http://ann:{SECRET}@127.0.0.1:9"}, "data": {"shards": list(ADDRESSES)}}
    points(run, range(1, 3))
    said: list[str] = []
    away = Shipper(run, f"http://ann:{SECRET}@127.0.0.1:9", "e", "r", config, None, say=said.append)
    error = away.close("failed", seconds=20.0)
    assert error and "127.0.0.1:9" in error
    assert SECRET not in error and SECRET not in "".join(said)
    ship(run, store, "e", "r", config)
    assert ship_artifacts(run, store, last=True) == 2
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(everything) > 5 and not any(SECRET.encode() in content for content in everything)
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    assert SECRET not in plain_error(RuntimeError("x" * 380 + f"https://ann:{SECRET}@host/"))


def test_the_code_version_is_the_commit_and_what_differs_from_it(tmp_path):
    root = tmp_path / "code"
    for package in code_version.PACKAGES:
        (root / package).mkdir(parents=True)
        (root / package / "a.py").write_text(f"# {package}\n")

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    plain = code_version.code_version(root)
    assert "git" not in plain and plain["files"]["count"] == 3 and plain["versions"]["torch"]
    git("init", "-q")
    git("remote", "add", "origin", f"https://ann:{SECRET}@host/code.git")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    clean = code_version.code_version(root)
    assert clean["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False} and clean["files"] == plain["files"]
    (root / "data" / "a.py").write_text("# changed\n")
    dirty = code_version.code_version(root)
    diff = subprocess.run(["git", "-C", str(root), "diff", "HEAD", "--binary"], capture_output=True).stdout
    assert dirty["git"]["dirty"] and dirty["git"]["diff_sha256"] == hashlib.sha256(diff).hexdigest()
    assert dirty["files"]["sha256"] != plain["files"]["sha256"]
    assert SECRET not in json.dumps(dirty)
    inside = root / "runs" / "copy"  # a copy inside another repository is not that repository's commit
    for package in code_version.PACKAGES:
        shutil.copytree(root / package, inside / package)
    copied = code_version.code_version(inside)
    assert "git" not in copied and copied["files"] == dirty["files"]


def artifact_text(store: str, run: Path, name: str) -> str:
    from mlflow import MlflowClient

    return Path(MlflowClient(store).download_artifacts(read_state(run)["run_id"], name)).read_text()


def test_configs_code_versions_and_samples_are_kept_as_files_each_once(store, run):
    record_version(run, "config", FIRST, 0)
    record_version(run, "code", {"git": {"commit": "c1", "dirty": False}, "versions": {"torch": "2.13.0"}}, 0)
    assert ship_artifacts(run, store, last=True) == 0, "there is no run yet"
    ship(run, store, "e", "r", {})
    (run / "samples").mkdir()
    for step in (10, 20):
        (run / "samples" / f"step-{step:08d}.txt").write_text(f"sample of {step}")
    assert ship_artifacts(run, store) == 2, "samples of this moment may not be whole"
    assert ship_artifacts(run, store, last=True) == 2
    assert ship_artifacts(run, store, last=True) == 0
    record_version(run, "config", {**FIRST, "more": 1}, 30)
    record_version(run, "code", {"git": {"commit": "c2", "dirty": True}, "versions": {"torch": "2.13.0"}}, 30)
    (run / "samples" / "step-00000020.txt").write_text("taken again, after a roll-back")
    assert ship_artifacts(run, store, last=True) == 3
    ship(run, store, "e", "r", {})
    assert yaml.safe_load(artifact_text(store, run, "config/config.v1.yaml")) == FIRST
    assert yaml.safe_load(artifact_text(store, run, "config/config.v2.yaml")) == {**FIRST, "more": 1}
    assert json.loads(artifact_text(store, run, "code/code.v2.json"))["git"] == {"commit": "c2", "dirty": True}
    assert artifact_text(store, run, "samples/step-00000010.txt") == "sample of 10"
    assert artifact_text(store, run, "samples/step-00000020.txt") == "taken again, after a roll-back"
    tags = runs_of(store)[0].data.tags
    assert tags["code.git.commit"] == tags["mlflow.source.git.commit"] == "c2" and tags["code.version"] == "2"
    assert tags["code.v2.git.commit"].startswith("c1 -> c2 (step 30, ") and tags["code.versions.torch"] == "2.13.0"


@pytest.mark.fault(
    "a store of files (MLflow's artifacts) that hangs",
    happens="metrics and the state of the run are shipped as ever; the files go out later",
    lost="nothing",
)
def test_a_store_of_files_that_hangs_holds_no_point_up(store, run, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setattr(shipper, "SHIP_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(shipper, "ARTIFACTS_EVERY_SECONDS", 0.05)
    hanging, released = [], shipper.threading.Event()

    def hang(self, *arguments, **options):
        hanging.append(arguments)
        released.wait(60)
        raise ConnectionError("no bucket")

    monkeypatch.setattr(MlflowClient, "log_text", hang)
    shipping = Shipper(run, store, "e", "r", FIRST, None)
    until = shipper.time.monotonic() + 60
    while not hanging and shipper.time.monotonic() < until:
        shipper.time.sleep(0.02)
    assert hanging
    points(run, range(1, 11))
    error = shipping.close("finished", seconds=5.0)
    assert error == "still busy"
    assert stored(store, read_state(run)["run_id"], "train/loss") == spooled(run, "train/loss")
    assert runs_of(store)[0].info.status == "FINISHED"
    released.set()


@pytest.mark.parametrize("state, status", [("finished", "FINISHED"), ("failed", "FAILED"), ("preempted", "SCHEDULED")])
def test_how_a_run_ended_is_said_and_that_it_goes_on(state, status, store, run, monkeypatch):
    monkeypatch.setattr(shipper, "SHIP_EVERY_SECONDS", 0.05)
    points(run, range(1, 4))
    first = Shipper(run, store, "e", "r", FIRST, None, artifacts=False)
    assert first.close(state, seconds=60.0) is None
    (found,) = runs_of(store)
    assert found.info.status == status and found.data.tags["palimpsest.state"] == state
    assert (found.info.end_time is not None) == (state != "preempted")
    again = Shipper(run, store, "e", "r", FIRST, None, artifacts=False)
    until = shipper.time.monotonic() + 30
    while runs_of(store)[0].info.status != "RUNNING" and shipper.time.monotonic() < until:
        shipper.time.sleep(0.05)
    (found,) = runs_of(store)
    assert found.info.status == "RUNNING" and found.data.tags["palimpsest.state"] == "running"
    assert again.close("finished", seconds=60.0) is None
    assert runs_of(store)[0].info.status == "FINISHED"
    with pytest.raises(ValueError, match="finished"):
        record_state(run, "done", 3)


def test_the_state_goes_out_behind_the_points(store, run, monkeypatch):
    from mlflow import MlflowClient

    points(run, range(1, 4))
    record_state(run, "finished", 3)
    sound = MlflowClient.log_batch

    def refuses_points(self, run_id, metrics=(), **options):
        if metrics:
            raise ConnectionError("500")
        return sound(self, run_id, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", refuses_points)
        with pytest.raises(ConnectionError):
            ship(run, store, "e", "r", {})
    assert runs_of(store)[0].info.status == "RUNNING"
    ship(run, store, "e", "r", {})
    assert runs_of(store)[0].info.status == "FINISHED"


def test_an_event_behind_a_line_that_a_crash_cut_off_is_read(run):
    record_state(run, "running", 0)
    with open(run / "events.jsonl", "a") as file:
        file.write('{"what": "state", "sta')
    record_state(run, "finished", 3)
    assert [event["state"] for event in read_events(run)] == ["running", "finished"]


def configured(folder: Path, uri: str = "") -> Path:
    """A run folder as `train` leaves it."""
    folder.mkdir(parents=True)
    config = Config()
    config.run.dir, config.run.name, config.tracking.uri = "elsewhere", folder.name, uri
    save_config(config, folder / "config.yaml")
    points(folder, range(1, 11))
    return folder


def test_sync_ships_to_the_store_beside_the_run_from_wherever_it_is_called(tmp_path, monkeypatch, empty_store):
    configured(tmp_path / "runs" / "a")
    shutil.copyfile(empty_store, tmp_path / "runs" / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    assert sync("runs/a").startswith(f"12 points shipped to sqlite:///{tmp_path}/runs/mlflow.db, and 1 files")
    assert sync("runs/a").startswith("0 points shipped")
    assert not (tmp_path / "elsewhere").exists()


def test_sync_of_all_runs_goes_on_behind_one_that_fails_and_says_so(tmp_path, store):
    for name in ("a", "b", "c/d"):
        configured(tmp_path / "runs" / name, uri="none" if name == "b" else store)
    said: list[str] = []
    with pytest.raises(InputError, match="1 of 3 runs were not shipped"):
        sync_all(str(tmp_path / "runs"), say=said.append)
    assert ["12 points shipped" in line for line in said] == [True, False, True]
    assert "tracking.uri=none" in said[1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no run folder below"):
        sync_all(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="is no folder"):
        sync_all(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("problem", ["no folder", "no store", "in use"])
def test_what_stops_a_sync_is_one_line(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(sync_command, "WAIT_SECONDS", 0.0)
    run = configured(tmp_path / "r", uri=f"http://ann:{SECRET}@127.0.0.1:9")
    if problem == "no folder":
        with pytest.raises(InputError, match="is no run folder"):
            sync(str(tmp_path))
        return
    if problem == "in use":
        from pretrain.tracking.shipping import shipping_lock

        with (
            shipping_lock(run, 0.0),
            pytest.raises(InputError, match="another process is shipping this run; try again"),
        ):
            sync(str(run))
        return
    with pytest.raises(InputError) as caught:
        sync(str(run))
    assert "did not take the metrics" in str(caught.value) and "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_artifact_names_are_the_ones_that_docs_and_tags_point_to(store, run):
    ship(run, store, "e", "r", FIRST)
    assert [name for name, _, _ in artifacts._wanted(run, True)] == ["config/config.v1.yaml"]
