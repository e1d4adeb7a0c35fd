"""A whole run from outside: what it leaves behind, what running it again reuses, and what makes it work anew."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import (
    LABELLER,
    SHARD_ROWS,
    STEPS,
    TRAINER,
    Ended,
    Json,
    assert_every_row_labelled_once,
    commits,
    distill,
    metric_points,
    only,
    report,
    stages,
    statuses,
    student_weights,
    tiny_job,
    write_corpus,
    write_job,
)

pytestmark = pytest.mark.timeout(1800)

MODEL = {"params", "active_params", "heldout_ce_nats", "heldout_ppl", "top1_accuracy", "tokens_per_s", "size_bytes"}
CONTRACT = {
    "teacher": MODEL,
    "student": MODEL | {"kl_to_teacher_nats", "top1_agreement", "ece"},
    "baseline": MODEL,
    "labels": {"kind", "bytes_per_token", "rows", "shards", "bytes", "reused_shards"},
    "throughput": {
        "teacher_tokens_per_s",
        "student_tokens_per_s",
        "teacher_wait_fraction",
        "student_wait_fraction",
        "time_to_first_step_s",
        "wall_s",
    },
    "ledger": {"planned", "committed", "quarantined", "duplicates"},
    "versions": {"python", "ray", "torch", "deepspeed", "transformers"},
}
STAGES = {"data", "teacher", "labels", "student", "baseline", "evaluate", "export", "report"}
COSTLY = ("data", "teacher", "labels", "student", "baseline")


@dataclass(frozen=True)
class Finished:
    """A run and what stood in its run directory when it had ended."""

    job: Json
    ended: Ended
    report: Json
    stages: Json

    @property
    def storage(self) -> Path:
        return Path(self.job["storage"])

    @property
    def folder(self) -> Path:
        return self.storage / "runs" / self.job["name"]


def run(job: Json, *args: str, number: int = 1) -> Finished:
    """Run `job`; a changed job, or one on changed files, has another `number` under the same name."""
    storage, name = Path(job["storage"]), job["name"] if number == 1 else f"{job['name']}-{number}"
    ended = distill(storage.parent / "log", "run", write_job(job), *args).assert_ok()
    return Finished(job, ended, report(storage, name), stages(storage, name))


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with everything on."""
    folder = tmp_path_factory.mktemp("first")
    job = tiny_job(write_corpus(folder / "corpus"), folder / "store")
    return run(job | {"evaluate": {"rows": 8, "baseline": True}, "tracking": {}}, "--json")


@pytest.fixture(scope="session")
def again(first: Finished) -> Finished:
    """The same job once more."""
    return run(first.job)


@pytest.fixture
def copied(first: Finished, tmp_path: Path) -> Json:
    """The job, not tracked, on a copy of the storage in which it is done."""
    for stage in (*COSTLY, "heldout"):
        shutil.copytree(first.storage / stage, tmp_path / "store" / stage)
    return first.job | {"storage": str(tmp_path / "store"), "tracking": {"enabled": False}}


# What a run leaves behind.


@pytest.mark.slice
def test_report_has_what_it_promises(first: Finished) -> None:
    found = first.report
    assert json.loads(first.ended.stdout) == found
    for section, keys in CONTRACT.items():
        assert keys <= found[section].keys(), section
        numbers = [found[section][key] for key in keys if not isinstance(found[section][key], str)]
        assert all(value is not None and value >= 0 for value in numbers), section
    assert {"gap_recovered", "seed", "git_commit", "fingerprints"} <= found.keys()
    assert found["faults"] == [] and found["attempt"] == 1 and found["bottleneck"].endswith(".")
    assert {"labels", "student", "baseline", "teacher"} == found["timeline"].keys()
    tokens = found["heldout"]["tokens"]
    assert tokens == 8 * 32
    for name in ("student", "baseline"):
        assert sum(found["heldout"]["kl_histogram"][name]) == tokens
        bins = found["heldout"]["by_teacher_entropy"]
        by_entropy = zip(bins["tokens"], bins[name]["kl_to_teacher_nats"], strict=True)
        assert sum(n * kl for n, kl in by_entropy) / tokens == pytest.approx(found[name]["kl_to_teacher_nats"], rel=1e-3)
    assert found["student"]["params"] < found["teacher"]["params"]
    assert found["student"]["params"] == found["baseline"]["params"]
    ce = {name: found[name]["heldout_ce_nats"] for name in ("teacher", "student", "baseline")}
    gap = (ce["baseline"] - ce["student"]) / (ce["baseline"] - ce["teacher"])
    assert found["gap_recovered"] == pytest.approx(gap)
    for name, (low, high) in ((n, found[n]["heldout_ce_nats_interval"]) for n in ce):
        assert low < ce[name] < high, name
    assert all(entry.keys() == {"prompt", *ce} and entry["prompt"] for entry in found["generated"]) and found["generated"]
    assert {"teacher", "student", "baseline"} == found["training"].keys()
    assert all(training["peak_memory_bytes"] > 50e6 for training in found["training"].values())
    assert found["data"]["rows"] == found["ledger"]["planned"] and found["data"]["documents"] > 0
    assert len(found["hardware"]) == 1 and found["hardware"][0]["cores"] == os.cpu_count()
    assert found["job_file"] == str(first.folder / "job.yaml")
    assert found["labels"]["reused_shards"] == 0
    assert found["labels"]["shards"] == len(commits(first.storage))
    assert_every_row_labelled_once(first.storage)


