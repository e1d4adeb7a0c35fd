"""Where teacher, student and baseline spent their time, and which of them held up the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from orchestrator.report.words import percent, seconds
from orchestrator.tracking import names

TRAININGS = ("teacher", "student", "baseline")
WORTH_NAMING = 0.05
"""Shares of waiting below are how two sides that keep pace look."""
MOSTLY, LONG_AFTER = 0.5, 0.25


class Span(NamedTuple):
    """A stretch of time, and what was done in it; of several replicas, all of their seconds."""

    start_s: float
    end_s: float
    busy_s: float
    waiting_s: float
    """For the other side: training for labels, teachers for the student."""
    idle_s: float = 0.0


@dataclass(frozen=True)
class Lane:
    """One side of the run. All times count from the run's start."""

    stage: str
    began_s: float
    ended_s: float
    spans: tuple[Span, ...]
    """From the end of start-up on, ascending. What none of them covers went into saving or was lost with a dead worker."""

    @property
    def startup_s(self) -> float:
        """Until the first shard was begun, or the first step made: waiting for the very first labels is starting up."""
        return self.spans[0].start_s - self.began_s

    def figures(self) -> dict[str, float]:
        """What report.json says under `timeline`."""
        busy, waiting, idle = (sum(getattr(s, f"{kind}_s") for s in self.spans) for kind in ("busy", "waiting", "idle"))
        ends = {"began_s": self.began_s, "ended_s": self.ended_s, "startup_s": self.startup_s}
        return ends | {"busy_s": busy, "waiting_s": waiting, "idle_s": idle}


def lanes(stages: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> list[Lane]:
    """The sides that were at work in this run, from its stages and metric points; what an earlier attempt did is left out."""
    found: list[Lane] = []
    for stage in stages:
        own = [p for p in points if p["stage"] == stage["stage"] and p["time_s"] >= 0]
        spans = _labelling(own) if stage["stage"] == "labels" else _training(own) if stage["stage"] in TRAININGS else ()
        if spans and stage["status"] != "reused":
            ended_s = stage["started_s"] + stage["seconds"]
            found.append(Lane(stage["stage"], min(stage["started_s"], spans[0].start_s), ended_s, tuple(spans)))
    return found


def _labelling(points: Sequence[Mapping[str, Any]]) -> list[Span]:
    """A span for each shard, from sums over all replicas that grow with every one."""
    spans: list[Span] = []
    before = (0.0, 0.0, 0.0)
    for point in points:
        metrics = point["metrics"]
        if names.BUSY_S not in metrics:
            continue
        now = (metrics[names.BUSY_S], metrics[names.BLOCKED_S], metrics[names.IDLE_S])
        grown = [b - a for a, b in zip(before, now, strict=True)]
        start_s = spans[-1].end_s if spans else max(0.0, point["time_s"] - sum(grown))
        spans.append(Span(start_s, max(start_s, point["time_s"]), *grown))
        before = now
    return spans


def _training(points: Sequence[Mapping[str, Any]]) -> list[Span]:
    """A span for each time that rates were posted but the first, which ends with the first step."""
    spans: list[Span] = []
    for point in points:
        metrics = point["metrics"]
        if names.INTERVAL_S in metrics:
            took = metrics[names.INTERVAL_S]
            waiting = took * metrics[names.LABEL_WAIT_FRACTION]
            spans.append(Span(point["time_s"] - took, point["time_s"], took - waiting, waiting))
    return spans[1:]


def bottleneck(timeline: Mapping[str, Mapping[str, float]]) -> str:
    """In one sentence, what held up the run and what would help, from the figures of its lanes by stage."""
    labels, student = timeline.get("labels"), timeline.get("student")
    if student is None:
        return "The student was trained in an earlier run, so nothing waited for anything here."
    began = student["startup_s"] / (student["ended_s"] - student["began_s"])
    if began >= MOSTLY:
        return (
            f"Starting up took longest: {seconds(student['startup_s'])}, {percent(began)} of the student's time, went by until "
            "its first step; longer runs spend a smaller share on it."
        )
    for_labels, for_student = _waiting(student), _waiting(labels) if labels else 0.0
    if min(for_labels, for_student) >= WORTH_NAMING:
        return (
            f"Teacher and student waited for each other in turn, the teacher {percent(for_student)} of its time and the "
            f"student {percent(for_labels)}: a larger labels.run_ahead would let both work on."
        )
    if for_labels >= WORTH_NAMING:
        return (
            f"The teacher is the bottleneck: the student waited {percent(for_labels)} of its time for labels; "
            "more teacher replicas (teacher.replicas) or faster devices for them would shorten the run."
        )
    if for_student >= WORTH_NAMING:
        return (
            f"The student is the bottleneck: the teacher waited {percent(for_student)} of its time for it, as labels may run "
            "ahead no further (labels.run_ahead); more training workers (train.workers) would shorten the run."
        )
    after = max(0.0, student["ended_s"] - labels["ended_s"]) if labels else 0.0
    if after / (student["ended_s"] - student["began_s"]) >= LONG_AFTER:
        return (
            f"The student is the bottleneck: it trained for another {seconds(after)} once all labels were written; "
            "more training workers (train.workers) would shorten the run."
        )
    if labels is None:
        return "The student alone decided how long this took: its labels were there from an earlier run."
    return (
        f"Teacher and student kept pace: the student waited {percent(for_labels)} of its time for labels, "
        f"and the teacher {percent(for_student)} for the student."
    )


def _waiting(lane: Mapping[str, float]) -> float:
    """Share of the time, but for starting up and standing idle, in which the other side was waited for."""
    return lane["waiting_s"] / (lane["busy_s"] + lane["waiting_s"] or 1.0)
