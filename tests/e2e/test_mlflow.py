"""A run's record reaches MLflow whole and once, whatever the server does, and never stands in the run's way."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.tracking.mlflow_tracker import PARENT, Tracker, redact, run_url
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
    """A real `mlflow server` over `folder`, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1"]
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        yield server.wait()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"


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


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


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


def test_a_run_is_recorded_in_sqlite(run: Run, database: str) -> None:
    (run.folder / "report").mkdir()
    for file in (run.folder / "report.html", run.folder / "report" / "page.html"):
        file.write_text("<html>")
    params = {f"p{i}": i for i in range(150)} | {"long": "x" * 9000}
    tracker = run.tracker(database)
    tracker.start()
    tracker.stage_started("label", {"k": 50}, DATASET)
    run.measure(range(5), "label")
    tracker.stage_started("student", params)
    run.measure(range(700))  # 1400 values: more than a batch
    tracker.notify()
    tracker.tags({"git_commit": "abc"})
    tracker.artifact(run.folder / "report.html", None)
    tracker.artifact(run.folder / "report", "student")
    tracker.stage_finished("label", "FINISHED", {})
    tracker.stage_finished("student", "FAILED", {"eval/heldout_ce_nats": 3.25, "bad": float("nan")})
    assert tracker.close("FAILED", PATIENCE_S)
    assert run.warnings == []

    ids, mlflow = tracker.run_ids, client(database)
    assert_recorded_once(database, run, ids)
    assert_recorded_once(database, run, ids, "label")
    parent, label, student = (mlflow.get_run(ids[name]) for name in (PARENT, "label", "student"))
    assert [r.info.status for r in (parent, label, student)] == ["FAILED", "FINISHED", "FAILED"]
    assert [r.info.run_name for r in (parent, label, student)] == ["job", "job/label", "job/student"]
    assert label.data.tags["mlflow.parentRunId"] == student.data.tags["mlflow.parentRunId"] == ids[PARENT]
    assert parent.data.tags["git_commit"] == "abc" and parent.data.tags["attempt"] == "0"
    assert len(student.data.params) == 151 and student.data.params["p7"] == "7"
    assert len(student.data.params["long"]) == 6000 and "sha256:" in student.data.params["long"]
    assert student.data.metrics["eval/heldout_ce_nats"] == 3.25 and "bad" not in student.data.metrics
    dataset = label.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, json.loads(dataset.source)) == ("corpus", "d" * 36, {"uri": "/data/corpus"})
    stored = run.folder / "artifacts"
    assert {p.name for p in stored.rglob("*.html")} == {"report.html", "page.html"}
    assert tracker.address == f"mlflow ui --backend-store-uri {database}"


def test_a_rerun_continues_the_same_mlflow_runs(run: Run, database: str) -> None:
    def attempt(learning_rate: float, steps: range) -> dict[str, str]:
        tracker = run.tracker(database)
        tracker.start()
        tracker.stage_started("student", {"learning_rate": learning_rate, "seed": 1})
        run.measure(steps)
        assert tracker.close("FINISHED", PATIENCE_S)
        return tracker.run_ids

    first = attempt(0.1, range(10))
    assert attempt(0.2, range(5, 15)) == first
    student = client(database).get_run(first["student"])
    assert student.data.params == {"learning_rate": "0.1", "seed": "1"}
    assert student.data.tags["param_changed.learning_rate"] == "0.2" and "param_changed.seed" not in student.data.tags
    assert client(database).get_run(first[PARENT]).info.status == "FINISHED"
    assert_recorded_once(database, run, first)

    # A crash between sending and noting it. The times differ so that the database itself does not merge equal rows.
    log = run.spool.path.read_text()
    run.spool.path.write_text(log.replace('"time_s": 17', '"time_s": 18'))
    run.change_state(cursor=0)
    assert attempt(0.1, range(15, 17)) == first
    assert_recorded_once(database, run, first)
    assert client(database).get_run(first["student"]).data.tags["param_changed.learning_rate"] == "0.1"

    # A crash between creating the runs and noting them.
    run.change_state(runs={}, cursor=0)
    assert attempt(0.1, range(17, 18)) == first
    assert_recorded_once(database, run, first)

    # The other way round: with nothing to recognise them by, the runs are new ones.
    run.state.unlink()
    assert not set(attempt(0.1, range(18, 19)).values()) & set(first.values())
    assert run.warnings == []


