"""Alerts, each of them firing and keeping silent, as Prometheus' own promtool works them out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator.monitoring.install import install
from orchestrator.monitoring.rules import ALERTS
from tests.unit.test_dashboards import needs_promtool, promtool

STUDENT, LABELS = '{run="r",stage="student"}', '{run="r",stage="labels"}'
BUSY = f"ray_distill_train_busy_s_total{STUDENT}"
WORKED, IDLE = (f'ray_distill_label_replica_{kind}_s_total{{run="r",stage="labels",replica="0"}}' for kind in ("busy", "idle"))
REPLICAS = f"ray_distill_label_replicas{LABELS}"
RUNS, LABELLING = f"ray_distill_stage_running{STUDENT}", f"ray_distill_stage_running{LABELS}"
PROGRESS = "ray_distill_stage_last_progress_time_s"
CHECKPOINT = f"ray_distill_train_last_checkpoint_time_s{STUDENT}"
NONFINITE, RESTARTS = f"ray_distill_train_nonfinite_losses_total{STUDENT}", f"ray_distill_train_restarts_total{STUDENT}"
SPILLED = 'ray_object_store_memory{SessionName="s",Location="SPILLED",instance="a"}'
RUN, STAGE = {"run": "r"}, {"run": "r", "stage": "student"}


@dataclass(frozen=True)
class Case:
    """One sample of each series a minute, and what the alert says `at` the end: nothing if `summary` is empty."""

    why: str
    alert: str
    series: dict[str, str]
    at: str
    summary: str = ""
    labels: dict[str, str] = field(default_factory=dict)


STARVES, BLOCKS, STUCK = "DistillTeacherStarvesStudent", "DistillStudentBlocksTeacher", "DistillNoProgress"
SICK, STALE, RESTARTED, SPILLS = "DistillNonFiniteLoss", "DistillStaleCheckpoint", "DistillRestarts", "DistillSpilling"
FIRING = (
    Case(
        "busy 12 s a minute",
        STARVES,
        {BUSY: "0+12x60", RUNS: "1x60"},
        "30m",
        "r: the student waits for labels 80% of its time",
        RUN,
    ),
    Case(
        "has said nothing for long",
        STARVES,
        {BUSY: "9x60", RUNS: "1x60"},
        "30m",
        "r: the student waits for labels 100% of its time",
        RUN,
    ),
    Case(
        "busy 9 s and idle 6 s a minute",
        BLOCKS,
        {WORKED: "0+9x60", IDLE: "0+6x60", REPLICAS: "1x60", LABELLING: "1x60"},
        "30m",
        "r: the teachers wait for the student 75% of their time",
        RUN,
    ),
    Case(
        "both sides stand still",
        STUCK,
        {PROGRESS + STUDENT: "60x60", PROGRESS + LABELS: "120x60"},
        "18m",
        "r: nothing was trained on or labelled for 16m 0s",
        RUN,
    ),
    Case("the first one ever", SICK, {NONFINITE: "_x9 1x60"}, "12m", "r: a loss of the student was not finite", STAGE),
    Case("one more", SICK, {NONFINITE: "1x30 2x60"}, "35m", "r: a loss of the student was not finite", STAGE),
    Case(
        "none for 61 minutes",
        STALE,
        {CHECKPOINT: "0x90"},
        "61m",
        "r: a crash now would cost 1h 1m 0s of work of the student",
        STAGE,
    ),
    Case(
        "the first one ever",
        RESTARTED,
        {RESTARTS: "_x9 1x60"},
        "12m",
        "r: processes of the student died and were started again",
        STAGE,
    ),
    Case(
        "for long",
        SPILLS,
        {SPILLED: "0x4 1048576x60"},
        "15m",
        "Ray spills 1MiB of its object store to disk (s)",
        {"SessionName": "s"},
    ),
)
SILENT = (
    Case("busy 36 s a minute", STARVES, {BUSY: "0+36x60", RUNS: "1x60"}, "30m"),
    Case("not for ten minutes yet", STARVES, {BUSY: "0+55x20 1100x9", RUNS: "1x60"}, "28m"),
    Case("the run has ended, its counter stays", STARVES, {BUSY: "9x60", RUNS: "1x3"}, "30m"),
    Case("idle, not blocked", BLOCKS, {WORKED: "0+9x60", IDLE: "0+46x60", REPLICAS: "1x60", LABELLING: "1x60"}, "30m"),
    Case("all is labelled", BLOCKS, {WORKED: "9x60", IDLE: "6x60", REPLICAS: "1x3", LABELLING: "1x3"}, "30m"),
    Case("the student gets on", STUCK, {PROGRESS + STUDENT: "0+60x60", PROGRESS + LABELS: "0x60"}, "30m"),
    Case("evaluation takes long", STUCK, {PROGRESS + '{run="r",stage="evaluate"}': "0x60"}, "30m"),
    Case("long ago", SICK, {NONFINITE: "_x3 1x60"}, "40m"),
    Case("none for 59 minutes", STALE, {CHECKPOINT: "0x90"}, "59m"),
    Case("long ago", RESTARTED, {RESTARTS: "_x3 1x60"}, "50m"),
    Case("for a moment", SPILLS, {SPILLED: "0x4 1048576x2 0x60"}, "15m"),
)


def test_every_alert_is_held_to_both() -> None:
    names = {alert.name for alert in ALERTS}
    assert {case.alert for case in FIRING} == {case.alert for case in SILENT} == names


@needs_promtool
@pytest.mark.parametrize("case", FIRING + SILENT, ids=lambda case: f"{case.alert}: {case.why}")
def test_alert(case: Case, tmp_path: Path) -> None:
    install(tmp_path)
    (alert,) = (alert for alert in ALERTS if alert.name == case.alert)
    firing = {
        "exp_labels": {"severity": alert.severity, **case.labels},
        "exp_annotations": {"summary": case.summary, "description": alert.advice},
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [{"eval_time": case.at, "alertname": case.alert, "exp_alerts": [firing] if case.summary else []}],
    }
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": ["prometheus/rules.yml"], "evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", file)
