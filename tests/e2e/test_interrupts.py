"""Ctrl-C and SIGTERM on a whole run: it ends soon and in one line, nothing of it is left, MLflow says so, and it can go on."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.tiny import (
    DISTILL,
    Ended,
    Json,
    alive,
    command_line,
    distill,
    metric_points,
    started,
    statuses,
    tiny_job,
    write_corpus,
    write_job,
)

pytestmark = pytest.mark.timeout(1800)

SOON_S = 45.0
"""In which an interrupted run is to be over, on a busy machine."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Json:
    folder = tmp_path_factory.mktemp("stopped")
    job = tiny_job(write_corpus(folder / "corpus"), folder / "store") | {"tracking": {}}
    job["teacher"]["train"] |= {"steps": 150}
    return job


def stopped(job: Json, stage: str, signals: list[signal.Signals], pause_s: float = 0.6) -> Ended:
    """How the job ended that got `signals` while it trained `stage`; all of its processes are gone."""
    storage = Path(job["storage"])
    before = len(metric_points(storage, stage))
    with started(storage.parent / "log", *DISTILL, "run", write_job(job)) as command:
        command.until(lambda: len(metric_points(storage, stage)) > before + 20, every_s=0.1)
        family = command.family()
        for number in signals:
            command.send(number)
            time.sleep(pause_s)
        began = time.monotonic()
        ended = command.wait()
        assert time.monotonic() - began < SOON_S
        assert list(left_over(family)) == []
        assert "Traceback" not in ended.stderr and "Traceback" not in ended.stdout
        return ended


def left_over(family: list[psutil.Process]) -> Iterator[str]:
    """Command lines of those of `family` that live on; Ray's agents take a few seconds."""
    psutil.wait_procs(family, 20)
    yield from (command_line(process) for process in family if alive(process))


def mlflow_statuses(job: Json) -> dict[str, str]:
    """Of the parent (`run`) and its children by stage."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{job['storage']}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    return {run.info.run_name.partition("/")[2].partition(":")[0] or "run": run.info.status for run in runs}


def test_a_run_is_stopped_three_times_and_goes_on(job: Json) -> None:
    storage = Path(job["storage"])

    once = stopped(job, "teacher", [signal.SIGINT])
    last = once.stderr.strip().splitlines()[-1]
    assert once.code == 130
    assert last.startswith("interrupted; what was done is kept") and "distill run" in last and last.endswith(".yaml")
    assert json.loads((storage / "runs" / "tiny" / "run.json").read_text())["status"] == "stopped"
    assert statuses(storage) == {"data": "ran", "teacher": "stopped"}
    assert mlflow_statuses(job) == {"run": "KILLED", "data": "FINISHED", "teacher": "KILLED"}

    thrice = stopped(job, "student", [signal.SIGINT] * 3)
    assert thrice.code == 130 and thrice.stderr.count("interrupted;") == 1
    found = mlflow_statuses(job)
    assert (found["run"], found["student"], found["teacher"]) == ("KILLED", "KILLED", "FINISHED")
    assert "RUNNING" not in found.values()

    terminated = stopped(job, "student", [signal.SIGTERM])
    assert terminated.code == 143 and terminated.stderr.strip().splitlines()[-1].startswith("terminated; what was done is kept")
    assert mlflow_statuses(job)["run"] == "KILLED"

    distill(storage.parent / "log", "run", write_job(job)).assert_ok()
    assert set(mlflow_statuses(job).values()) == {"FINISHED"}
    record = json.loads((storage / "runs" / "tiny" / "run.json").read_text())
    assert (record["attempt"], record["status"]) == (4, "finished") and set(statuses(storage).values()) <= {"ran", "reused"}
    assert [path.name for path in (storage / "runs").iterdir() if path.name[0] != "."] == ["tiny"]


@pytest.mark.parametrize("after_s", [0.5, 4.0])
def test_an_interrupt_while_the_run_starts(job: Json, tmp_path: Path, after_s: float) -> None:
    """While modules are imported, and while Ray comes up."""
    with started(tmp_path / "log", *DISTILL, "run", write_job(job | {"storage": str(tmp_path / "store")})) as command:
        time.sleep(after_s)
        family = command.family()
        for _ in range(3):
            command.send(signal.SIGINT)
            time.sleep(0.3)
        ended = command.wait()
        assert ended.code == 130 and "Traceback" not in ended.stderr, ended.stderr
        assert list(left_over(family + command.family())) == []
