"""Records of a run's stages and faults, as run.json holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RunStatus = Literal["running", "stopped", "failed", "finished"]
"""stopped: by Ctrl-C or SIGTERM, as `distill stop` sends it."""


@dataclass
class StageRecord:
    """The record of a stage in run.json."""

    stage: str
    key: str
    started_s: float
    """Seconds since the run began."""
    seconds: float = 0.0
    status: Literal["running", "ran", "reused", "stopped", "failed"] = "running"
    figures: dict[str, float] = field(default_factory=dict)
    """Figures that the stage measured, for tracking."""

    def reuse(self) -> None:
        """Say that the result was there already."""
        self.status = "reused"

    def end(self, status: Literal["ran", "stopped", "failed"], seconds: float) -> None:
        """Set the final status; a result that was reused stays so."""
        self.status = "reused" if (self.status, status) == ("reused", "ran") else status
        self.seconds = seconds


@dataclass(frozen=True)
class Fault:
    """Something that went wrong and was got over, or that ended an attempt of the run."""

    attempt: int
    """Counts from 1; a run that was killed or failed goes on in another attempt."""
    time_s: float
    """Seconds since that attempt began."""
    text: str


def ended_by(error: BaseException) -> Literal["stopped", "failed"]:
    """How a run, or a stage of it, stands that `error` ended."""
    return "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
