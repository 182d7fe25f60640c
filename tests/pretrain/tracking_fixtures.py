"""Fixtures of the tracking tests (a pytest plugin): a store that is quick to make, a server, a proxy before it, a run folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.pretrain.mlflow_server import Proxy, Server


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A database with MLflow's tables and nothing in it: made once, since that takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("empty-store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").get_experiment_by_name("none")
    return path


@pytest.fixture
def store(empty_store, tmp_path) -> str:
    """The address of a fresh sqlite store."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="module")
def server(empty_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow-server")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    running = Server(folder, folder / "mlflow.db")
    running.start()
    yield running
    running.kill()


@pytest.fixture
def proxy(server):
    before = Proxy(server.port)
    yield before
    before.close()


@pytest.fixture
def run(tmp_path) -> Path:
    """An empty run folder."""
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    return folder
