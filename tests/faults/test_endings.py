"""Runs that end early, share work or lack room: what they save, what they say, and how they go on.

A training goes on at the step of its last checkpoint, on as many workers as there are then, and ends with the losses of an
undisturbed one.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.tiny import (
    DISTILL,
    Command,
    Ended,
    Reference,
    commits,
    distill,
    eventually,
    metric_points,
    report,
    started,
    statuses,
    steps_seen,
    student_weights,
    write_job,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

RARELY = 10**6
"""Steps between checkpoints: none is saved unless something asks for it."""
SAVED_S = 30.0
HALF_CORE = {"cpus_per_worker": 0.5}


def steps_kept(storage: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in storage.glob("student/*/checkpoints/step-*"))


def losses(storage: Path, name: str = "tiny") -> dict[int, float]:
    points = metric_points(storage, "student", name)
    return {point["step"]: point["metrics"]["train/loss"] for point in points if "train/loss" in point["metrics"]}


def terminate(run: Command, storage: Path, after_steps: int) -> Ended:
    """Send SIGTERM after so many of the student's steps; the checkpoint must be there `SAVED_S` later."""
    run.until(lambda: steps_seen(storage) > after_steps)
    run.send(signal.SIGTERM)
    began = time.monotonic()
    before = steps_kept(storage)
    eventually(lambda: steps_kept(storage) != before or not run.running, "a checkpoint is saved")
    assert time.monotonic() - began < SAVED_S
    return run.wait()


def test_sigterm_saves_a_checkpoint_and_the_run_goes_on_there(reference: Reference, tmp_path: Path) -> None:
    job = reference.copy(tmp_path, "labels")
    job["train"] = job["train"] | {"checkpoint_every": RARELY}
    storage, file = Path(job["storage"]), write_job(job)
    with started(tmp_path / "log", *DISTILL, "run", file) as run:
        ended = terminate(run, storage, 40)
    (step,) = steps_kept(storage)
    assert ended.code == 143 and step > 40 and "saving checkpoints" in ended.stderr
    again = distill(tmp_path / "again", "run", file).assert_ok()
    assert f"student: goes on from step {step} of" in again.stderr
    assert student_weights(storage) == reference.weights


def test_sigterm_while_labels_are_made(reference: Reference, tmp_path: Path) -> None:
    job = reference.copy(tmp_path)
    job["train"] = job["train"] | {"checkpoint_every": RARELY}
    storage, file = Path(job["storage"]), write_job(job)
    with started(tmp_path / "log", *DISTILL, "run", file) as run:
        run.until(lambda: len(commits(storage)) >= 2)
        run.send(signal.SIGTERM)
        ended = run.wait()
    kept = commits(storage)
    assert ended.code == 143 and 2 <= len(kept) < reference.shards
    distill(tmp_path / "again", "run", file).assert_ok()
    assert {name: commits(storage)[name] for name in kept} == kept
    assert student_weights(storage) == reference.weights


def test_a_failing_teacher_lets_the_student_save_what_it_has(reference: Reference, tmp_path: Path) -> None:
    """The other side of the run fails: a token shard that the teacher has yet to read is damaged."""
    job = reference.copy(tmp_path)
    job["train"] = job["train"] | {"checkpoint_every": RARELY}
    job["labels"] = job["labels"] | {"run_ahead": 2}  # so that the student is under way when the teacher gets there
    storage, file = Path(job["storage"]), write_job(job)
    damaged = last_shard(reference, storage)
    intact = damaged.read_bytes()
    damaged.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    ended = distill(tmp_path / "log", "run", file)
    assert ended.code == 5 and "token shard" in ended.stderr.splitlines()[-1]
    (step,) = steps_kept(storage)
    assert step > 0
    damaged.write_bytes(intact)
    again = distill(tmp_path / "again", "run", file).assert_ok()
    assert f"student: goes on from step {step} of" in again.stderr
    assert student_weights(storage) == reference.weights


