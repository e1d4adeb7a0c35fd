"""The place in a storage that a run writes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.run.directory import RunDirectory
from orchestrator.store.files import StillOurs, Store


@dataclass(frozen=True)
class Place:
    """The directory of a run, held by this process alone."""

    store: Store
    directory: RunDirectory
    folder: Path
    """The run directory, or where this process works on what of it is appended to."""
    still_ours: StillOurs
