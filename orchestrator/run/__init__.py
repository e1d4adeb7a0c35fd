"""A run: its directory, its lock, its place on Ray, and the record of its stages."""

from orchestrator.run.recorder import Run, open_run

__all__ = ["Run", "open_run"]
