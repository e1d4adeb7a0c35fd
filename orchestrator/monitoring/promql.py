"""PromQL expressions that dashboards and alerts use more than once, built on the registry's names."""

from __future__ import annotations

from orchestrator.tracking import names
from orchestrator.tracking.names import METRICS

THIS_RUN = 'run=~"$run"'
"""Matches what is chosen at the top of a dashboard."""
STUDENT, LABELS = 'stage="student"', 'stage="labels"'
AT_WORK = 'stage=~"teacher|labels|student|baseline"'
"""Stages that post progress while they are at work."""


def of(name: str, *matchers: str) -> str:
    """The series of the metric `name`."""
    metric = METRICS[name]
    assert metric.exported
    return f"{metric.prometheus_name}{{{','.join(matchers)}}}" if matchers else metric.prometheus_name


def latest(name: str, *matchers: str, by: str = "run") -> str:
    """A gauge, whichever process or node it came from."""
    return f"max by ({by}) ({of(name, *matchers)})"


def rate(name: str, window: str, *matchers: str, by: str = "run") -> str:
    """A counter per second."""
    return f"sum by ({by}) (rate({of(name, *matchers)}[{window}]))"


def since(name: str, *matchers: str, by: str = "run") -> str:
    """Seconds since the Unix time that a gauge holds."""
    return f"time() - {latest(name, *matchers, by=by)}"


def added(name: str, window: str, by: str = "run") -> str:
    """Return an expression for the growth of a counter over `window`, also if its first value is no older: `increase` sees no
    growth from nothing to one."""
    grown, new = f"increase({of(name)}[{window}])", f"({of(name)} unless {of(name)} offset {window})"
    return f"sum by ({by}) ({grown} > 0 or {new})"


def running(stage: str) -> str:
    """Keeps of the series before it those of runs in which the stage is at work: a counter stays when its run has ended."""
    return f"and on (run) {of(names.RUNNING, stage)} == 1"


def student_wait(window: str, *matchers: str) -> str:
    """Part of the time in which the student did not work: 1 also while it waits so long that it says nothing."""
    busy = rate(names.TRAIN_BUSY_S, window, STUDENT, *matchers)
    return f"(1 - clamp_max({busy}, 1)) {running(STUDENT)}"


def teacher_blocked(window: str, *matchers: str) -> str:
    """Part of the teachers' time in which they neither labelled nor lacked a shard: they waited for the student."""
    busy, idle = rate(names.REPLICA_BUSY_S, window, *matchers), rate(names.REPLICA_IDLE_S, window, *matchers)
    replicas = latest(names.TEACHER_REPLICAS, *matchers)
    return f"(1 - clamp_max(({busy} + {idle}) / {replicas}, 1)) {running(LABELS)}"


def run_ahead(*matchers: str) -> str:
    """Shards committed that the student has not begun to read; at or below 0 it waits for the next one."""
    return f"{latest(names.SHARDS_COMMITTED, *matchers)} - {latest(names.SHARDS_STARTED, STUDENT, *matchers)}"
