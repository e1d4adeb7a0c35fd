"""Finds the run that a person means, a run directory or the name of a run in a storage, and says how it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.store.files import Store, open_store

STORAGE = "./distill-store"
"""Storage in which runs are looked for unless another is named; the default of `storage` in a job file."""
INPUTS, SHOWN_HEX = "inputs", 8
"""Key of run.json, shown beside the keys of jobs, for the files that a run read; and how many digits of it are shown."""
_SHOWN_NAMES = 6


def find_run(run: str, storage: str | None = None) -> Store:
    """The run directory of `run`, opened: a directory (or `s3://` address) of a run, else `STORAGE/runs/RUN`.

    Raises `SpecError` if neither is there; the message lists runs of the storage.
    """
    if storage is None or "/" in run:
        directory = open_store(run)
        if is_run(directory):
            return directory
    root = storage or STORAGE
    if "/" not in run:
        directory = open_store(f"{root.rstrip('/')}/runs/{run}")
        if is_run(directory):
            return directory
    raise SpecError(f"{run}: no such run; {_what_there_is(root)}; give a run directory, or a name with --storage")


def is_run(directory: Store) -> bool:
    """Return whether `directory` is a run directory: a job file is the first thing that a run writes."""
    return directory.exists("job.yaml")


def status_of(store: Store, directory: str, record: Mapping[str, Any]) -> str:
    """Return the status of the run in `directory` of `store` with run.json `record`: running, stopped, failed or finished.

    killed: it says that it is running and nobody holds its lock, or it wrote no run.json.
    """
    status = record.get("status", "killed")
    return "killed" if status == "running" and not store.held(f"{directory}/lock".lstrip("/")) else status


def _what_there_is(root: str) -> str:
    names = [name for name in open_store(root).keys("runs") if not name.startswith(".")]
    if not names:
        return f"{root} holds no runs"
    shown = ", ".join(names[-_SHOWN_NAMES:])
    return f"{root} holds {shown}" + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")
