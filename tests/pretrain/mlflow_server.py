"""A real MLflow server that can be killed, a proxy before it that breaks in chosen ways, and what a store holds."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pretrain.tracking.metric_log import MetricLog

START_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`mlflow server` on a database file of its own; SIGKILL ends it, `start` begins it again at the same address."""

    def __init__(self, folder: Path, database: Path):
        self.folder, self.database, self.port = folder, database, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}"]
            + ["--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1"]
            + ["--port", str(self.port), "--workers", "1"],
            cwd=self.folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=open(self.folder / "server.log", "ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.1)
        self.kill()
        pytest.fail(f"mlflow server did not start: {(self.folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait(30)
            self._process = None


class Proxy:
    """Before a server. `mode` says what becomes of a call whose path holds `only`:

    ok · 500, 429: refused · black hole: taken, never answered · slow: answered after `delay` seconds · answer lost: done
    by the server, then the connection is closed · 500 behind: done by the server, answered with 500.
    """

    def __init__(self, server_port: int):
        self.mode, self.only, self.delay = "ok", "", 0.5
        self.calls: Counter[str] = Counter()
        self.released = threading.Event()  # ends the black holes at the end of a test
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0) or 0))
                mode = proxy.mode if proxy.only in self.path else "ok"
                proxy.calls[mode] += 1
                if mode == "black hole":
                    proxy.released.wait(60)
                    self.close_connection = True
                    return
                if mode == "slow":
                    time.sleep(proxy.delay)
                if mode in ("500", "429"):
                    return self._answer(
                        int(mode), b'{"error_code": "INTERNAL_ERROR", "message": "no"}', "application/json"
                    )
                connection = http.client.HTTPConnection("127.0.0.1", server_port, timeout=30)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if mode == "answer lost":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status = 500 if mode == "500 behind" else answer.status
                self._answer(status, content, answer.headers.get("Content-Type", "application/json"))

            def _answer(self, status: int, content: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

            def log_message(self, *ignored: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *ignored: object) -> None:  # a client that gave up
                pass

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._listener.server_address[1]}"
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._listener.shutdown()
        self._listener.server_close()


def points(folder: Path, steps: range, pause: float = 0.0) -> list[float]:
    """Writes the steps, a validation each fifth; returns how long each write took, in seconds."""
    log, took = MetricLog(folder), []
    for step in steps:
        values = {"train/loss": step / 2} | ({"val/nelbo": step / 4} if step % 5 == 0 else {})
        began = time.perf_counter()
        log.write(step, values)
        took.append(time.perf_counter() - began)
        time.sleep(pause)
    log.close()
    return took


def stored(uri: str, run_id: str, name: str) -> list[tuple[int, int, float]]:
    """(step, milliseconds, value) of a metric, by step, every stored copy of a point."""
    from mlflow import MlflowClient

    return sorted((m.step, m.timestamp, m.value) for m in MlflowClient(uri).get_metric_history(run_id, name))


def spooled(folder: Path, name: str) -> list[tuple[int, int, float]]:
    """The same of metrics.jsonl."""
    from pretrain.tracking.metric_log import read_metrics

    return [(line["step"], int(line["time"] * 1000), line[name]) for line in read_metrics(folder) if name in line]


def runs_of(uri: str, experiment: str = "e") -> list:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []
