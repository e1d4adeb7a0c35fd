"""An open run: its plan and its place, and one way for everything that happens in it to be recorded."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.display import Display
from orchestrator.plan.make import Plan
from orchestrator.run.place import Place
from orchestrator.run.record import Fault, RunRecord, StageRecord, ended_by
from orchestrator.run.sinks import TRACKED, Sink
from orchestrator.run.tracking import NOTE, description, final_figures, without_password
from orchestrator.spec.load import resolved_yaml
from orchestrator.tracking.mlflow_tracker import Tracker
from orchestrator.tracking.names import SHARDS_STARTED, stage_id
from orchestrator.tracking.spool import Spool

if TYPE_CHECKING:
    from orchestrator.runtime.board import Point  # with Ray, which is loaded where it is used

log = logging.getLogger(__name__)
ANSWER_S = 300.0
"""The board answers within milliseconds, or is gone."""


class Recorder:
    """Tells the record and all sinks what happens in a run. Sinks may be added while it goes on."""

    def __init__(self, record: RunRecord, display: Display, tracker: Tracker, sinks: list[Sink]) -> None:
        self.record, self.display, self.tracker, self.sinks = record, display, tracker, sinks

    @contextmanager
    def stage(self, name: str, key: str, dataset: Mapping[str, str] | None = None) -> Generator[StageRecord]:
        """Record one stage: its time, its fingerprint `key`, whether it ran, was reused, was stopped, or failed.

        `dataset` (name, digest, source) is what the stage reads, for the lineage.
        """
        record = self.record.begin(name, key)
        log.debug("%s begins, key %s", name, key)
        for sink in self.sinks:
            sink.started(record, dataset)
        try:
            yield record
        except BaseException as error:
            self._end_stage(record, ended_by(error))
            raise
        else:
            self._end_stage(record, "ran")

    def _end_stage(self, record: StageRecord, status: Literal["ran", "stopped", "failed"]) -> None:
        if not self.record.end(record, status):
            return
        log.debug("%s %s after %.1f s: %s", record.stage, record.status, record.seconds, record.figures)
        for sink in self.sinks:
            sink.finished(record)
        self.record.save()

    def end(self, error: BaseException) -> None:
        """Record at once, before anything is closed, that `error` ended the run, and that with it the stages stopped."""
        if self.record.status != "running":
            return
        self.record.status = ended_by(error)
        for record in self.record.going():
            self._end_stage(record, "stopped")
        self.tracker.end(TRACKED[self.record.status])

    def points(self, points: list[Point]) -> None:
        """Keep metrics of stages."""
        for sink in self.sinks:
            sink.points(points)

    def warn(self, text: str) -> None:
        """Say what went wrong and was got over, and keep it for the report."""
        self.display.warn(text)
        self.record.note(text)


class Run:
    """An open run; made by `open_run` alone."""

    def __init__(self, plan: Plan, place: Place, recorder: Recorder, spool: Spool, board: Any) -> None:
        self.plan, self.job = plan, plan.job
        self.store, self.directory, self.folder = place.store, place.directory, place.folder
        self.still_ours = place.still_ours
        self.display, self.tracker, self.board = recorder.display, recorder.tracker, board
        self._recorder, self._record, self._spool = recorder, recorder.record, spool
        self.stage, self.warn, self.end = recorder.stage, recorder.warn, recorder.end
        self._collecting = threading.Lock()

    @property
    def started(self) -> float:
        """The Unix time at which this attempt began."""
        return self._record.started

    @property
    def attempt(self) -> int:
        return self._record.attempt

    @property
    def stages(self) -> dict[str, StageRecord]:
        """The stages of this attempt, by name."""
        return self._record.stages

    @property
    def faults(self) -> list[Fault]:
        return self._record.faults

    def conclude(self, report: Mapping[str, Any], verdict: str) -> None:
        """Tell MLflow the figures of the finished run, and in words what came of it."""
        self.tracker.summary(final_figures(report))
        self.tracker.tags({NOTE: f"{description(self.job)}\n\n{verdict}"})

    def points(self) -> list[dict[str, Any]]:
        """The metric points of this run's stages, times counted from its start."""
        current = {stage_id(r.stage, r.key): r.stage for r in self.stages.values()}
        return [
            {"stage": current[p.stage], "step": p.step, "time_s": p.time_s - self.started, "metrics": p.metrics}
            for p in self._spool.read()
            if p.stage in current
        ]

    def record(self, stage: str, key: str, step: int, metrics: Mapping[str, float]) -> None:
        """Keep metrics that the driver itself measured."""
        self._recorder.points([{"stage": stage_id(stage, key), "step": step, "time_s": time.time(), "metrics": dict(metrics)}])

    def shown_job(self) -> str:
        """The resolved job as YAML, without a password that its tracking address may hold."""
        return resolved_yaml(without_password(self.job))

    def collect(self) -> None:
        """Take what the workers have put on the board, and keep it."""
        import ray

        with self._collecting:  # points of one call are kept before those of the next
            board = self.board
            taken = [f.remote() for f in (board.take, board.take_warnings, board.take_lines, board.progress)]
            points, warnings, lines, progress = ray.get(taken, timeout=ANSWER_S)
            self._recorder.points([*points, *_standing(progress)])
        for text in warnings:
            self.warn(text)
        for text in lines:
            self.display.say(text)

    def progress(self) -> dict[str, float]:
        """Return the progress that the workers have reported."""
        import ray

        return ray.get(self.board.progress.remote(), timeout=ANSWER_S)

    def abort(self, reason: str) -> None:
        """Abort the run: waiting workers stop, and training workers save a checkpoint and stop."""
        self.board.abort.remote(reason)

    def aborted(self) -> str | None:
        """Return the reason for which the run was aborted, None while it goes on."""
        import ray

        return ray.get(self.board.aborted.remote(), timeout=ANSWER_S)


def _standing(progress: Mapping[str, float]) -> list[Point]:
    """The progress that dashboards show, as points that no log keeps."""
    from orchestrator.runtime.board import STUDENT_SHARDS

    started = progress.get(f"student.{STUDENT_SHARDS}")
    if started is None:
        return []
    return [{"stage": "student", "step": 0, "time_s": time.time(), "metrics": {SHARDS_STARTED: started}}]
