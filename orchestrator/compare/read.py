"""A run as it lies in the storage, finished or not, with what a comparison takes from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from orchestrator.compare.figures import FIGURES
from orchestrator.errors import SpecError
from orchestrator.run_lookup import INPUTS, SHOWN_HEX, find_run, status_of
from orchestrator.spec.base import flat, result_fields
from orchestrator.spec.job import Job
from orchestrator.spec.reader import Reader
from orchestrator.store.files import Store
from orchestrator.tracking.figures import recovered
from orchestrator.tracking.names import stage_id

Flat = dict[str, Any]
"""A job with dotted keys, as they are written in an override."""


@dataclass(frozen=True)
class RunRecord:
    """One run of a comparison."""

    name: str
    """Unique within the comparison: the run's name, or its address where two storages have that name."""
    address: str
    status: str
    """As `status_of` says it."""
    started_s: float
    """Unix time at which its first attempt began; 0 where that is not known."""
    job: Flat
    """Every field of the job, and `inputs`, which stands for the files that the run read."""
    result: Flat
    """Those of them that can change a result, without the seed."""
    job_yaml: str
    figures: dict[str, float]
    """The figures that the run has, by `Figure.name`."""
    points: list[dict[str, Any]] = field(repr=False)
    """Metric points of the run's stages; times count from 1970."""
    heldout: str | None
    """Identifies the rows that the figures were measured on; None before the data stage."""

    @property
    def seed(self) -> Any:
        return self.job.get("seed")

    @property
    def finished(self) -> bool:
        return self.status == "finished"


def read_runs(runs: Sequence[str], storage: str | None = None) -> list[RunRecord]:
    """The records of `runs`, in that order, each found by `find_run`.

    Raises `SpecError` for a run that is not there or that is given twice.
    """
    directories = [find_run(run, storage) for run in runs]
    addresses = [directory.address() for directory in directories]
    twice = next((run for i, run in enumerate(runs) if addresses[i] in addresses[:i]), None)
    if twice is not None:
        raise SpecError(f"{twice}: this run is given twice; name each run once")
    names = [address.rstrip("/").rpartition("/")[2] for address in addresses]
    unique = [name if names.count(name) == 1 else address for name, address in zip(names, addresses, strict=True)]
    return [_read(directory, name) for directory, name in zip(directories, unique, strict=True)]


def _read(directory: Store, name: str) -> RunRecord:
    job_yaml = directory.read("job.yaml").decode()
    job, result = _fields(job_yaml, f"{directory.address()}/job.yaml")
    record: dict[str, Any] = directory.read_json("run.json") or {}
    inputs = {INPUTS: record[INPUTS][:SHOWN_HEX]} if record.get(INPUTS) else {}
    stages: dict[str, dict[str, Any]] = record.get("stages", {})
    data = stages.get("data")
    measured = (job.get("evaluate.rows"), job.get("evaluate.every") and job.get("evaluate.every_rows"))
    return RunRecord(
        name=name,
        address=directory.address(),
        status=status_of(directory, "", record),
        started_s=record.get("started_s", 0.0),
        job=job | inputs,
        result=result | inputs,
        job_yaml=job_yaml,
        figures=_figures(directory.read_json("report.json") or {}),
        points=_points(directory, stages),
        heldout=f"{data['key']}:{measured}" if data else None,
    )


def _fields(job_yaml: str, where: str) -> tuple[Flat, Flat]:
    """All fields of a job, and those that can change a result, without name and seed.

    A job that this version does not take any more is compared as it is written.
    """
    data: Any = Reader(job_yaml, where).read()
    try:
        job = Job.model_validate_json(json.dumps(data))
    except ValidationError:
        everything = flat(data)
        return everything, {key: value for key, value in everything.items() if key not in ("name", "seed", "storage")}
    result = flat(result_fields(job))
    result.pop("seed")
    return flat(job.model_dump(mode="json")), result


def _figures(report: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    told = {**report, "gap_recovered": recovered(report)}
    for figure in FIGURES:
        value: Any = told
        for key in figure.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            found[figure.name] = float(value)
    return found


def _points(directory: Store, stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of the run's present stages; a line that is torn or damaged is left out."""
    current = {stage_id(name, stage["key"]): name for name, stage in stages.items()}
    try:
        lines = directory.read("metrics.jsonl").split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    points: list[dict[str, Any]] = []
    for line in lines:
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if point.get("stage") in current:
            points.append(point | {"stage": current[point["stage"]]})
    return points
