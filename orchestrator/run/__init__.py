"""A run: its directory, its lock, its place on Ray, and the record of its stages."""

from orchestrator.run.opening import open_run
from orchestrator.run.recorder import Run

__all__ = ["Run", "open_run"]
