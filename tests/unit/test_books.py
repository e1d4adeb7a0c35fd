"""What a run writes down about its faults, and that the next attempt goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import DataError
from orchestrator.plan.make import make_plan
from orchestrator.run.directory import claim_directory
from orchestrator.run.record import RunRecord
from orchestrator.spec.load import load_job
from orchestrator.store.files import open_store


@pytest.fixture
def made(tmp_path: Path) -> Any:
    job = load_job(Path(__file__).parents[2] / "jobs" / "quickstart.yaml", [f"storage={tmp_path}"])
    store = open_store(make_plan(job).storage)
    return lambda: RunRecord(store, claim_directory(store, job))


def written(run: RunRecord) -> dict[str, Any]:
    return json.loads(run._store.read(f"{run._directory.key}/run.json"))


def test_a_run_without_faults_says_so(made: Any) -> None:
    run = made()
    with run.kept():
        assert written(run)["status"] == "running"
    found = written(run)
    assert found["started_s"] <= found["ended_s"] and found["seconds"] == pytest.approx(found["ended_s"] - found["started_s"])
    what = {"name": "quickstart", "run": "quickstart", "number": 1, "identity": run._directory.identity}
    assert what.items() <= found.items()
    assert {"status": "finished", "attempt": 1, "stages": {}, "faults": []}.items() <= found.items()


def test_faults_outlast_a_failed_attempt(made: Any) -> None:
    first = made()
    with pytest.raises(DataError), first.kept():
        first.note("student: a training worker died; retry 1/3")
        raise DataError("notes.txt: row 3 is not text")
    assert written(first)["status"] == "failed"
    second = made()
    with second.kept():
        second.note("MLflow is away")
    faults = written(second)["faults"]
    assert [(f["attempt"], f["text"]) for f in faults] == [
        (1, "student: a training worker died; retry 1/3"),
        (1, "attempt 1 ended: notes.txt: row 3 is not text"),
        (2, "MLflow is away"),
    ]
    assert all(0 <= f["time_s"] < 60 for f in faults) and written(second)["status"] == "finished"


def test_a_killed_attempt_is_a_fault_of_the_next(made: Any) -> None:
    killed = made()
    books = killed.kept()
    books.__enter__()  # and never left, as by SIGKILL
    killed.note("said before")
    second = made()
    with second.kept():
        pass
    texts = [f["text"] for f in written(second)["faults"]]
    assert texts[0] == "said before" and texts[1].startswith("attempt 1 was killed") and len(texts) == 2
    assert written(second)["attempt"] == 2
    third = made()
    with third.kept():
        pass
    assert written(third)["faults"] == [] and written(third)["attempt"] == 1


def test_an_interrupt_and_a_bug_are_named(made: Any) -> None:
    for error, text in (
        (KeyboardInterrupt(), "stopped by Ctrl-C"),
        (ValueError("one\ntwo " + "x" * 500), "ValueError: one two"),
    ):
        run = made()
        with pytest.raises(type(error)), run.kept():
            raise error
        last = written(run)["faults"][-1]["text"]
        assert last.startswith(f"attempt {run.attempt} ended: {text}") and len(last) <= 300
