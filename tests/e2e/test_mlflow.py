"""A run's record reaches MLflow whole and once, and never stands in the run's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.tracking.mlflow_tracker import PARENT, redact, run_url
from orchestrator.tracking.names import GRAD_NORM, KD_NATS, LOSS
from tests.e2e.mlflow_runs import (
    DATASET,
    PATIENCE_S,
    Run,
    assert_recorded_once,
    client,
    eventually,
    history,
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


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


def test_the_parent_has_the_job_the_headlines_and_the_figures(run: Run, database: str) -> None:
    tracker = run.tracker(database)
    tracker.start()
    tracker.params({"objective.alpha": 0.5, "teacher.path": "/models/" + "x" * 9000})
    tracker.text("job.yaml", "name: a\n")
    tracker.dataset(DATASET)
    tracker.stage_started("student:abcd", {"fingerprint": "abcd"})
    for step in range(5):
        point = {LOSS: 1.0 / (step + 1), KD_NATS: 0.5, GRAD_NORM: 2.0}
        run.spool.append("student:abcd", step, point, 1.7e9 + step)
        run.spool.append("baseline:abcd", step, point, 1.7e9 + step)
    run.spool.append(PARENT, 7, {"system/cpu_utilization_percentage": 50.0}, 1.7e9)
    tracker.stage_finished("student:abcd", "FINISHED", {})
    tracker.summary({"student/heldout_ce_nats": 5.5, "gap_recovered": float("nan")})
    assert tracker.close("FINISHED", PATIENCE_S) and run.warnings == []

    mlflow, parent = client(database), tracker.run_ids[PARENT]
    found = mlflow.get_run(parent)
    assert found.data.params["objective.alpha"] == "0.5" and len(found.data.params["teacher.path"]) == 6000
    assert found.data.metrics.keys() == {
        f"student/{LOSS}",
        f"student/{KD_NATS}",
        "student/heldout_ce_nats",
        "system/cpu_utilization_percentage",
    }
    assert history(database, parent, f"student/{LOSS}") == [(step, 1.0 / (step + 1)) for step in range(5)]
    assert found.inputs.dataset_inputs[0].dataset.name == "corpus"
    assert [item.path for item in mlflow.list_artifacts(parent)] == ["job.yaml"]


def test_a_stopped_run_leaves_nothing_running(run: Run, database: str) -> None:
    """Also a child of an earlier, killed attempt that the present one does not know; a run that goes on is running again."""

    def status() -> dict[str, str]:
        return {stage: client(database).get_run(run_id).info.status for stage, run_id in ids.items()}

    killed = run.tracker(database)
    killed.start()
    killed.stage_started("student:old", {})
    eventually(lambda: len(killed.run_ids) == 2)
    assert killed.close(None, PATIENCE_S)  # as far as MLflow can tell

    stopped = run.tracker(database)
    stopped.start()
    stopped.stage_started("student:new", {})
    stopped.stage_started("labels", {})
    stopped.stage_finished("labels", "FINISHED", {})
    stopped.stage_finished("student:new", "KILLED", {})
    stopped.end("KILLED")
    assert stopped.close("KILLED", PATIENCE_S)
    ids = stopped.run_ids
    assert status() == {PARENT: "KILLED", "student:old": "KILLED", "student:new": "KILLED", "labels": "FINISHED"}

    again = run.tracker(database)
    again.start()
    again.stage_started("student:new", {})
    eventually(lambda: status()[PARENT] == status()["student:new"] == "RUNNING")
    again.stage_finished("student:new", "FINISHED", {})
    assert again.close("FINISHED", PATIENCE_S) and run.warnings == []
    assert status() == {PARENT: "FINISHED", "student:old": "KILLED", "student:new": "FINISHED", "labels": "FINISHED"}


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
