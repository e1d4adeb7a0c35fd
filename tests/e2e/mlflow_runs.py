"""Runs that are recorded in MLflow, a server of it, and what a run must look like there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.tracking.mlflow_tracker import Tracker
from orchestrator.tracking.names import GRAD_NORM, LOSS
from orchestrator.tracking.spool import Spool

PATIENCE_S = 120.0
"""Far more than anything takes: a busy machine must not fail a test."""
DATASET = {"name": "corpus", "digest": "d" * 64, "source": "/data/corpus"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def eventually(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


class Server:
    """A real `mlflow server` in a process group of its own; its files are in `folder`, its `database` too if none is given."""

    def __init__(self, folder: Path, database: str | None = None) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--backend-store-uri", database or f"sqlite:///{folder}/server.db", "--workers", "1"]
        self._command += ["--artifacts-destination", str(folder / "server-artifacts")]
        self._log = folder / "server.log"

    def start(self) -> None:
        quiet = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=quiet, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> Server:
        def healthy() -> bool:
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            try:
                return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200
            except OSError:
                return False

        eventually(healthy)
        return self

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Run:
    """One run directory, its spool, and trackers upon it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "tracking.json"
        self.spool = Spool(folder / "metrics.jsonl")
        self.warnings: list[str] = []

    def tracker(self, uri: str, **options: Any) -> Tracker:
        options = {"artifact_location": str(self.folder / "artifacts")} | options
        tags = {"attempt": str(len(self.warnings))}
        args = (uri, self.folder.name, "job", self.spool.path, self.state, tags)
        return Tracker(*args, warn=self.warnings.append, **options)

    def measure(self, steps: range, stage: str = "student") -> None:
        for step in steps:
            self.spool.append(stage, step, {LOSS: 9.0 / (step + 1), GRAD_NORM: float(step)}, 1.7e9 + step)

    def points(self, name: str, stage: str = "student") -> list[tuple[int, float]]:
        return [(p.step, p.metrics[name]) for p in self.spool.read(stage)]

    def change_state(self, **values: Any) -> None:
        self.state.write_text(json.dumps(json.loads(self.state.read_text()) | values))


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, name))


def recorded_runs(uri: str, run: Run) -> set[str]:
    found = client(uri).get_experiment_by_name(run.folder.name)
    return {r.info.run_id for r in client(uri).search_runs([found.experiment_id])}


def assert_recorded_once(uri: str, run: Run, runs: dict[str, str], stage: str = "student") -> None:
    assert run.points(LOSS, stage)
    for name in (LOSS, GRAD_NORM):
        assert history(uri, runs[stage], name) == run.points(name, stage)
    assert recorded_runs(uri, run) == set(runs.values())
