"""The record of a run: its attempts, their stages and faults, as run.json shows them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from orchestrator.errors import Terminated, find_user_error, one_line
from orchestrator.run.directory import RUN, RunDirectory
from orchestrator.store.files import Store

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
        """Record that the result was there already."""
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


class RunRecord:
    """The stages and faults of an attempt, written to run.json at every change; threads may share it."""

    def __init__(self, store: Store, directory: RunDirectory) -> None:
        self._store, self._directory = store, directory
        self._mutex = threading.Lock()
        self._going: dict[str, StageRecord] = {}
        """Stages that have not ended."""
        self._seconds_before = 0.0
        """Seconds that earlier attempts took."""
        self.started = time.time()
        self.first_started = self.started
        """The Unix time at which the first attempt began."""
        self.attempt = 1
        self.status: RunStatus = "running"
        self.stages: dict[str, StageRecord] = {}
        self.faults: list[Fault] = []
        """Faults of this attempt and of those before it that did not finish."""

    @contextmanager
    def kept(self) -> Generator[None]:
        """Go on with the faults of an attempt that did not finish, and record at the end how this one ended."""
        before: dict[str, Any] = self._store.read_json(f"{self._directory.key}/{RUN}") or {}
        self.first_started = before.get("started_s", self.started)
        self._seconds_before = before.get("seconds", 0.0)
        if before.get("status") in ("running", "stopped", "failed"):
            self.attempt = before["attempt"] + 1
            self.faults = [Fault(**fault) for fault in before["faults"]]
            if before["status"] == "running":
                self.note(f"attempt {before['attempt']} was killed, or its machine was lost; going on from what was committed")
        self.save()
        try:
            yield
            self.status = "finished"
        except BaseException as error:
            if self.status != "finished":  # a stop while MLflow takes the rest stops nothing else
                self.status = ended_by(error)
            self.note(f"attempt {self.attempt} ended: {reason_of(error)}")
            raise
        finally:
            self.save()

    def begin(self, stage: str, key: str) -> StageRecord:
        """Record that `stage` has begun; `key` is its fingerprint."""
        record = StageRecord(stage, key, started_s=time.time() - self.started)
        with self._mutex:
            self.stages[stage] = self._going[stage] = record
        return record

    def end(self, record: StageRecord, status: Literal["ran", "stopped", "failed"]) -> bool:
        """Record how a stage ended; False if the run had ended before it did."""
        with self._mutex:
            if self._going.pop(record.stage, None) is None:
                return False
            record.end(status, time.time() - self.started - record.started_s)
        return True

    def going(self) -> list[StageRecord]:
        """Return the stages that have not ended."""
        return list(self._going.values())

    def note(self, text: str) -> None:
        """Keep a fault."""
        with self._mutex:
            self.faults.append(Fault(self.attempt, time.time() - self.started, one_line(text)))
        self.save()

    def save(self) -> None:
        """Write run.json."""
        with self._mutex:
            now = time.time()
            document = self._directory.model_dump() | {
                "run": self._directory.run,
                "status": self.status,
                "started_s": self.first_started,
                "ended_s": None if self.status == "running" else now,
                "seconds": self._seconds_before + now - self.started,
                "attempt": self.attempt,
                "stages": {name: asdict(record) for name, record in self.stages.items()},
                "faults": [asdict(fault) for fault in self.faults],
            }
            self._store.replace(f"{self._directory.key}/{RUN}", json.dumps(document, indent=1).encode())


def ended_by(error: BaseException) -> Literal["stopped", "failed"]:
    """Return the status of a run, or of a stage of it, that `error` ended."""
    return "stopped" if isinstance(error, KeyboardInterrupt) else "failed"


def reason_of(error: BaseException) -> str:
    """Why a run that `error` ended has ended, in one line."""
    if isinstance(error, Terminated):
        return "stopped by SIGTERM"
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C"
    return one_line(str(find_user_error(error) or f"{type(error).__name__}: {error}".rstrip(": ")))
