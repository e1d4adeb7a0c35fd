"""Runs as jobs on a Ray cluster, by way of its job server: submit, follow, stop.

What travels is the job file, whose references to the environment are resolved on the cluster, and the package `orchestrator` as
it is here; what it depends on is installed there. Nothing of this machine's environment goes along.
"""

from __future__ import annotations

import asyncio
import logging
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from orchestrator.errors import EnvironmentFault, LockedError, ResumableError, SpecError
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.runtime.versions import PACKAGE_FOLDER
from orchestrator.spec.job import Job
from orchestrator.spec.load import resolved_yaml

TIMEOUT_S = (5.0, 60.0)
"""To connect to the job server, and for its answer."""
STOP_S = 60
"""Time for a stopped run to close its books before it is killed."""
POLL_S = 1.0
RUN, KEY = "distill.run", "distill.key"
"""Metadata of our jobs: the run's name, and the fingerprint of what was submitted."""
ENTRYPOINT = r"""
raylet=$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$PPID/status 2>/dev/null)
of_ray=$(tr '\0' '\n' 2>/dev/null </proc/$raylet/cmdline | sed -n 's/^--python_worker_command=\([^ ]*\).*/\1/p')
for python in "$DISTILL_PYTHON" "$of_ray" python python3; do
  "$python" -c 'import sys, importlib.util as u; sys.exit(None in map(u.find_spec, ("ray", "typer")))' 2>/dev/null &&
    exec "$python" -m orchestrator.cli VERB job.yaml
done
echo "distill: no Python on this cluster has the packages of distill: install them in the environment that Ray runs in," \
  "or start Ray with DISTILL_PYTHON set to the interpreter that has them" >&2
exit 4
"""
"""Shell script of a job. PATH leads to Ray's interpreter only where its environment was activated, and Ray does not tell a job
where it is; the command line of the raylet, the parent of the process that supervises the job, does."""
ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ENDED = {"STOPPED", "SUCCEEDED", "FAILED"}