def test_a_deleted_run_is_recorded_anew(run: Run, database: str) -> None:
    run.measure(range(10))
    first = run.tracker(database)
    first.start()
    assert first.close("FINISHED", PATIENCE_S)
    client(database).delete_run(first.run_ids["student"])
    run.measure(range(10, 20))
    second = run.tracker(database)
    second.start()
    assert second.close("FINISHED", PATIENCE_S)
    assert second.run_ids[PARENT] == first.run_ids[PARENT] and second.run_ids["student"] != first.run_ids["student"]
    assert_recorded_once(database, run, second.run_ids)
    assert "is gone" in run.warnings[0]


def test_what_mlflow_refuses_is_left_out_and_the_rest_goes_on(run: Run, database: str) -> None:
    tracker = run.tracker(database)
    tracker.start()
    tracker.artifact(run.folder / "missing.html", None)
    tracker.stage_started("student", {"not allowed: ;": 1})
    run.measure(range(3))
    assert tracker.close("FINISHED", PATIENCE_S)
    assert_recorded_once(database, run, tracker.run_ids)
    refused = [w for w in run.warnings if "does not take" in w]
    assert ["artifact of run" in refused[0], "params of student" in refused[1], len(refused)] == [True, True, 2]


def test_a_disabled_tracker_does_nothing(run: Run) -> None:
    tracker = run.tracker("http://127.0.0.1:1", enabled=False)
    tracker.start()
    tracker.stage_started("student", {"a": 1}, DATASET)
    tracker.notify()
    tracker.stage_finished("student", "FINISHED", {})
    assert tracker.close("FINISHED", 0.0) and tracker.replay(0.0)
    assert not run.state.exists() and run.warnings == [] and tracker.run_ids == {}


def test_mlflow_is_a_quiet_guest(run: Run, database: str) -> None:
    script = f"""
import socket, sys, time
from pathlib import Path
from orchestrator.tracking.mlflow_tracker import Tracker
looked_up = []
socket.getaddrinfo = lambda host, *rest, **more: looked_up.append(host) or []
folder = Path({str(run.folder)!r})
tracker = Tracker({database!r}, "guest", "job", folder / "metrics.jsonl", folder / "s.json", {{}}, warn=print)
assert "mlflow" not in sys.modules
tracker.start()
assert tracker.close("FINISHED", 60.0)
time.sleep(0.5)
assert "mlflow" in sys.modules and looked_up == [], looked_up
"""
    ours = ("PYTEST", "CI", "GITHUB", "MLFLOW", "DO_NOT_TRACK")  # by these MLflow would know that this is a test
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "uri", ["http://user:hunter2@127.0.0.1:5000/x", "postgresql://me:hunter2@db/x", "s3://b?token=hunter2&a=1"]
)
def test_addresses_hold_no_secret(uri: str) -> None:
    assert "hunter2" not in run_url(uri, "1", "abc") and "hunter2" not in redact(f"cannot reach {uri}: refused")


def test_addresses_lead_to_the_run() -> None:
    assert run_url("http://host:5000/", "1", "abc") == "http://host:5000/#/experiments/1/runs/abc"
    assert run_url("https://host") == "https://host"
    assert run_url("sqlite:////a b/m.db") == "mlflow ui --backend-store-uri 'sqlite:////a b/m.db'"


def whole_run(run: Run, tracker: Tracker, close_s: float) -> tuple[float, bool]:
    """Use every method once; seconds that all but `close` took together, and what `close` said."""
    (run.folder / "report.html").write_text("<html>")
    start = time.perf_counter()
    tracker.start()
    tracker.stage_started("student", {"a": 1}, DATASET)
    run.measure(range(20))
    tracker.notify()
    tracker.tags({"git_commit": "abc"})
    tracker.artifact(run.folder / "report.html", "student")
    tracker.stage_finished("student", "FINISHED", {"eval/ce": 1.0})
    took_s = time.perf_counter() - start
    return took_s, tracker.close("FINISHED", close_s)


