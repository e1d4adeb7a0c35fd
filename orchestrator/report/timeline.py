"""Analysis of how teacher, student and baseline spent their time, and which of them held up the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from orchestrator.plan.resources import Room
from orchestrator.report.words import percent, seconds
from orchestrator.tracking import names

TRAININGS = ("teacher", "student", "baseline")
DISTILLING = "labels and student"
MATTERS = 0.25
"""Share of the run's time below which labelling and training are too short for advice on making them shorter."""
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
        """Return the lane's figures in the section `timeline` of report.json."""
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


_LONGEST = {
    "data": "Tokenizing the text took longest: {}; its shards are kept for further runs.",
    "teacher": "The teacher took longest: {}; it is kept, and further runs start with it as it is.",
    "initial": "Preparing the student's first weights took longest: {}; they are kept for further runs.",
    "baseline": "Training the baseline took longest: {}; it is kept, and evaluate.baseline: false leaves it out.",
    "evaluate": "Evaluating took longest: {}; fewer evaluate.rows would shorten it.",
    "export": "Exporting took longest: {}.",
    DISTILLING: "Labelling and training the student took longest: {}.",
}


def bottleneck(
    stages: Sequence[Mapping[str, Any]], timeline: Mapping[str, Mapping[str, float]], wall_s: float, room: Room
) -> str:
    """Describe what took most of the run's `wall_s`, and if labelling and training matter in it, which held up the other.

    `stages` and `timeline` are those of report.json; advice is given only where there is `room` to follow it.
    """
    took = _stretches(stages)
    if not took:
        return "Every stage was reused from earlier runs."
    longest = max(took, key=lambda name: took[name])
    share = took[longest] / wall_s
    sentence = _LONGEST[longest].format(f"{seconds(took[longest])} of {seconds(wall_s)}, {percent(share)}")
    if took.get(DISTILLING, 0.0) < MATTERS * wall_s:
        return sentence
    return f"{sentence} {held_up(timeline, room)}"


def _stretches(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of what ran; labelling and training of the student go on side by side and count as one stretch."""
    ran = [s for s in stages if s["status"] != "reused"]
    both = [s for s in ran if s["stage"] in ("labels", "student")]
    took = {s["stage"]: s["seconds"] for s in ran if s not in both}
    if both:
        took[DISTILLING] = max(s["started_s"] + s["seconds"] for s in both) - min(s["started_s"] for s in both)
    return took


def held_up(timeline: Mapping[str, Mapping[str, float]], room: Room) -> str:
    """In one sentence, whether teacher or student held up the other, and what would help, from the figures of their lanes."""
    labels, student = timeline.get("labels"), timeline.get("student")
    if student is None:
        return "The student was trained in an earlier run, so nothing waited for anything here."
    lasted = student["ended_s"] - student["began_s"]
    began = student["startup_s"] / lasted
    if began >= MOSTLY:
        return (
            f"Starting up was most of it: {seconds(student['startup_s'])}, {percent(began)} of the student's time, went by "
            "until its first step; longer runs spend a smaller share on it."
        )
    for_labels, for_student = _waiting(student), _waiting(labels) if labels else 0.0
    if min(for_labels, for_student) >= WORTH_NAMING:
        return (
            f"Teacher and student waited for each other in turn, the teacher {percent(for_student)} of its time and the "
            f"student {percent(for_labels)}: a larger labels.run_ahead would let both work on."
        )
    if for_labels >= WORTH_NAMING:
        return f"The teacher is the bottleneck: the student waited {percent(for_labels)} of its time for labels; " + _more(
            room.replica, "more teacher replicas (teacher.replicas)"
        )
    if for_student >= WORTH_NAMING:
        return (
            f"The student is the bottleneck: the teacher waited {percent(for_student)} of its time for it, as labels may run "
            "ahead no further (labels.run_ahead); " + _more(room.worker, "more training workers (train.workers)")
        )
    after = max(0.0, student["ended_s"] - labels["ended_s"]) if labels else 0.0
    if after / lasted >= LONG_AFTER:
        return f"The student is the bottleneck: it trained for another {seconds(after)} once all labels were written; " + _more(
            room.worker, "more training workers (train.workers)"
        )
    if labels is None:
        return "The student alone decided how long this took: its labels were there from an earlier run."
    return (
        f"Teacher and student kept pace: the student waited {percent(for_labels)} of its time for labels, "
        f"and the teacher {percent(for_student)} for the student."
    )


def _more(fits: bool, what: str) -> str:
    if fits:
        return f"{what} would shorten the run."
    return "all devices here are taken, so only more or faster ones would shorten the run."


def _waiting(lane: Mapping[str, float]) -> float:
    """Share of the time, but for starting up and standing idle, in which the other side was waited for."""
    return lane["waiting_s"] / (lane["busy_s"] + lane["waiting_s"] or 1.0)
