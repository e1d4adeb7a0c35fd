"""Rules that Prometheus evaluates itself: recorded series, and the alerts on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.monitoring.promql import (
    AT_WORK,
    STUDENT,
    added,
    rate,
    run_ahead,
    since,
    student_wait,
    teacher_blocked,
)
from orchestrator.tracking import names

WAITS = 0.5
"""Part of its time from which on a side is said to wait."""
NO_PROGRESS_S = 900
STALE_CHECKPOINT_S = 3600
SPILLED = 'ray_object_store_memory{Location="SPILLED"}'


@dataclass(frozen=True)
class Record:
    name: str
    expr: str

    def yaml(self) -> dict[str, Any]:
        return {"record": self.name, "expr": self.expr}


@dataclass(frozen=True)
class Alert:
    name: str
    expr: str
    hold: str
    """Duration for which the expression must be true before the alert fires."""
    severity: Literal["info", "warning", "critical"]
    summary: str
    advice: str

    def yaml(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.hold,
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "description": self.advice},
        }


RECORDS = (
    Record("distill:student_wait:ratio5m", student_wait("5m")),
    Record("distill:teacher_blocked:ratio5m", teacher_blocked("5m")),
    Record("distill:student_tokens:rate5m", rate(names.TRAIN_TOKENS, "5m", STUDENT)),
    Record("distill:teacher_tokens:rate5m", rate(names.LABEL_TOKENS, "5m")),
    Record("distill:run_ahead:shards", run_ahead()),
)

ALERTS = (
    Alert(
        "DistillTeacherStarvesStudent",
        f"distill:student_wait:ratio5m > {WAITS}",
        "10m",
        "warning",
        "{{ $labels.run }}: the student waits for labels {{ $value | humanizePercentage }} of its time",
        "The teacher pool is the bottleneck: more replicas (teacher.replicas), more shards or devices for each, a larger "
        "teacher.micro_batch; or fewer training workers.",
    ),
    Alert(
        "DistillStudentBlocksTeacher",
        f"distill:teacher_blocked:ratio5m > {WAITS}",
        "10m",
        "info",
        "{{ $labels.run }}: the teachers wait for the student {{ $value | humanizePercentage }} of their time",
        "The student is the bottleneck and labels.run_ahead holds the teachers back: fewer replicas cost no time, a larger "
        "labels.run_ahead costs only storage.",
    ),
    Alert(
        "DistillNoProgress",
        f"{since(names.LAST_PROGRESS_TIME_S, AT_WORK)} > {NO_PROGRESS_S}",
        "0m",
        "critical",
        "{{ $labels.run }}: nothing was trained on or labelled for {{ $value | humanizeDuration }}",
        "A stage is at work, but neither side gets on: look for actors that wait for resources (Ray's dashboard), for a "
        "storage that does not answer, and into the logs of the training workers.",
    ),
    Alert(
        "DistillNonFiniteLoss",
        f"{added(names.NONFINITE_LOSSES, '15m', by='run, stage')} > 0",
        "0m",
        "critical",
        "{{ $labels.run }}: a loss of the {{ $labels.stage }} was not finite",
        "The run has ended and its last checkpoint is from before. Lower train.learning_rate or raise train.warmup_steps, look "
        "at the gradient norm before it, and run the job again: it goes on from that checkpoint.",
    ),
    Alert(
        "DistillStaleCheckpoint",
        f"{since(names.LAST_CHECKPOINT_TIME_S, by='run, stage')} > {STALE_CHECKPOINT_S}",
        "0m",
        "warning",
        "{{ $labels.run }}: a crash now would cost {{ $value | humanizeDuration }} of work of the {{ $labels.stage }}",
        "Training has written no checkpoint for long: a smaller train.checkpoint_every, or a storage that is slow or full.",
    ),
    Alert(
        "DistillRestarts",
        f"{added(names.RESTARTS, '30m', by='run, stage')} > 0",
        "0m",
        "warning",
        "{{ $labels.run }}: processes of the {{ $labels.stage }} died and were started again",
        "Training goes on from its newest checkpoint, until train.max_restarts is used up; a label shard is done again. "
        "Ray's dashboard says how the process ended; out of memory is the usual reason.",
    ),
    Alert(
        "DistillSpilling",
        f"sum by (SessionName) ({SPILLED}) > 0",
        "5m",
        "warning",
        "Ray spills {{ $value | humanize1024 }}B of its object store to disk ({{ $labels.SessionName }})",
        "Labels never pass through the object store, so something else on this cluster fills it; everything that waits for "
        "objects gets slow.",
    ),
)


def rules() -> dict[str, Any]:
    """Prometheus' rule file."""
    return {
        "groups": [
            {"name": "distill-records", "rules": [record.yaml() for record in RECORDS]},
            {"name": "distill-alerts", "rules": [alert.yaml() for alert in ALERTS]},
        ]
    }
