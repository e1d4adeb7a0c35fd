"""Runs beside each other: three jobs that differ in alpha, in MLflow and in `distill runs`; storage in an awkward folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import Json, distill, report, tiny_job, write_corpus, write_job

pytestmark = pytest.mark.timeout(1800)

ALPHAS = (0.1, 0.5, 0.9)
FOLDER = "d%20x y?z#"
"""Fault of the kind "a path pasted into an address": each of these means something in a URI."""
INTERVAL = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "2"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """The job after its three runs."""
    folder = tmp_path_factory.mktemp("swept")
    job = tiny_job(write_corpus(folder / "corpus"), folder / FOLDER / "store") | {"tracking": {}}
    job["train"] |= {"steps": 60}
    file = write_job(job, folder)
    for alpha in ALPHAS:
        distill(folder / "log", "run", file, "--set", f"objective.alpha={alpha}", env=INTERVAL).assert_ok()
    return job | {"file": str(file)}


@pytest.fixture(scope="module")
def parents(swept: Json) -> list[Any]:
    """MLflow's parent runs, sorted by alpha."""
    client = mlflow_of(swept)
    found = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return sorted(parents, key=lambda run: float(run.data.params["objective.alpha"]))


def mlflow_of(job: Json) -> Any:
    from mlflow import MlflowClient

    from orchestrator.tracking.mlflow_tracker import sqlite_uri

    return MlflowClient(sqlite_uri(Path(job["storage"]) / "mlflow.db"))


def test_a_changed_job_leaves_the_old_run_alone(swept: Json) -> None:
    storage = Path(swept["storage"])
    names = ["tiny", "tiny-2", "tiny-3"]
    losses = [report(storage, name)["student"]["heldout_ce_nats"] for name in names]
    assert len(set(losses)) == 3
    records = [json.loads((storage / "runs" / name / "run.json").read_text()) for name in names]
    assert [(r["run"], r["number"], r["status"]) for r in records] == [(n, i + 1, "finished") for i, n in enumerate(names)]
    assert len({r["identity"] for r in records}) == 3
    assert [r["stages"]["labels"]["status"] for r in records] == ["ran", "reused", "reused"], "labels do not depend on alpha"
    assert all((storage / "runs" / name / "export" / "config.json").is_file() for name in names)


def test_everything_lies_in_the_storage(swept: Json) -> None:
    storage = Path(swept["storage"])
    assert [path.parent for path in storage.parents[1].rglob("mlflow.db")] == [storage]
    artifacts = {path.name for path in (storage / "mlartifacts").rglob("*") if path.is_file()}
    assert {"job.yaml", "report.html", "report.json", "summary.md"} <= artifacts


def test_runs_can_be_sorted_and_plotted_by_alpha(swept: Json, parents: list[Any]) -> None:
    """By what MLflow's table and compare view take: parameters and metrics of the parents."""
    client, experiment = mlflow_of(swept), parents[0].info.experiment_id
    storage = Path(swept["storage"])
    assert [float(run.data.params["objective.alpha"]) for run in parents] == list(ALPHAS)
    for run in parents:
        assert run.data.metrics["student/heldout_ce_nats"] == report(storage, run.info.run_name)["student"]["heldout_ce_nats"]
    by_loss = client.search_runs(
        [experiment], "params.`objective.alpha` != ''", order_by=["metrics.`student/heldout_ce_nats` ASC"]
    )
    losses = [run.data.metrics["student/heldout_ce_nats"] for run in by_loss]
    assert len(losses) == 3 and losses == sorted(losses)


def test_the_parent_says_what_was_asked_and_what_came_of_it(swept: Json, parents: list[Any]) -> None:
    client, run = mlflow_of(swept), parents[0]
    params, tags, metrics = run.data.params, run.data.tags, run.data.metrics
    assert (params["teacher.kind"], params["teacher.model.type"], params["labels.samples"]) == ("pretrain", "llama", "20")
    assert params["objective.divergences.0.kind"] == "forward_kl" and params["train.steps"] == "60"
    assert tags["mlflow.source.name"] == "distill run" and tags["mlflow.user"] and tags["mlflow.source.git.commit"]
    note = tags["mlflow.note.content"]
    assert note.startswith("Distils a llama teacher") and len(note.split("\n\n")) == 2
    assert {
        "teacher/heldout_ce_nats",
        "student/kl_to_teacher_nats",
        "student/top1_agreement",
        "throughput/wall_s",
    } <= metrics.keys()
    assert any(name.startswith("system/cpu") for name in metrics)
    assert {d.dataset.name for d in run.inputs.dataset_inputs} == {"text", "tokens"}
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"job.yaml", "report.html", "report.json", "summary.md"} <= artifacts
    for name in ("student/train/loss", "student/train/ce_nats", "student/train/kd_nats"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == list(range(60))
    assert client.get_metric_history(run.info.run_id, "labels/label/tokens_per_s")


def test_the_children_carry_only_what_is_theirs(swept: Json, parents: list[Any]) -> None:
    client = mlflow_of(swept)
    for parent in parents:
        children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
        assert parent.info.status == "FINISHED" and {run.info.status for run in children} == {"FINISHED"}
        assert {tuple(run.data.params) for run in children} == {("fingerprint",)}
        assert all(run.info.run_name.startswith(f"{parent.info.run_name}/") for run in children)


def test_runs_are_listed(swept: Json, tmp_path: Path) -> None:
    for where in (swept["storage"], swept["file"]):
        listed = json.loads(distill(tmp_path, "runs", where, "--json").assert_ok().stdout)
        assert [(r["run"], r["status"], r["differs"]) for r in listed] == [
            ("tiny", "finished", {}),
            ("tiny-2", "finished", {"objective.alpha": 0.5}),
            ("tiny-3", "finished", {"objective.alpha": 0.9}),
        ]
        for run in listed:
            assert run["student_heldout_ce_nats"] == report(Path(swept["storage"]), run["run"])["student"]["heldout_ce_nats"]
            assert 0 < run["seconds"] < 1800 and run["started_s"] > 1.7e9
    table = distill(tmp_path, "runs", swept["storage"]).assert_ok().stdout.splitlines()
    assert len(table) == 4 and "objective.alpha=0.9" in table[3]
    assert distill(tmp_path, "runs", tmp_path / "nothing").code == 2


def test_a_job_that_differs_in_no_result_goes_on_in_its_run(swept: Json, tmp_path: Path) -> None:
    found = distill(
        tmp_path,
        "run",
        swept["file"],
        "-c",
        "objective.alpha=0.5",
        "-c",
        "train.workers=2",
        "-c",
        "train.micro_batch=4",
        env=INTERVAL,
    ).assert_ok()
    assert f"{swept['storage']}/runs/tiny-2" in found.stderr
    record = json.loads((Path(swept["storage"]) / "runs" / "tiny-2" / "run.json").read_text())
    assert {record["stages"][stage]["status"] for stage in ("data", "teacher", "labels", "student")} == {"reused"}
    assert not (Path(swept["storage"]) / "runs" / "tiny-4").exists()
    client = mlflow_of(swept)
    runs = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    assert len([run for run in runs if "mlflow.parentRunId" not in run.data.tags]) == 3