def assert_replayed(run: Run, uri: str) -> None:
    tracker = run.tracker(uri, artifact_location=None)
    assert tracker.replay(PATIENCE_S)
    assert_recorded_once(uri, run, tracker.run_ids)
    student = client(uri).get_run(tracker.run_ids["student"])
    assert student.info.status == client(uri).get_run(tracker.run_ids[PARENT]).info.status == "FINISHED"
    assert student.data.params == {"a": "1"} and student.data.metrics["eval/ce"] == 1.0
    assert student.inputs.dataset_inputs and client(uri).list_artifacts(student.info.run_id)[0].path == "report.html"


def test_a_dead_server_costs_one_warning(run: Run, server: Server) -> None:
    tracker = run.tracker(f"http://user:hunter2@127.0.0.1:{free_port()}")
    took_s, all_sent = whole_run(run, tracker, close_s=1.5)
    assert took_s < 0.5 and not all_sent and tracker.run_ids == {}
    assert len(run.warnings) == 1 and "metrics.jsonl" in run.warnings[0]
    assert "hunter2" not in run.warnings[0] + run.state.read_text() + run.spool.path.read_text()
    assert_replayed(run, server.uri)


def test_a_server_that_never_answers_costs_one_warning(run: Run, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    held.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        took_s, all_sent = whole_run(run, run.tracker(f"http://127.0.0.1:{listener.getsockname()[1]}"), close_s=3.0)
        assert held, "the tracker never called"
        listener.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()
    assert took_s < 0.5 and not all_sent and len(run.warnings) == 1
    assert_replayed(run, server.uri)


class Lossy(ThreadingHTTPServer):
    """Stands before a server and passes each request on, but instead of the first reply to each of some paths it
    hangs up (None) or answers with another HTTP status."""

    def __init__(self, target: int, losing: dict[str, int | None]) -> None:
        self.target, self.losing, self.lost, self.rows = target, losing, [], 0
        super().__init__(("127.0.0.1", 0), LossyHandler)


class LossyHandler(BaseHTTPRequestHandler):
    server: Lossy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target)
        connection.request(self.command, self.path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        content, name = reply.read(), self.path.partition("?")[0].partition("/mlflow/")[2]
        self.server.rows += len(json.loads(body).get("metrics", [])) if name == "runs/log-batch" else 0
        status = self.server.losing.pop(name, reply.status)
        if status != reply.status:
            self.server.lost.append(name)
        if status is None:
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_lost_replies_double_nothing(run: Run, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    run.measure(range(20))
    with Lossy(server.port, {"runs/create": None, "runs/log-batch": 500}) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        tracker = run.tracker(f"http://127.0.0.1:{proxy.server_port}", artifact_location=None)
        tracker.start()
        run.measure(range(20, 30))
        assert tracker.close("FINISHED", PATIENCE_S)
        proxy.shutdown()
    assert proxy.lost == ["runs/create", "runs/log-batch"] and len(run.warnings) == 1
    assert capsys.readouterr().out == "", "stdout belongs to the command"
    assert proxy.rows == 2 * 30, "no value is even sent twice"
    assert_recorded_once(server.uri, run, tracker.run_ids)


def test_a_server_killed_and_restarted_mid_run_misses_nothing(run: Run, server: Server) -> None:
    tracker = run.tracker(server.uri, artifact_location=None)
    tracker.start()
    tracker.stage_started("student", {"a": 1})
    run.measure(range(50))
    eventually(lambda: "student" in tracker.run_ids and len(history(server.uri, tracker.run_ids["student"], LOSS)) == 50)
    server.kill()
    tracker.tags({"during": "outage"})
    run.measure(range(50, 100))
    eventually(lambda: run.warnings)
    server.start()
    run.measure(range(100, 150))
    server.wait()
    tracker.stage_finished("student", "FINISHED", {})
    assert tracker.close("FINISHED", PATIENCE_S)
    assert len(run.warnings) == 1
    assert_recorded_once(server.uri, run, tracker.run_ids)
    parent = client(server.uri).get_run(tracker.run_ids[PARENT])
    assert parent.data.tags["during"] == "outage"
    assert tracker.address == f"{server.uri}/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"
