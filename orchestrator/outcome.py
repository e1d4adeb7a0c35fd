"""The last steps of a run: what was achieved, measured, exported and written down."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from orchestrator.plan.fingerprint import fingerprint
from orchestrator.run import Run
from orchestrator.runtime.board import FIRST_STEP
from orchestrator.runtime.versions import versions
from orchestrator.steps import Labelled, Tokens
from orchestrator.store.records import ModelFolder


def evaluate(
    run: Run, tokens: Tokens, teacher: ModelFolder, student: ModelFolder, baseline: ModelFolder | None
) -> dict[str, dict[str, float]]:
    """Figures of teacher, student and baseline on the same held-out windows."""
    from orchestrator.evaluate.measure import Heldout, Subject, measure

    job = run.job
    precision = job.train.precision
    subjects = {"teacher": Subject(teacher.path, job.teacher.dtype), "student": Subject(student.path, precision)}
    if baseline is not None:
        subjects["baseline"] = Subject(baseline.path, precision)
    key = fingerprint("evaluate", job.evaluate, tokens.manifest.content, student.manifest.content)
    with run.stage("evaluate", key) as stage:
        cpus = max(1, min(run.plan.cpu_slots, os.cpu_count() or 1)) if job.cluster.address == "local" else 1
        spec = job.evaluate
        heldout = Heldout(run.store, tokens.folder, tokens.manifest, spec.rows)
        figures = measure(heldout, subjects, spec.micro_batch, cpus)
        for name in subjects:
            stage.figures |= {f"{name}/{figure}": value for figure, value in figures[name].items()}
    return figures


def compose(
    run: Run, tokens: Tokens, labels: Labelled, student: ModelFolder, figures: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """The report so far: everything but the stages that are still to come."""
    from orchestrator.evaluate.measure import gap_recovered

    seal, training = labels.seal, student.manifest.training
    progress = run.progress()
    first_step = progress.get(f"student.{FIRST_STEP}")
    return {
        "name": run.job.name,
        **{name: figures.get(name) for name in ("teacher", "student", "baseline")},
        "gap_recovered": gap_recovered(figures),
        "labels": {
            "kind": run.job.labels.kind,
            "bytes_per_token": seal.bytes / (seal.rows * tokens.manifest.seq_len),
            "rows": seal.rows,
            "shards": seal.shards,
            "bytes": seal.bytes,
            "reused_shards": labels.reused_shards,
        },
        "throughput": {
            "teacher_tokens_per_s": labels.tokens_per_s,
            "student_tokens_per_s": training.get("tokens_per_s"),
            "teacher_wait_fraction": labels.blocked_fraction,
            "student_wait_fraction": training.get("label_wait_fraction"),
            "time_to_first_step_s": None if first_step is None else first_step - run.started,
        },
        "ledger": labels.ledger.model_dump(),
        "versions": versions(),
        "seed": run.job.seed,
        "git_commit": git_commit(),
    }


def export(run: Run, student: ModelFolder, report: dict[str, Any]) -> Path:
    """The student as a Hugging Face folder."""
    from orchestrator.export.folder import export_model

    asked = run.job.export.directory
    target = Path(asked).expanduser().absolute() if asked else run.folder / "export"
    with run.stage("export", student.manifest.content):
        return export_model(student.path, target, report, run.job.export.mtp == "keep")


def write_report(run: Run, report: dict[str, Any]) -> dict[str, Any]:
    """report.json, report.html and summary.md in the run directory, and in MLflow."""
    from orchestrator.report.build import write_report as write

    run.collect()
    report["throughput"]["wall_s"] = time.time() - run.started
    report["stages"] = [
        {"stage": r.stage, "status": r.status, "started_s": r.started_s, "seconds": r.seconds} for r in run.stages.values()
    ]
    report["fingerprints"] = {r.stage: r.key for r in run.stages.values()}
    with run.stage("report", fingerprint("report", report["fingerprints"])):
        for path in write(run.folder, report, run.points(), run.shown_job()):
            run.tracker.artifact(path)
    return report


def git_commit() -> str | None:
    """Commit of the checkout this code runs from; None for an installed package."""
    here = Path(__file__).parent
    result = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
