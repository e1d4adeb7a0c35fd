"""Data that MLflow receives about a run as a whole: who and where, the job as parameters, and at the end its figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.plan.length import shown_length
from orchestrator.run.place import Place
from orchestrator.runtime.environment import job_tags, tracking_uri, user_name
from orchestrator.runtime.versions import git_commit
from orchestrator.spec.base import flat
from orchestrator.spec.job import Job
from orchestrator.spec.load import resolved_yaml
from orchestrator.spec.model import CheckpointStudent, ConfigStudent, GgufTeacher, PretrainTeacher, TransformersTeacher
from orchestrator.store.files import Store
from orchestrator.store.local import LocalStore
from orchestrator.tracking.figures import recovered
from orchestrator.tracking.mlflow_tracker import Tracker, redact, run_url, sqlite_uri

NOTE = "mlflow.note.content"
_FIGURES = ("teacher", "student", "baseline", "labels", "throughput")


def start_tracker(job: Job, place: Place, spool: Path, state: Path, warn: Callable[[str], None]) -> tuple[Tracker, str]:
    """The started tracker of a run, and where a person looks at it; it follows the metric log `spool`, and keeps its own
    state in the file `state`."""
    tracking, store = job.tracking, place.store
    uri = tracking.uri or tracking_uri() or (_own_database(store) if tracking.enabled else "")
    own = uri.startswith("sqlite:") and isinstance(store, LocalStore)
    tracker = Tracker(
        uri=uri,
        experiment=tracking.experiment,
        run_name=place.directory.run,
        spool_path=spool,
        state_path=state,
        tags=_tags(job, place),
        artifact_location=Path(store.address("mlartifacts")).as_uri() if own else None,
        warn=warn,
        enabled=tracking.enabled,
    )
    tracker.start()
    tracker.params(job_params(job))
    tracker.text("job.yaml", resolved_yaml(without_password(job)))
    return tracker, run_url(uri) if tracking.enabled else "off"


def job_params(job: Job) -> dict[str, Any]:
    """All of `job` as MLflow parameters by dotted key, without a password."""
    fields = flat(without_password(job).model_dump(mode="json"))
    return {key: json.dumps(value) if isinstance(value, list) else value for key, value in fields.items()}


def final_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `report` by which runs are compared, as `student/heldout_ce_nats` or `gap_recovered`."""
    sections = {name: report.get(name) for name in _FIGURES}
    found = {f"{section}/{name}": value for section, part in sections.items() for name, value in (part or {}).items()}
    found["gap_recovered"] = recovered(report)
    return {name: value for name, value in found.items() if isinstance(value, int | float) and isfinite(value)}


def description(job: Job) -> str:
    """One sentence that says what `job` does."""
    train = job.train
    return (
        f"Distils {_teacher(job)} into {_student(job)} on {job.data.source.kind} text: {job.labels.kind} labels, "
        f"{shown_length(train)} of {train.global_batch} rows of {job.data.seq_len} tokens."
    )


def without_password(job: Job) -> Job:
    """`job` as others may see it."""
    uri = job.tracking.uri
    return job.model_copy(update={"tracking": job.tracking.model_copy(update={"uri": redact(uri)})}) if uri else job


def _tags(job: Job, place: Place) -> dict[str, str]:
    """Tags of the parent run, those in the list that MLflow's own clients set among them."""
    submission = job_tags()
    tags = {
        "run_directory": place.store.address(place.directory.key),
        "identity": place.directory.identity,
        "mlflow.source.name": "distill run",
        "mlflow.source.type": "JOB" if submission else "LOCAL",
        "mlflow.source.git.commit": git_commit(),
        "mlflow.user": user_name(),
        NOTE: description(job),
    }
    return {name: value for name, value in tags.items() if value} | submission


def _own_database(store: Store) -> str:
    if not isinstance(store, LocalStore):
        raise SpecError(
            f"tracking.uri: {store.address()} cannot hold MLflow's database; give the address of an MLflow server there or in "
            "MLFLOW_TRACKING_URI, or set tracking.enabled: false"
        )
    return sqlite_uri(store.path("mlflow.db"))


def _teacher(job: Job) -> str:
    match job.teacher:
        case PretrainTeacher(model=model):
            return f"a {model.type} teacher trained for it"
        case TransformersTeacher(path=path):
            return path
        case GgufTeacher(file=file, package=package):
            return file or f"the model of {package}"


def _student(job: Job) -> str:
    match job.student:
        case ConfigStudent(model=model):
            return f"a {model.type} student from scratch"
        case CheckpointStudent(path=path):
            return f"the checkpoint {path}"
        case other:
            return f"a student of kind {other.kind}"
