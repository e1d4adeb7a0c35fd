"""Run directories: a run is the name of a job and a number.

    runs/NAME             the first run of that name
    runs/NAME-2           the next one under the same name: a job that differs from it in a field that can change a result,
                          or the same job on other files
    runs/.claims/NAME-2   which job has that directory: written once, before anything else of the run

A claim outlasts its directory, so a number is never given to two jobs. The same job on the same files always gets the same
directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count

from orchestrator.plan.fingerprint import fingerprint
from orchestrator.run.inputs import inputs_of
from orchestrator.spec.job import Job
from orchestrator.store.files import Store
from orchestrator.store.records import Record

RUN = "run.json"
_CLAIMS = "runs/.claims"


class RunDirectory(Record):
    """The directory of one job's run."""

    name: str
    """Name in the job file."""
    number: int
    """Counts from 1."""
    identity: str
    """Hex fingerprint of the job's fields that can change a result, and of `inputs`."""
    inputs: str = ""
    """Hex fingerprint of the local files that the job read; empty in claims of versions that did not look."""

    @property
    def run(self) -> str:
        """Name of the run: `NAME`, or `NAME-NUMBER` from the second on."""
        return self.name if self.number == 1 else f"{self.name}-{self.number}"

    @property
    def key(self) -> str:
        """Folder in the storage."""
        return f"runs/{self.run}"


def identity_of(job: Job) -> str:
    """Hex identity of `job` on this machine's files, by the fields that can change a result; its name is not one of them."""
    return _identity(job, inputs_of(job))


def _identity(job: Job, inputs: str) -> str:
    return fingerprint("run", job, inputs)


def claim_directory(store: Store, job: Job) -> RunDirectory:
    """The directory of `job`: the one that it has had before, else the next free one.

    Of two processes that start the same job at once both get the same directory, of two jobs each its own.
    """
    inputs = inputs_of(job)
    identity = _identity(job, inputs)
    taken = list(claimed(store, job.name))
    ours = next((found for found in taken if found.identity == identity), None)
    if ours is not None:
        return ours
    for number in count(1 + max((found.number for found in taken), default=0)):
        wanted = RunDirectory(name=job.name, number=number, identity=identity, inputs=inputs)
        claim = f"{_CLAIMS}/{wanted.run}"
        unclaimed = store.exists(f"{wanted.key}/{RUN}") and not store.exists(claim)  # of a version that knew no claims
        if not unclaimed and store.put_if_absent(claim, wanted.model_dump_json().encode()):
            return wanted
    raise AssertionError("numbers do not end")


def claimed(store: Store, name: str | None = None) -> Iterator[RunDirectory]:
    """All run directories of the storage, or those of the job called `name`, by name and number."""
    wanted = re.compile(r".*" if name is None else rf"{re.escape(name)}(-\d+)?")  # only these are read
    for claim in sorted(filter(wanted.fullmatch, store.keys(_CLAIMS)), key=_natural):
        found = RunDirectory.load(store, f"{_CLAIMS}/{claim}")
        if found is not None and name in (None, found.name):
            yield found


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `x-10` after `x-9`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