def last_shard(reference: Reference, storage: Path) -> Path:
    """The token shard that the undisturbed run labelled last."""
    newest = max(reference.storage.glob("labels/*/commits/*.json"), key=lambda commit: commit.stat().st_mtime)
    (file,) = storage.glob(f"data/*/train/{newest.stem}-*.parquet")
    return file


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1)])
def test_a_training_goes_on_with_other_workers(reference: Reference, tmp_path: Path, before: int, after: int) -> None:
    job = reference.copy(tmp_path, "labels")
    job["train"] = job["train"] | {"checkpoint_every": RARELY, "micro_batch": 8, "workers": before} | HALF_CORE
    storage, file = Path(job["storage"]), write_job(job)
    with started(tmp_path / "log", *DISTILL, "run", file) as run:
        ended = terminate(run, storage, 30)
    (step,) = steps_kept(storage)
    assert ended.code == 143
    again = distill(tmp_path / "again", "run", file, "--set", f"train.workers={after}").assert_ok()
    assert f"student: goes on from step {step} of" in again.stderr
    assert len(list((storage / "student").iterdir())) == 1, "another number of workers is the same training"
    found, expected = losses(storage), losses(reference.storage)
    assert found.keys() == expected.keys()
    worst = max(abs(found[step] - expected[step]) / expected[step] for step in expected)
    print(json.dumps({"before": before, "after": after, "step": step, "losses_off_by": worst}))
    assert worst < 1e-5


def test_two_runs_of_a_sweep_at_once_share_a_baseline(reference: Reference, tmp_path: Path) -> None:
    job = reference.copy(tmp_path, "labels")
    job["evaluate"] = job["evaluate"] | {"baseline": True}
    job["train"] = job["train"] | {"steps": 100}
    runs = {alpha: job | {"name": f"alpha-{number}", "objective": {"alpha": alpha}} for number, alpha in enumerate((0.2, 0.4))}
    with (
        started(tmp_path / "one", *DISTILL, "run", write_job(runs[0.2])) as one,
        started(tmp_path / "other", *DISTILL, "run", write_job(runs[0.4])) as other,
    ):
        ended = [one.wait(), other.wait()]
    for each in ended:
        each.assert_ok()
    storage = Path(job["storage"])
    made = sorted(statuses(storage, each["name"])["baseline"] for each in runs.values())
    waited = [each for each in ended if "baseline:" in each.stderr and "waiting for its result" in each.stderr]
    assert made == ["ran", "reused"] or not waited, (made, [each.stderr[-2000:] for each in ended])
    assert len(list((storage / "baseline").iterdir())) == 1 and len(list((storage / "student").iterdir())) == 2
    figures = [report(storage, each["name"])["baseline"] for each in runs.values()]
    assert figures[0]["heldout_ce_nats"] == figures[1]["heldout_ce_nats"]


def test_a_baseline_that_fails_costs_the_run_nothing_else(reference: Reference, tmp_path: Path) -> None:
    job = reference.copy(tmp_path, "labels")
    job["evaluate"] = job["evaluate"] | {"baseline": True}
    job["train"] = job["train"] | {"steps": 40, "warmup_steps": 2}
    storage, file = Path(job["storage"]), write_job(job)
    (storage / "baseline").write_text("no folder can be made here")
    ended = distill(tmp_path / "log", "run", file).assert_ok()
    assert "baseline:" in ended.stderr and "the run goes on without it" in ended.stderr
    found = report(storage)
    assert found["gap_recovered"] is None and found["student"]["heldout_ce_nats"] > 0
    assert any("baseline" in fault["text"] for fault in found["faults"])


def test_a_baseline_waits_for_room_as_long_as_the_student_trains(reference: Reference, tmp_path: Path) -> None:
    """Ray has room for one training: labels are there, so the baseline asks for room at once, and finds it much later."""
    job = reference.copy(tmp_path, "labels")
    job["evaluate"] = job["evaluate"] | {"baseline": True}
    job["cluster"] = {"num_cpus": 3}
    job["train"] = job["train"] | {"cpus_per_worker": 2, "placement_timeout_s": 1}
    storage, file = Path(job["storage"]), write_job(job)
    distill(tmp_path / "log", "run", file, env={"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3"}).assert_ok()
    assert statuses(storage)["baseline"] == "ran" and report(storage)["gap_recovered"] is not None
    assert student_weights(storage) == reference.weights
