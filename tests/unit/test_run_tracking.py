"""What MLflow is told of a run as a whole, and the addresses it is told at."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run.tracking import description, final_figures, job_params
from orchestrator.spec.load import load_job
from orchestrator.tracking.mlflow_tracker import sqlite_uri

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))


def test_the_job_is_flattened_whole() -> None:
    job = load_job(JOBS[0], ["objective.alpha={start: 0.5, end: 0.1}", "labels.temperatures=[1.0, 2.0]"])
    found = job_params(job)
    assert found["objective.alpha.start"] == 0.5 and found["objective.divergences.0.kind"] == "forward_kl"
    assert found["labels.temperatures"] == "[1.0, 2.0]" and found["train.betas"] == "[0.9, 0.95]"
    assert found["objective.features"] == "[]" and found["name"] == job.name
    assert not [value for value in found.values() if isinstance(value, dict | list)]


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_every_job_is_said_in_one_sentence(file: Path) -> None:
    said = description(load_job(file))
    assert said.startswith("Distils ") and said.endswith(".") and "\n" not in said and len(said) < 300


def test_figures_are_numbers() -> None:
    report: dict[str, Any] = {
        "teacher": {"heldout_ce_nats": 4.75},
        "student": {"heldout_ce_nats": 5.5, "kl_to_teacher_nats": math.inf, "top1_agreement": 0.5},
        "baseline": {"heldout_ce_nats": 5.75},
        "labels": {"kind": "sampled", "bytes_per_token": 31.5},
        "throughput": {"wall_s": 60.0, "teacher_tokens_per_s": None},
        "gap_recovered": 0.25,
    }
    assert final_figures(report) == {
        "teacher/heldout_ce_nats": 4.75,
        "baseline/heldout_ce_nats": 5.75,
        "student/heldout_ce_nats": 5.5,
        "student/top1_agreement": 0.5,
        "labels/bytes_per_token": 31.5,
        "throughput/wall_s": 60.0,
        "gap_recovered": 0.25,
    }
    worse = final_figures(report | {"baseline": {"heldout_ce_nats": 4.5}})
    assert "gap_recovered" not in worse, "there is no gap where the baseline is as good as the teacher"


@pytest.mark.parametrize(
    "name", ["plain", "d%20x", "a b", "q?x=1", "h#x", "100%", "%41", "ä", "a+b", "semi;x", "a&b", "at@x:1"]
)
def test_a_path_becomes_the_address_of_itself(name: str, tmp_path: Path) -> None:
    """Fault of the kind "a path pasted into an address" (`%20` became a space: the database lay outside the storage)."""
    from sqlalchemy import create_engine, text

    folder = tmp_path / name
    folder.mkdir()
    with create_engine(sqlite_uri(folder / "m.db")).begin() as database:
        database.execute(text("CREATE TABLE here (x INTEGER)"))
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("*.db")] == [Path(name) / "m.db"]
    with sqlite3.connect(folder / "m.db") as found:
        assert found.execute("SELECT count(*) FROM here").fetchone() == (0,)