@dataclass(frozen=True)
class Submission:
    """A run that was submitted."""

    id: str
    run: str
    key: str
    """Fingerprint of the job; the same job has the same."""
    status: str
    """PENDING, RUNNING, or one of `ENDED`."""
    started_s: float
    """Unix time."""
    ended_s: float | None
    exit_code: int | None
    """None as long as it goes on."""
    message: str
    """The job server's, in its own words."""

    @classmethod
    def of(cls, job: JobDetails) -> Submission:
        metadata, status = job.metadata or {}, str(job.status)
        return cls(
            id=job.submission_id or "",
            run=metadata.get(RUN, ""),
            key=metadata.get(KEY, ""),
            status=status,
            started_s=(job.start_time or 0) / 1000,
            ended_s=job.end_time / 1000 if job.end_time else None,
            exit_code=_exit_code(status, job.driver_exit_code) if status in ENDED else None,
            message=job.message or "",
        )

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class JobServer:
    """The job server of one cluster. Every method raises `EnvironmentFault` if it cannot be reached or refuses our token."""

    def __init__(self, url: str) -> None:
        self.url = url
        if not re.match(r"https?://[^/]", url):
            raise SpecError(f"--address: {url} is no job server; expected host:port or http(s)://host:port")
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)  # the loggers of its job client are set to INFO one by one
        with self._faults():
            self._client = _Client(url)

    def submit(self, job: Job) -> tuple[Submission, bool]:
        """Submit `job`, whose text is not interpolated; False beside it if the same job was going on already.

        A job that has ended is submitted anew, and continues. Raises `LockedError` if another job of that name is going on,
        and `SpecError` if somebody else's job has the id.
        """
        key = fingerprint("submission", job.model_dump(mode="json"))
        earlier = [s for s in self.submissions() if s.run == job.name]
        for going in (s for s in earlier if not s.ended):
            if going.key == key:
                return going, False
            raise LockedError(f"{job.name}: {going.id} is going on with another job file; distill stop {going.id} would end it")
        stem = f"{job.name}-{key[:8]}"
        submission_id = f"{stem}-{1 + sum(s.key == key for s in earlier)}"
        try:
            self._start(submission_id, "run", job, {RUN: job.name, KEY: key})
        except _Taken:
            taken = self.state(submission_id)
            if taken.key != key:
                raise SpecError(f"{submission_id}: that job id is taken at {self.url} by a job that is not ours") from None
            return taken, False  # submitted twice at the same moment
        return self.state(submission_id), True

    def examine(self, job: Job) -> str:
        """Have `distill doctor` look at the cluster with the eyes of `job`; returns the id of that job, which is not a run."""
        submission_id = f"doctor-{uuid.uuid4().hex[:12]}"
        self._start(submission_id, "doctor", job, {})
        return submission_id

    def submissions(self) -> list[Submission]:
        """All runs that the cluster knows, oldest first."""
        with self._faults():
            jobs = self._client.list_jobs()
        return sorted((Submission.of(j) for j in jobs if RUN in (j.metadata or {})), key=lambda s: s.started_s)

    def find(self, name: str) -> Submission:
        """The submission with the id `name`, else the newest of the run `name`. Raises `SpecError` if there is none."""
        if not ID_PATTERN.fullmatch(name):
            raise SpecError(f"{name}: not a job id")
        known = self.submissions()
        found = [s for s in known if s.id == name] or [s for s in known if s.run == name]
        if not found:
            raise SpecError(f"{name}: no such run at {self.url}; distill list shows those there are")
        return found[-1]

    def state(self, submission_id: str) -> Submission:
        with self._faults():
            return Submission.of(self._client.get_job_info(submission_id))

    def logs(self, submission_id: str) -> str:
        """Return the output that the run has written so far."""
        with self._faults():
            return self._client.get_job_logs(submission_id)

    def follow(self, submission_id: str, write: Callable[[str], object]) -> Submission:
        """Hand over what the job writes until it ends. Raises `ResumableError` if the connection breaks; the job goes on."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(submission_id):
                write(text)

        try:
            asyncio.run(tail())
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise ResumableError(f"lost contact with {self.url}, {submission_id} goes on there: {error}") from error
        return self.ended(submission_id)

    def stop(self, submission_id: str) -> Submission:
        """End a run as SIGTERM would, and wait for it."""
        with self._faults():
            self._client.stop_job(submission_id)
        return self.ended(submission_id)

    def ended(self, submission_id: str) -> Submission:
        """The job once it has ended."""
        while not (found := self.state(submission_id)).ended:
            time.sleep(POLL_S)
        return found

    def _start(self, submission_id: str, verb: str, job: Job, metadata: dict[str, str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "job.yaml").write_text(resolved_yaml(job, interpolated=False))
            environment: dict[str, Any] = {
                "working_dir": folder,
                "py_modules": [str(PACKAGE_FOLDER)],
                "excludes": ["__pycache__"],
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
            }
            with self._faults():
                self._client.submit_job(
                    entrypoint=ENTRYPOINT.replace("VERB", verb),
                    submission_id=submission_id,
                    runtime_env=environment,
                    metadata=metadata,
                )

    @contextmanager
    def _faults(self) -> Generator[None]:
        try:
            yield
        except AuthenticationError as error:
            refused = error.message.startswith("Authentication failed")  # without a token, Ray's client does not even ask
            answer = "403, the token is not its own" if refused else "401, no token was sent"
            raise EnvironmentFault(f"{self.url} answers {answer}; distill doctor says where Ray looks for one") from error
        except (requests.RequestException, OSError, LookupError) as error:
            raise EnvironmentFault(
                f"no Ray job server answers at {self.url}; give the head's with --address HEAD:8265"
            ) from error
        except RuntimeError as error:
            if "already exists" in str(error):
                raise _Taken from error
            raise EnvironmentFault(f"{self.url}: {str(error).strip().splitlines()[-1]}") from error


class _Taken(Exception):
    """A job has that id."""


class _Client(JobSubmissionClient):
    def _do_request(self, *args: Any, **options: Any) -> requests.Response:
        return super()._do_request(*args, timeout=TIMEOUT_S, **options)  # Ray's own would wait for ever


def _exit_code(status: str, driver: int | None) -> int:
    """As a shell would have it; 6, for it can be continued, if the run's driver never said."""
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return 143
    if driver is None:
        return ResumableError.exit_code
    return driver if driver >= 0 else 128 - driver
