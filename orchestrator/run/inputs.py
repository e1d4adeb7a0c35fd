"""The files of this machine that a job reads: with other bytes in them, the same job file is another run."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.data.sources import corpus_listing
from orchestrator.errors import DataError
from orchestrator.models.hub import MODEL_FILES
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.spec.data import DatasetSource, Source
from orchestrator.spec.job import Job
from orchestrator.spec.model import CheckpointStudent, GgufTeacher, TransformersTeacher, UpcycledStudent

ABSENT = "absent"


def inputs_of(job: Job) -> str:
    """Hex fingerprint of names, sizes and times of the local files that `job` reads.

    What is on a hub, or in an installed package, counts by its name in the job alone. Nothing is raised for files that are
    missing, which is for the checks to say.
    """
    return fingerprint("inputs", list(_inputs(job)))


def _inputs(job: Job) -> Iterator[list[Any]]:
    yield _corpus(job.data.source)
    if isinstance(job.teacher, GgufTeacher) and job.teacher.file is not None:
        file = Path(job.teacher.file).expanduser()
        yield _listing(file.parent, glob.escape(file.name))
    for model in (job.teacher, job.student):
        if isinstance(model, TransformersTeacher | CheckpointStudent | UpcycledStudent):
            yield _listing(Path(model.path).expanduser(), *MODEL_FILES)


def _corpus(source: Source) -> list[Any]:
    if isinstance(source, DatasetSource):
        return _listing(Path(source.name).expanduser(), "**/*")
    try:
        return corpus_listing(source)
    except (DataError, OSError):
        return [ABSENT]


def _listing(folder: Path, *patterns: str) -> list[Any]:
    """[name, bytes, mtime in ns] of the files in `folder`."""
    try:
        files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
        stats = [(file, file.stat()) for file in files]
    except OSError:
        return [ABSENT]
    return [[str(file.relative_to(folder)), s.st_size, s.st_mtime_ns] for file, s in stats] or [ABSENT]
