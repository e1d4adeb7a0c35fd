"""Where both sides' time went, from the points that a run keeps, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.plan.resources import Room, room_beside
from orchestrator.report.charts.timeline import binned
from orchestrator.report.timeline import Span, bottleneck, held_up, lanes
from orchestrator.spec.job import Job
from orchestrator.spec.model import Replicas
from tests.reports import SHARDS, STEPS, small_points, small_report
from tests.tiny import tiny_job


def test_lanes_hold_the_seconds_that_were_recorded() -> None:
    labels, student = lanes(small_report()["stages"], small_points())
    assert (labels.stage, student.stage) == ("labels", "student")
    busy, waiting, idle = (labels.figures()[f"{kind}_s"] for kind in ("busy", "waiting", "idle"))
    assert (busy, waiting, idle) == pytest.approx((1.5 * SHARDS, 0.3 * SHARDS, 0.2 * SHARDS))
    assert labels.startup_s == pytest.approx(4.0 - 2.0 - 1.0)  # the first shard was there at 4 s and took 2 s
    assert student.startup_s == pytest.approx(5.0 - 1.0)  # the first step was made at 5 s
    assert student.figures()["waiting_s"] == pytest.approx(0.8 * STEPS // 2)
    assert student.figures()["busy_s"] + student.figures()["waiting_s"] == pytest.approx(STEPS - 1)


def test_reused_stages_and_earlier_attempts_have_no_lane() -> None:
    report, points = small_report(), small_points()
    earlier = [p | {"time_s": p["time_s"] - 100} for p in points]
    assert lanes(report["stages"], earlier) == []
    assert lanes(report["stages"], [*earlier, *points]) == lanes(report["stages"], points)
    report["stages"][2]["status"] = "reused"
    assert [lane.stage for lane in lanes(report["stages"], points)] == ["labels"]


def test_a_restart_leaves_a_gap() -> None:
    points = [p for p in small_points() if p["stage"] == "student" and not 8 <= p["step"] < 12]
    stages = [s for s in small_report()["stages"] if s["stage"] == "student"]
    (lane,) = lanes(stages, points)
    assert sum(s.end_s - s.start_s for s in lane.spans) == pytest.approx(STEPS - 1 - 4)
    edges, busy, waiting = binned(lane.spans, 1.0)
    lost = np.flatnonzero(busy + waiting < 0.5)
    assert edges[lost].tolist() == pytest.approx([12.0, 13.0, 14.0, 15.0])


def test_bins_conserve_time(seed: int) -> None:
    random = np.random.default_rng(seed)
    ends = np.cumsum(random.exponential(2.0, 50))
    spans, before = [], 0.0
    for end in ends:
        busy, waiting = (end - before) * random.dirichlet([2, 1, 1])[:2]
        spans.append(Span(before, end, busy, waiting))
        before = end
    edges, busy, waiting = binned(spans, 0.7)
    widths = np.diff(edges)
    assert edges[0] == 0 and edges[-1] == pytest.approx(ends[-1]) and len(widths) > 50
    assert busy @ widths == pytest.approx(sum(s.busy_s for s in spans))
    assert waiting @ widths == pytest.approx(sum(s.waiting_s for s in spans))
    # Against plain sampling of which span each moment lies in.
    moments = random.uniform(0, ends[-1], 200_000)
    share = np.array([s.busy_s / (s.end_s - s.start_s) for s in spans])[np.searchsorted(ends, moments)]
    bins = np.searchsorted(edges, moments) - 1
    sampled = np.bincount(bins, share, len(widths)) / np.maximum(np.bincount(bins, minlength=len(widths)), 1)
    assert np.abs(sampled - busy).mean() < 0.01


def test_several_replicas_fill_at_most_the_whole() -> None:
    spans = [Span(float(i), i + 1.0, 3.0, 0.5, 0.5) for i in range(10)]  # four replicas: four seconds in each
    _, busy, waiting = binned(spans, 0.5)
    assert busy == pytest.approx(np.full(20, 0.75)) and waiting == pytest.approx(np.full(20, 0.125))


def side(busy: float, waiting: float = 0.0, startup: float = 10.0, began: float = 0.0, rest: float = 0.0) -> dict[str, Any]:
    ended = began + startup + busy + waiting + rest
    ends = {"began_s": began, "ended_s": ended, "startup_s": startup}
    return ends | {"busy_s": busy, "waiting_s": waiting, "idle_s": 0.0}


@pytest.mark.parametrize(
    ("labels", "student", "says"),
    [
        (side(95), side(39, 61), "The teacher is the bottleneck: the student waited 61 % of its time for labels"),
        (side(60, 40), side(98, 2), "The student is the bottleneck: the teacher waited 40 % of its time"),
        (side(70, 30), side(80, 20), "waited for each other in turn, the teacher 30 % of its time and the student 20 %"),
        (side(20), side(98, 2), "The student is the bottleneck: it trained for another 1 min 20 s"),
        (side(95), side(98, 2), "kept pace: the student waited 2.0 % of its time for labels, and the teacher 0 %"),
        (side(20), side(20, 2, startup=30), "Starting up was most of it: 30 s, 58 % of the student's time"),
        (None, side(98, 2), "its labels were there from an earlier run"),
        (None, side(80, 20), "The teacher is the bottleneck"),
        (side(95), None, "The student was trained in an earlier run"),
        (None, None, "The student was trained in an earlier run"),
    ],
)
def test_who_held_up_the_other_is_named(labels: Any, student: Any, says: str) -> None:
    timeline = {name: lane for name, lane in (("labels", labels), ("student", student)) if lane}
    sentence = held_up(timeline, Room(replica=True, worker=True))
    assert says in sentence and sentence.count(". ") == 0 and sentence.endswith(".")


def stage(name: str, started_s: float, seconds: float, status: str = "ran") -> dict[str, Any]:
    return {"stage": name, "status": status, "started_s": started_s, "seconds": seconds}


@pytest.mark.parametrize(
    ("stages", "begins", "sentences"),
    [
        # The teacher's training was 5:37 of 9:22, and the sentence was about 96 s of the student.
        ([stage("teacher", 10, 337), stage("labels", 350, 90), stage("student", 352, 94), stage("baseline", 446, 60)],
         "The teacher took longest: 5 min 37 s of 9 min 22 s, 60 %;", 1),
        ([stage("teacher", 10, 337, "reused"), stage("labels", 10, 300), stage("student", 12, 500)],
         "Labelling and training the student took longest: 8 min 22 s of 9 min 22 s, 89 %. The teacher is the bottleneck", 2),
        ([stage("labels", 10, 150), stage("student", 12, 150), stage("baseline", 170, 300)],
         "Training the baseline took longest: 5 min 00 s of 9 min 22 s, 53 %; it is kept", 2),
        ([stage("labels", 0, 1, "reused"), stage("student", 0, 1, "reused")], "Every stage was reused", 1),
    ],
)  # fmt: skip
def test_the_largest_part_of_the_run_is_named_first(stages: list[Any], begins: str, sentences: int) -> None:
    """Fault of kind: advice about a part of the time that does not matter."""
    found = bottleneck(stages, {"labels": side(95), "student": side(39, 61)}, 562.0, Room(replica=True, worker=True))
    assert found.startswith(begins) and found.count(". ") == sentences - 1 and found.endswith(".")


@pytest.mark.parametrize("labels_student", [(side(95), side(39, 61)), (side(60, 40), side(98, 2)), (side(20), side(98, 2))])
def test_advice_is_what_the_devices_have_room_for(labels_student: Any) -> None:
    """Fault of kind: advice that cannot be followed, such as more replicas on a machine whose cores are all taken."""
    timeline = dict(zip(("labels", "student"), labels_student, strict=True))
    assert "more t" in held_up(timeline, Room(replica=True, worker=True))
    full = held_up(timeline, Room(replica=False, worker=False))
    assert "replicas (" not in full and "workers (" not in full and "all devices here are taken" in full


@pytest.mark.parametrize(
    ("cores", "most", "room"),
    [
        (2, 4, (False, False)),  # one replica and one worker
        (3, 4, (False, False)),  # a second replica is taken at once, as the job lets up to four
        (3, 1, (True, True)),
        (16, 4, (True, True)),
    ],
)
def test_room_is_counted_beside_what_runs_already(cores: int, most: int, room: tuple[bool, bool], tmp_path: Path) -> None:
    job = Job.model_validate_json(json.dumps(tiny_job(tmp_path, tmp_path)))
    teacher = job.teacher.model_copy(update={"replicas": Replicas(min=1, max=most)})
    found = room_beside(job.model_copy(update={"teacher": teacher}), {"CPU": cores, "GPU": 0})
    assert (found.replica, found.worker) == room
