"""Outputs of a run behind one interface: the terminal, the metric log with MLflow behind it, and Prometheus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from orchestrator.display import Display
from orchestrator.run.record import StageRecord
from orchestrator.store.files import storage_faults
from orchestrator.tracking.mlflow_tracker import Status, Tracker
from orchestrator.tracking.names import metric_of, stage_id
from orchestrator.tracking.spool import Spool

if TYPE_CHECKING:
    from orchestrator.monitoring.exporter import Exporter  # with Ray, which is loaded where it is used
    from orchestrator.runtime.board import Point

TRACKED: Mapping[str, Status] = {
    **dict.fromkeys(("finished", "ran", "reused"), "FINISHED"),
    "stopped": "KILLED",
    "failed": "FAILED",
}
"""MLflow's words for how a run or a stage ended."""


class Sink(Protocol):
    """Takes what happens in a run, from several threads."""

    def started(self, stage: StageRecord, dataset: Mapping[str, str] | None) -> None:
        """Take in that `stage` began; `dataset` (name, digest, source) is what it reads."""
        ...

    def finished(self, stage: StageRecord) -> None:
        """Take in that `stage` ended."""
        ...

    def points(self, points: Sequence[Point]) -> None:
        """Take metrics of stages, oldest first."""
        ...


class Shown:
    """The terminal."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def started(self, stage: StageRecord, dataset: Mapping[str, str] | None) -> None:
        self._display.stage_started(stage.stage)

    def finished(self, stage: StageRecord) -> None:
        self._display.stage_finished(stage.stage, stage.status, stage.seconds, stage.figures)

    def points(self, points: Sequence[Point]) -> None:
        for point in points:
            if metrics := logged(point):
                self._display.point(stage_of(point), point["step"], metrics)


class Tracked:
    """The metric log in the run directory, and MLflow, which follows it."""

    def __init__(self, spool: Spool, tracker: Tracker) -> None:
        self._spool, self._tracker = spool, tracker

    def started(self, stage: StageRecord, dataset: Mapping[str, str] | None) -> None:
        self._tracker.stage_started(stage_id(stage.stage, stage.key), {"fingerprint": stage.key}, dataset)
        if dataset is not None:
            self._tracker.dataset(dataset)

    def finished(self, stage: StageRecord) -> None:
        self._tracker.stage_finished(stage_id(stage.stage, stage.key), TRACKED[stage.status], stage.figures)

    def points(self, points: Sequence[Point]) -> None:
        kept = [(point, metrics) for point in points if (metrics := logged(point))]
        for point, metrics in kept:
            with storage_faults(self._spool.path):
                self._spool.append(point["stage"], point["step"], metrics, point["time_s"])
        if kept:
            self._tracker.notify()


class Exported:
    """Prometheus, by way of Ray."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter

    def started(self, stage: StageRecord, dataset: Mapping[str, str] | None) -> None:
        self._exporter.start(stage.stage)

    def finished(self, stage: StageRecord) -> None:
        self._exporter.finish(stage.stage)

    def points(self, points: Sequence[Point]) -> None:
        for point in points:
            self._exporter.take(stage_of(point), point["metrics"])
        self._exporter.refresh()


def logged(point: Point) -> dict[str, float]:
    """The metrics of `point` that the log keeps."""
    return {name: value for name, value in point["metrics"].items() if metric_of(name)[0].logged}


def stage_of(point: Point) -> str:
    """The stage that `point` is about, without its key."""
    return point["stage"].partition(":")[0]
