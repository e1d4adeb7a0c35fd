"""Sending a run to a cluster: what of a job may leave this machine, and the way to the job server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import SpecError
from orchestrator.plan.make import make_plan
from orchestrator.runtime.environment import job_server_url, prepare_ray
from orchestrator.spec.job import Job
from orchestrator.spec.load import load_job
from orchestrator.tracking.mlflow_tracker import redact

if TYPE_CHECKING:
    from orchestrator.runtime.jobs import JobServer, Submission

_REFERENCE = re.compile(r"\$\{[^{}]*\}")
_USER_ALONE = re.compile(r"://[^\s/?#:@]*:?@")


def submit(path: str | Path, overrides: Sequence[str] = (), address: str | None = None) -> tuple[Submission, bool]:
    """Submit the job in the file `path` to the cluster whose job server is at `address` (`host:port` or a URL).

    Safe to repeat: False in the second place says that the same job was going on already. Raises `SpecError` for a job that
    cannot travel, `LockedError` if another job of that name is going on there, `EnvironmentFault` if nobody answers.
    """
    return connect(address).submit(portable_job(path, overrides))


def connect(address: str | None) -> JobServer:
    """The job server at `address`; without one that of $RAY_API_SERVER_ADDRESS, else of this machine."""
    prepare_ray(local=False)
    from orchestrator.runtime.jobs import JobServer

    return JobServer(job_server_url(address))


def portable_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """The job in the file `path` for the cluster it will be on, its references to the environment left to that.

    Raises `SpecError` for a job that would mean something else there, or that holds a password.
    """
    job = load_job(path, overrides, interpolate=False)
    if not re.match(r"/|~|[\w+.-]+://|\$\{", job.storage):
        raise SpecError(f"storage: {job.storage} is relative to this machine; submitted, it must be what all nodes share")
    for key, text in (("storage", job.storage), ("tracking.uri", job.tracking.uri or "")):
        if _holds_password(text):
            raise SpecError(f"{key}: holds a password; write ${{oc.env:VARIABLE}} in its place and set that on the cluster")
    make_plan(job)
    return job.model_copy(update={"cluster": job.cluster.model_copy(update={"address": "auto"})})


def _holds_password(text: str) -> bool:
    written = _USER_ALONE.sub("://", _REFERENCE.sub("", text))
    return redact(written) != written
