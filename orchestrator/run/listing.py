"""The runs of a storage, as a list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from orchestrator.run.directory import RUN, RunDirectory, claimed
from orchestrator.run_lookup import INPUTS, SHOWN_HEX, status_of
from orchestrator.spec.base import flat, result_fields
from orchestrator.spec.job import Job
from orchestrator.store.files import Store
from orchestrator.tracking.figures import recovered


@dataclass(frozen=True)
class RunSummary:
    """One run, its state and its headline figures; None for what is not known (yet)."""

    run: str
    name: str
    number: int
    identity: str
    status: str
    """As `status_of` says it."""
    started_s: float | None
    """Unix time at which its first attempt began."""
    seconds: float | None
    """The seconds of all attempts of the run together."""
    student_heldout_ce_nats: float | None
    gap_recovered: float | None
    differs: dict[str, Any]
    """Fields that can change a result and have other values than in the first run of that name, with these values; `inputs`
    stands for the files that it read."""


def list_runs(store: Store, name: str | None = None) -> Iterator[RunSummary]:
    """All runs in `store`, or those of the job called `name`, by name and number."""
    first: dict[str, dict[str, Any]] = {}
    for directory in claimed(store, name):
        fields = _result_fields(store, directory)
        reference = first.setdefault(directory.name, fields)
        differs = {key: value for key, value in fields.items() if key not in reference or reference[key] != value}
        yield _summary(store, directory, differs)


def _summary(store: Store, directory: RunDirectory, differs: dict[str, Any]) -> RunSummary:
    record: dict[str, Any] = store.read_json(f"{directory.key}/{RUN}") or {}
    report: dict[str, Any] = store.read_json(f"{directory.key}/report.json") or {}
    return RunSummary(
        run=directory.run,
        name=directory.name,
        number=directory.number,
        identity=directory.identity,
        status=status_of(store, directory.key, record),
        started_s=record.get("started_s"),
        seconds=record.get("seconds"),
        student_heldout_ce_nats=(report.get("student") or {}).get("heldout_ce_nats"),
        gap_recovered=recovered(report),
        differs=differs,
    )


def _result_fields(store: Store, directory: RunDirectory) -> dict[str, Any]:
    """Return the values that can change the run's result: fields of its job, by dotted name, and its inputs; empty for a job
    that this version does not understand."""
    plan = store.read_json(f"{directory.key}/plan.json") or {}
    try:
        fields = flat(result_fields(Job.model_validate_json(json.dumps(plan.get("job")))))
    except ValidationError:
        return {}
    return fields | {INPUTS: directory.inputs[:SHOWN_HEX]}
