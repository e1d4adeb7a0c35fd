"""The run's metrics as Ray's own, which Prometheus scrapes from every node.

Everything is exported by the driver, because every point passes there: a killed worker takes nothing along that was not on
its way already, and no series depends on the node a worker happened to run on.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from orchestrator.tracking.names import (
    LABEL_TOKENS,
    LAST_PROGRESS_TIME_S,
    METRICS,
    RUNNING,
    TRAIN_TOKENS,
    metric_of,
)

TAGS = ("run", "stage", "replica")
"""Tags of every metric; `replica` is empty, which is no label to Prometheus, unless the value is that of one replica alone."""

Series = tuple[str, str]
"""Metric, replica."""


class Exporter:
    """Exports the metrics of the run named `run`; threads may share it.

    Ray forgets a gauge that was not set within its last two reports, so what stands is set again at each `refresh`, and what
    belongs to a stage that has ended is left to be forgotten.
    """

    def __init__(self, run: str) -> None:
        exported = [m for m in METRICS.values() if m.exported]
        self._gauges = {m.name: Gauge(m.ray_name, m.help, TAGS) for m in exported if m.kind != "count"}
        self._counters = {m.name: Counter(m.ray_name, m.help, TAGS) for m in exported if m.kind == "count"}
        self._run = run
        self._standing: dict[str, dict[Series, float]] = {}
        self._mutex = threading.Lock()

    def start(self, stage: str) -> None:
        """Say that `stage` is at work."""
        with self._mutex:
            self._standing[stage] = {(RUNNING, ""): 1.0, (LAST_PROGRESS_TIME_S, ""): time.time()}

    def finish(self, stage: str) -> None:
        """Say nothing more about `stage`."""
        with self._mutex:
            del self._standing[stage]

    def take(self, stage: str, metrics: Mapping[str, float]) -> None:
        """Take values by name; of a stage that is not at work, only what counts is exported."""
        with self._mutex:
            standing = self._standing.get(stage, {})
            for name, value in metrics.items():
                metric, replica = metric_of(name)
                if metric.kind == "count":
                    if value > 0:  # a counter of Ray's takes nothing else
                        self._counters[metric.name].inc(value, self._tags(stage, replica))
                elif metric.exported and math.isfinite(value):
                    standing[metric.name, replica] = value
                if metric.name in (TRAIN_TOKENS, LABEL_TOKENS):
                    standing[LAST_PROGRESS_TIME_S, ""] = time.time()

    def refresh(self) -> None:
        """Set what stands again; to be called more often than Ray reports, which is every few seconds."""
        with self._mutex:
            for stage, standing in self._standing.items():
                for (name, replica), value in standing.items():
                    self._gauges[name].set(value, self._tags(stage, replica))

    def _tags(self, stage: str, replica: str) -> dict[str, str]:
        return {"run": self._run, "stage": stage, "replica": replica}
