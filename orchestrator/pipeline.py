"""The story of a run: text becomes tokens, a teacher labels them, and a student learns from the labels as they come."""

from __future__ import annotations

from typing import Any

from orchestrator import labelling, outcome, steps
from orchestrator.checks.check import check
from orchestrator.display import Display
from orchestrator.plan.make import Plan
from orchestrator.run import open_run
from orchestrator.run.side_by_side import side_by_side


def run(plan: Plan, display: Display | None = None) -> dict[str, Any]:
    """Run `plan` to its end, or continue where an earlier run of it stopped; returns the report (report.json).

    Every stage whose result is in the storage already is reused. Raises a `DistillError` for whatever a user can mend;
    what has been committed by then stays, and running again goes on from there.
    """
    checked = check(plan)
    checked.refuse()
    steps.check_models(plan.job)
    with open_run(plan, display or Display()) as run:
        for warning in checked.warnings:
            run.warn(warning)
        steps.check_cluster(run)
        outcome.check_export(run)
        teacher = steps.fetch_teacher(run)
        tokens = steps.tokenize(run, teacher)
        teacher = teacher or steps.pretrain_teacher(run, tokens)
        start = steps.prepare_student(run, tokens, teacher)
        demand = labelling.open_labels(run, tokens, teacher, start)
        with side_by_side(run) as work:
            labels = work.start(labelling.label, run, tokens, teacher, demand)
            student = work.train(steps.train_student, run, tokens, demand.student)
            baseline = work.train(steps.train_baseline, run, tokens, demand.student, student, after=labels)
        measured = outcome.evaluate(run, tokens, teacher, demand.answers, student.result(), baseline.result())
        report = outcome.compose(run, tokens, labels.result(), student.result(), measured)
        outcome.export(run, tokens, teacher, student.result(), report)
        return outcome.write_report(run, report, measured)
