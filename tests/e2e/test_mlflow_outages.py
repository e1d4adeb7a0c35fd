"""Whatever the MLflow server does, a run goes on with one warning, and in the end its record is there, whole and once."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.tracking.mlflow_tracker import PARENT, Tracker
from orchestrator.tracking.names import LOSS
from tests.e2e.mlflow_runs import (
    DATASET,
    PATIENCE_S,
    Run,
    Server,
    assert_recorded_once,
    client,
    eventually,
    free_port,
    history,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        yield server.wait()
    finally:
        server.kill()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


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
    # Of 30 steps two values to the stage's run, and the loss, a headline, to the parent as well.
    assert proxy.rows == 3 * 30, "no value is even sent twice"
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