@pytest.mark.slice
def test_run_directory_is_complete(first: Finished) -> None:
    names = {file.name for file in first.folder.iterdir()}
    assert {"job.yaml", "plan.json", "run.json", "report.json", "report.html", "summary.md", "metrics.jsonl"} <= names
    assert first.stages.keys() == STAGES
    assert {record["status"] for record in first.stages.values()} == {"ran"}
    assert first.ended.started(LABELLER) and first.ended.started(TRAINER)
    page = (first.folder / "report.html").read_text()
    assert "<html" in page and f"{first.report['student']['heldout_ce_nats']:.4f}" in page
    assert "tiny" in (first.folder / "summary.md").read_text()
    assert [p["step"] for p in metric_points(first.storage, "student")] == list(range(STEPS))


@pytest.mark.slice
def test_first_and_last_line_say_where_to_look(first: Finished) -> None:
    lines = first.ended.stderr.strip().split("\n")
    assert lines[0] == lines[-1]
    assert str(first.folder) in lines[0]
    assert f"mlflow ui --backend-store-uri sqlite:///{first.storage}/mlflow.db" in lines[0]
    assert "Traceback" not in first.ended.stderr


@pytest.mark.slice
def test_export_is_the_student(first: Finished) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student, export = only(first.storage / "student") / "model", first.folder / "export"
    ids = AutoTokenizer.from_pretrained(export)("def main():\n    return", return_tensors="pt").input_ids
    assert ids.shape[1] > 3
    with torch.inference_mode():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (student, export)]
    assert torch.equal(*logits)
    teacher = AutoModelForCausalLM.from_pretrained(only(first.storage / "teacher") / "model")
    with torch.inference_mode():
        assert not torch.equal(teacher(ids).logits, logits[0])


@pytest.mark.slice
def test_mlflow_has_the_run_once(first: Finished, again: Finished) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{first.storage}/mlflow.db")
    experiment = client.get_experiment_by_name("distill")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    children = {r.info.run_name.rpartition("/")[2].partition(":")[0]: r for r in runs if r is not parent}
    assert children.keys() == STAGES and len(runs) == 1 + len(STAGES)
    assert {r.data.tags["mlflow.parentRunId"] for r in children.values()} == {parent.info.run_id}
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert parent.data.params["train.learning_rate"] == "0.002"
    assert children["student"].data.params["fingerprint"] == first.stages["student"]["key"]
    for stage in ("labels", "student", "baseline"):
        assert_recorded_once(client, children[stage].info.run_id, metric_points(first.storage, stage))
    assert children["student"].inputs.dataset_inputs or children["data"].inputs.dataset_inputs
    assert "report.html" in {item.path for item in client.list_artifacts(parent.info.run_id)}


def assert_recorded_once(client: Any, run_id: str, points: list[Json]) -> None:
    """Every value of `points` is in the history of its metric, at its step, once."""
    assert points
    for name in {name for point in points for name in point["metrics"]}:
        history = Counter((m.step, m.value) for m in client.get_metric_history(run_id, name))
        assert history == Counter((p["step"], p["metrics"][name]) for p in points if name in p["metrics"]), name


# What running again reuses.


@pytest.mark.slice
def test_the_same_job_again_reuses_everything(first: Finished, again: Finished) -> None:
    assert {again.stages[stage]["status"] for stage in COSTLY} == {"reused"}
    assert again.report["labels"]["reused_shards"] == again.report["labels"]["shards"] == len(commits(first.storage))
    assert not again.ended.started(LABELLER) and not again.ended.started(TRAINER)
    assert again.report["fingerprints"] == first.report["fingerprints"]
    same = MODEL - {"tokens_per_s"}
    for name in ("teacher", "student", "baseline"):
        assert {k: again.report[name][k] for k in same} == {k: first.report[name][k] for k in same}


@pytest.mark.parametrize("change", ["objective.alpha=0.5", "train.learning_rate=1e-3"])
def test_a_changed_objective_reuses_the_labels(change: str, first: Finished, copied: Json) -> None:
    before = commits(first.storage)
    storage = Path(copied["storage"])
    shutil.rmtree(storage / "student")
    found = run(copied, "--set", change, "--set", "evaluate.baseline=false")
    status = statuses(storage)
    assert (status["labels"], status["student"]) == ("reused", "ran")
    assert found.report["labels"]["reused_shards"] == found.report["labels"]["shards"] == len(before)
    assert not found.ended.started(LABELLER) and found.ended.started(TRAINER)
    assert commits(storage) == before
    assert student_weights(storage) != student_weights(first.storage)


