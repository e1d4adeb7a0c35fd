"""Which fields of a job change a result is said at the field, and keys follow it: of trainings, label logs and runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest

from orchestrator.plan.fingerprint import fingerprint
from orchestrator.run.directory import identity_of
from orchestrator.spec.base import NO_RESULT, Spec, result_fields
from orchestrator.spec.job import Job
from orchestrator.spec.train import Train
from orchestrator.store.records import TokenManifest
from orchestrator.student.job import TrainingJob

JOBS = [
    Job.model_validate_json(json.dumps({"name": "x"} | sections))
    for sections in (
        {},
        {
            "data": {"source": {"kind": "jsonl", "paths": ["a"]}},
            "labels": {"kind": "dense"},
            "student": {"kind": "pruned", "layers": 1},
        },
        {
            "data": {"tokenizer": {"kind": "teacher"}},
            "teacher": {"kind": "transformers", "path": "/t", "vllm": {"url": "http://host:1"}},
            "labels": {"kind": "topk"},
            "student": {"kind": "checkpoint", "path": "/s"},
        },
        {
            "labels": {"kind": "hidden", "features": {"keep": [{"layer": 1}]}},
            "objective": {"alpha": {"start": 0.5, "end": 0.1}, "taid": {}, "features": [{"kind": "mse", "weight": 1.0}]},
            "student": {"kind": "upcycled", "path": "/s"},
            "train": {"parallel": {"kind": "expert"}, "workers": 2},
        },
    )
]


def leaves(spec: Spec, path: tuple[Any, ...] = (), marked: bool = False) -> Iterator[tuple[tuple[Any, ...], bool]]:
    """Every plain field at any depth, and whether it or a section around it is marked."""
    for name, field in type(spec).model_fields.items():
        yield from _below(getattr(spec, name), (*path, name), marked or NO_RESULT in field.metadata)


def _below(value: Any, path: tuple[Any, ...], marked: bool) -> Iterator[tuple[tuple[Any, ...], bool]]:
    if isinstance(value, Spec):
        yield from leaves(value, path, marked)
    elif isinstance(value, tuple) and value and isinstance(value[0], Spec):
        yield from _below(value[0], (*path, 0), marked)
    else:
        yield path, marked


def changed(value: Any, path: tuple[Any, ...]) -> Any:
    """`value` with another one at `path`, whether or not that would be a sound job."""
    if not path:
        return _other(value)
    if isinstance(value, tuple):
        return (*value[: path[0]], changed(value[path[0]], path[1:]), *value[path[0] + 1 :])
    return value.model_copy(update={path[0]: changed(getattr(value, path[0]), path[1:])})


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict | tuple):
        return {**value, "more": 1} if isinstance(value, dict) else (*value, "more")
    return f"{value} more"


CASES = [(i, path, marked) for i, job in enumerate(JOBS) for path, marked in leaves(job)]


@pytest.mark.parametrize(
    ("number", "path", "marked"), CASES, ids=lambda case: ".".join(map(str, case)) if isinstance(case, tuple) else None
)
def test_a_runs_identity_follows_the_marks(number: int, path: tuple[Any, ...], marked: bool) -> None:
    job = JOBS[number]
    other = changed(job, path)
    assert other != job
    assert (identity_of(other) == identity_of(job)) is marked


def test_the_marked_fields_are_these() -> None:
    """Read before a mark is added or taken away: a wrong one gives a changed job the results of another."""
    assert {".".join(map(str, path)) for _, path, marked in CASES if marked} == {
        "name",
        "storage",
        "tracking.enabled",
        "tracking.uri",
        "tracking.experiment",
        "cluster.address",
        "cluster.num_cpus",
        "cluster.dashboard",
        "export.directory",
        "evaluate.micro_batch",
        "labels.run_ahead",
        "teacher.vllm.url",
        *(f"teacher.{name}" for name in ("micro_batch", "shards", "replicas.min", "replicas.max", "cpus_per_shard")),
        *(f"teacher.{name}" for name in ("gpus_per_shard", "placement_timeout_s")),
        *(f"{section}.{name}" for section in ("train", "teacher.train") for name in TRAIN_MARKED),
    }


TRAIN_MARKED = {
    "micro_batch",
    "activation_checkpointing",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "checkpoint_every",
    "max_restarts",
    "on_nonfinite",
    "placement_timeout_s",
}


@pytest.mark.parametrize("name", Train.model_fields)
def test_a_trainings_key_follows_the_marks(name: str) -> None:
    """A training finds its checkpoints on other workers, and after a longer time limit, but not of another objective."""
    before = Train()
    after = changed(before, (name,)) if not isinstance(getattr(before, name), Spec) else changed(before, (name, "stage"))
    assert (training(after).key == training(before).key) is (name in TRAIN_MARKED)


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 16])
def test_the_number_of_workers_is_no_part_of_a_trainings_key(workers: int) -> None:
    """Of the defaults, 16 rows in parts of 8, four workers get fewer than `micro_batch` rows each."""
    assert training(Train(workers=workers)).key == training(Train()).key


def test_a_label_logs_identity_follows_the_marks() -> None:
    for job in JOBS:
        for path, marked in leaves(job.labels):
            other = result_fields(changed(job.labels, path))
            assert (fingerprint("labels", other) == fingerprint("labels", result_fields(job.labels))) is marked
        assert "run_ahead" not in result_fields(job.labels) and result_fields(job.labels)["kind"] == job.labels.kind


def training(train: Train) -> TrainingJob:
    manifest = TokenManifest.without_corpus(8, 300)
    return TrainingJob("student", Job(name="x").teacher.model, 300, train, 0, "data", manifest, None)


def test_no_field_is_left_out_of_the_walk() -> None:
    """Every section class of the schema stands in one of the jobs above, so that a new field is walked over too."""
    kinds = set(_sections(Job))
    seen = {type(spec) for job in JOBS for spec in _specs(job)}
    unmarked_kinds = {c.__name__ for c in kinds - seen if _has_marks(c)}
    assert unmarked_kinds == {"GgufTeacher"}, "which has the marks of every teacher"


def _has_marks(section: type[Spec]) -> bool:
    return any(NO_RESULT in field.metadata for field in section.model_fields.values())


def _specs(value: Any) -> Iterator[Spec]:
    if isinstance(value, Spec):
        yield value
        for name in type(value).model_fields:
            yield from _specs(getattr(value, name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _specs(item)


def _sections(kind: Any) -> Iterator[type[Spec]]:
    if isinstance(kind, type) and issubclass(kind, Spec):
        yield kind
        for field in kind.model_fields.values():
            yield from _sections(field.annotation)
    elif get_origin(kind) is not Literal:
        for inner in get_args(kind):
            yield from _sections(inner)
