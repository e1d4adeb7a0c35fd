"""The last steps of a run: what was achieved, measured, exported and written down."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator.labelling import Labelled, replica_of
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.run import Run
from orchestrator.runtime.versions import git_commit, versions
from orchestrator.store.records import ModelFolder, Tokens

if TYPE_CHECKING:
    from orchestrator.evaluate.measure import Measured, Spread


def evaluate(run: Run, tokens: Tokens, teacher: ModelFolder, student: ModelFolder, baseline: ModelFolder | None) -> Measured:
    """Teacher, student and baseline on the same held-out windows."""
    from orchestrator.evaluate.measure import Heldout, Subject, measure

    job = run.job
    precision = job.train.precision
    subjects = {"teacher": Subject(teacher.address, job.teacher.dtype), "student": Subject(student.address, precision)}
    if baseline is not None:
        subjects["baseline"] = Subject(baseline.address, precision)
    key = fingerprint("evaluate", job.evaluate, tokens.manifest.content, student.manifest.content)
    with run.stage("evaluate", key) as stage:
        cpus = max(1, min(run.plan.cpu_slots, os.cpu_count() or 1)) if job.cluster.address == "local" else 1
        spec = job.evaluate
        heldout = Heldout(run.store, tokens.folder, tokens.manifest, spec.rows)
        with _led(run, teacher) as spread:
            measured = measure(heldout, subjects, spec.micro_batch, cpus, spread)
        for name in subjects:
            figures = measured.figures[name]
            stage.figures |= {f"{name}/{figure}": value for figure, value in figures.items() if math.isfinite(value)}
            if math.isinf(figures["heldout_ppl"]):
                ce = figures["heldout_ce_nats"]
                run.warn(f"evaluate: the perplexity of the {name} is infinite: its cross entropy is {ce:.3g} nats a token")
    return measured


@contextmanager
def _led(run: Run, teacher: ModelFolder) -> Iterator[Spread | None]:
    """Room and the way to load a teacher of several shards; None for one that a process holds."""
    from orchestrator.evaluate.measure import Spread
    from orchestrator.teacher.make import load_answers
    from orchestrator.teacher.placement import Placement

    spec = run.job.teacher
    if spec.shards == 1:
        yield None
        return
    with Placement(teacher.manifest.content, spec, run.display.say) as room:
        room.reserve(1)
        yield Spread(partial(load_answers, replica_of(spec, teacher)), room.options())


def compose(run: Run, tokens: Tokens, labels: Labelled, student: ModelFolder, measured: Measured) -> dict[str, Any]:
    """The report so far: everything but the stages that are still to come."""
    from orchestrator.evaluate.measure import gap_recovered
    from orchestrator.runtime.board import FIRST_STEP

    seal, training, figures = labels.seal, student.manifest.training, measured.figures
    progress = run.progress()
    first_step = progress.get(f"student.{FIRST_STEP}")
    return {
        "name": run.job.name,
        "run": run.directory.run,
        **{name: figures.get(name) for name in ("teacher", "student", "baseline")},
        "gap_recovered": gap_recovered(figures),
        "heldout": measured.by_token,
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


def export(run: Run, tokens: Tokens, teacher: ModelFolder, student: ModelFolder, report: dict[str, Any]) -> None:
    """The student as a Hugging Face folder."""
    from orchestrator.export.folder import Release, export_model

    target = run.job.export.directory or run.store.address(f"{run.directory.key}/export")
    with run.stage("export", student.manifest.content):
        export_model(Release(run.job, run.store, tokens, teacher, student, report), target)


def write_report(run: Run, report: dict[str, Any], measured: Measured) -> dict[str, Any]:
    """report.json, report.html and summary.md in the run directory, and in MLflow."""
    from orchestrator.report.build import verdict
    from orchestrator.report.build import write_report as write
    from orchestrator.report.timeline import bottleneck, lanes

    run.collect()
    report["throughput"]["wall_s"] = time.time() - run.started
    report["stages"] = [
        {"stage": r.stage, "status": r.status, "started_s": r.started_s, "seconds": r.seconds} for r in run.stages.values()
    ]
    report["fingerprints"] = {r.stage: r.key for r in run.stages.values()}
    report["timeline"] = {lane.stage: lane.figures() for lane in lanes(report["stages"], run.points())}
    report["bottleneck"] = bottleneck(report["timeline"])
    report |= {"attempt": run.attempt, "faults": [asdict(fault) for fault in run.faults]}
    samples = [[asdict(token) for token in sample] for sample in measured.samples]
    with run.stage("report", fingerprint("report", report["fingerprints"])):
        for path in write(run.folder, report, run.points(), samples, run.shown_job()):
            run.tracker.artifact(path)
    run.conclude(report, verdict(report))
    return report