def test_one_bit_of_the_teacher_makes_other_labels(first: Finished, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(only(first.storage / "teacher") / "model", teacher)
    few = first.job["train"] | {"steps": 20}
    data = first.job["data"] | {"tokenizer": {"kind": "teacher"}}
    given = {"kind": "transformers", "path": str(teacher), "dtype": "fp32"}
    plain = {"evaluate": {"rows": 8, "baseline": False}, "tracking": {"enabled": False}}
    job = first.job | {"storage": str(tmp_path / "store"), "data": data, "teacher": given, "train": few} | plain
    true = run(job)
    log = only(true.storage / "labels")
    kept = {file: file.read_bytes() for file in log.rglob("*") if file.is_file()}
    flip_mantissa_bit(teacher / "model.safetensors")
    changed = run(job, number=2)
    assert changed.stages["labels"]["key"] != true.stages["labels"]["key"] == log.name
    assert changed.report["labels"]["reused_shards"] == 0 and changed.ended.started(LABELLER)
    assert changed.stages["student"]["key"] != true.stages["student"]["key"]
    assert {file: file.read_bytes() for file in log.rglob("*") if file.is_file()} == kept


def flip_mantissa_bit(file: Path) -> None:
    """Flip the lowest mantissa bit of the last fp32 value."""
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)


def test_a_teacher_held_close_to_its_student_does_not_starve_it(copied: Json) -> None:
    """One step needs more shards than the teacher may be ahead."""
    storage = Path(copied["storage"])
    shutil.rmtree(storage / "labels")
    train = copied["train"] | {"steps": 20, "global_batch": 3 * SHARD_ROWS}
    held = {"labels": copied["labels"] | {"run_ahead": 1}, "evaluate": {"rows": 8, "baseline": False}}
    found = run(copied | {"train": train} | held)
    assert found.report["labels"]["shards"] == len(commits(storage)) >= 60
    assert found.report["throughput"]["teacher_wait_fraction"] > 0


def test_other_labels_and_objectives_go_the_same_way(copied: Json) -> None:
    """Hidden states and features by coordinates, an adaptive target, relations; two workers, ZeRO-3."""
    storage = Path(copied["storage"])
    labels = {
        "kind": "hidden",
        "codec": "pca",
        "rank": 16,
        "features": {"keep": [{"layer": 2, "part": "values"}, {"layer": 2}], "codec": "int8"},
    }
    objective = {
        "alpha": {"start": 0.5, "end": 0.1},
        "temperature": {"kind": "cosine", "start": 2.0, "end": 1.0},
        "divergences": [{"kind": "jsd", "weight": 0.5}, {"kind": "reverse_kl", "weight": 0.5}],
        "taid": {},
        "features": [{"kind": "minilm", "weight": 0.5, "heads": 2}, {"kind": "cosine", "weight": 1.0}],
    }
    train = copied["train"] | {"workers": 2, "parallel": {"stage": 3}}
    found = run(copied | {"labels": labels, "objective": objective, "train": train, "evaluate": {"rows": 8, "baseline": False}})
    assert found.report["labels"]["kind"] == "hidden" and found.stages["teacher"]["status"] == "reused"
    points = [p["metrics"] for p in metric_points(storage, "student")]
    assert len(points) == STEPS
    assert points[-1]["train/feature_loss"] < points[0]["train/feature_loss"]
    assert all(p["train/kd_nats"] > 0 for p in points)
    log = storage / "labels" / found.stages["labels"]["key"]
    assert (log / "basis.json").is_file()
    inspected = distill(storage.parent / "log", "labels", "inspect", log, "--json").assert_ok()
    columns = json.loads(inspected.stdout)["bytes_per_token"]["columns"]
    assert {"states", "hidden.2", "values.2", "values.2_scale"} <= columns.keys() and columns["states"] <= 16 * 2


# Workers.


def test_two_workers_learn_what_one_does(first: Finished, copied: Json) -> None:
    two = copied | {"train": copied["train"] | {"workers": 2}, "evaluate": {"rows": 8, "baseline": False}}
    assert run(two).stages["student"]["status"] == "reused", "their number is no part of a training's name"
    shutil.rmtree(Path(two["storage"]) / "student")
    storage = run(two).storage
    one, both = (points_by_step(where) for where in (first.storage, storage))
    worst = max(abs(both[step] - one[step]) / one[step] for step in range(STEPS))
    print(json.dumps({"largest_relative_difference_of_a_loss": worst}))
    assert worst <= 1e-5
    assert worst > 0 or both == one


def points_by_step(storage: Path) -> dict[int, float]:
    losses = {p["step"]: p["metrics"]["train/loss"] for p in metric_points(storage, "student")}
    assert losses.keys() == set(range(STEPS))
    return losses
