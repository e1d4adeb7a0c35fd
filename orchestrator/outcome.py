"""The last steps of a run: what was achieved, measured, exported and written down."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import one_line
from orchestrator.labelling import Labelled
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.plan.resources import evaluation_takes, room_beside
from orchestrator.report.timeline import TRAININGS, bottleneck, lanes
from orchestrator.run import Run
from orchestrator.runtime.versions import git_commit, versions
from orchestrator.store.heldout import AnswerLog, disjoint
from orchestrator.store.records import ModelFolder, Tokens

if TYPE_CHECKING:
    from orchestrator.evaluate.measure import Measured


def evaluate(
    run: Run, tokens: Tokens, teacher: ModelFolder, answers: AnswerLog, student: ModelFolder, baseline: ModelFolder | None
) -> Measured:
    """Student and baseline on held-out windows, and the teacher by what it has answered on them."""
    from orchestrator.evaluate.measure import Bench, measure
    from orchestrator.evaluate.model import AnsweringTeacher, Subject
    from orchestrator.evaluate.windows import Heldout

    job, spec = run.job, run.job.evaluate
    subjects = {"student": Subject(student.address, job.train.precision)}
    if baseline is not None:
        subjects["baseline"] = Subject(baseline.address, job.train.precision)
    answering = AnsweringTeacher(teacher.address, job.teacher.dtype, teacher.manifest.vocab_size)
    key = fingerprint("evaluate", job.evaluate, tokens.manifest.content, student.manifest.content)
    with run.stage("evaluate", key) as stage:
        takes = evaluation_takes(job)
        if job.cluster.address == "local":  # nothing else runs there now
            takes["CPU"] = max(1, min(run.plan.cpu_slots, os.cpu_count() or 1))
        heldout = Heldout(run.store, tokens.folder, tokens.manifest, answers)
        bench = Bench(takes, spec.micro_batch, run.display.say)
        measured = measure(heldout, answering, subjects, bench, run.warn)
        for name, figures in measured.figures.items():
            stage.figures |= {f"{name}/{figure}": value for figure, value in figures.items() if math.isfinite(value)}
            if math.isinf(figures["heldout_ppl"]):
                ce = figures["heldout_ce_nats"]
                run.warn(f"evaluate: the perplexity of the {name} is infinite: its cross entropy is {ce:.3g} nats a token")
        if not disjoint(tokens.manifest.heldout_rows, spec.rows, spec.watched):
            there = sum(tokens.manifest.heldout_rows)
            run.warn(
                f"evaluate: there are only {there} held-out rows, so models are also measured on those that training was "
                "watched on (evaluate.every_rows); figures may flatter a model that was stopped or chosen by them"
            )
    return measured


def compose(run: Run, tokens: Tokens, labels: Labelled, student: ModelFolder, measured: Measured) -> dict[str, Any]:
    """The report so far: everything but the stages that are still to come."""
    from orchestrator.evaluate.figures import gap_recovered
    from orchestrator.runtime.nodes import hardware

    return {
        "name": run.job.name,
        "run": run.directory.run,
        **_models(measured),
        "gap_recovered": gap_recovered(measured.figures),
        "gap_recovered_interval": measured.intervals and measured.intervals.gap_recovered,
        "heldout": measured.by_token,
        "generated": measured.generated,
        "data": _data(run, tokens),
        "labels": _labels(run, tokens, labels),
        "training": {n: run.stages[n].figures for n in TRAININGS if n in run.stages and "steps" in run.stages[n].figures},
        "left_out": _left_out(run),
        "throughput": _throughput(run, labels, student.manifest.training),
        "ledger": labels.ledger.model_dump(),
        "hardware": hardware(),
        "versions": versions(),
        "seed": run.job.seed,
        "git_commit": git_commit(),
        "job_file": run.store.address(f"{run.directory.key}/job.yaml"),
        "tracking": run.tracker.address if run.job.tracking.enabled else None,
    }


def _models(measured: Measured) -> dict[str, Any]:
    """The figures of each model, None for one that the run does not have."""
    intervals = measured.intervals.heldout_ce_nats if measured.intervals else {}
    named = {name: figures | {"heldout_ce_nats_interval": intervals.get(name)} for name, figures in measured.figures.items()}
    return {name: named.get(name) for name in ("teacher", "student", "baseline")}


def _data(run: Run, tokens: Tokens) -> dict[str, Any]:
    manifest, rows = tokens.manifest, sum(tokens.manifest.shard_rows)
    return {
        "source": run.job.data.source.kind,
        "documents": manifest.documents,
        "heldout_documents": manifest.heldout_documents,
        "skipped_documents": manifest.skipped_documents,
        "rows": rows,
        "heldout_rows": sum(manifest.heldout_rows),
        "tokens": rows * manifest.seq_len,
        "dropped_tokens": manifest.dropped_tokens,
        "seq_len": manifest.seq_len,
        "target_share": manifest.target_share,
    }


def _labels(run: Run, tokens: Tokens, labels: Labelled) -> dict[str, Any]:
    seal = labels.seal
    return {
        "kind": run.job.labels.kind,
        "bytes_per_token": seal.bytes / (seal.rows * tokens.manifest.seq_len),
        "rows": seal.rows,
        "shards": seal.shards,
        "bytes": seal.bytes,
        "reused_shards": labels.reused_shards,
    }


def _left_out(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Steps that were left out because they were not finite, by training; a reused training's too."""
    from orchestrator.student.nonfinite import skipped_steps

    stages = [run.stages[name] for name in TRAININGS if name in run.stages]
    found = {stage.stage: skipped_steps(run.store, f"{stage.stage}/{stage.key}") for stage in stages}
    return {name: [step.model_dump(mode="json") for step in steps] for name, steps in found.items() if steps}


def _throughput(run: Run, labels: Labelled, training: Mapping[str, float]) -> dict[str, Any]:
    """Tokens by the time from the first shard, or first step, to the last, waiting included."""
    from orchestrator.runtime.board import FIRST_STEP

    first_step = run.progress().get(f"student.{FIRST_STEP}")
    return {
        "teacher_tokens_per_s": labels.tokens_per_s,
        "student_tokens_per_s": training.get("tokens_per_s"),
        "teacher_wait_fraction": labels.blocked_fraction,
        "student_wait_fraction": training.get("label_wait_fraction"),
        "time_to_first_step_s": None if first_step is None else first_step - run.started,
    }


def export(run: Run, tokens: Tokens, teacher: ModelFolder, student: ModelFolder, report: dict[str, Any]) -> None:
    """The student as a Hugging Face folder."""
    from orchestrator.export.folder import Release, export_model

    with run.stage("export", student.manifest.content):
        export_model(Release(run.job, run.store, tokens, teacher, student, report), *_export_target(run))


def check_export(run: Run) -> None:
    """Raise, before anything costs time, if the student could not be exported to where it is to go."""
    from orchestrator.export.folder import check_target

    check_target(*_export_target(run))


def _export_target(run: Run) -> tuple[str, dict[str, str]]:
    """Return the address that the export goes to, and the names by which it identifies the run."""
    directory = run.directory
    origin = {"run": directory.run, "identity": directory.identity}
    return run.job.export.directory or run.store.address(f"{directory.key}/export"), origin


def write_report(run: Run, report: dict[str, Any], measured: Measured) -> dict[str, Any]:
    """report.json, report.html and summary.md in the run directory, and in MLflow."""
    from orchestrator.report.build import verdict, write_figures, write_pages

    run.collect()
    report["throughput"]["wall_s"] = time.time() - run.started
    report["stages"] = [
        {"stage": r.stage, "status": r.status, "started_s": r.started_s, "seconds": r.seconds} for r in run.stages.values()
    ]
    report["fingerprints"] = {r.stage: r.key for r in run.stages.values()}
    report["timeline"] = {lane.stage: lane.figures() for lane in lanes(report["stages"], run.points())}
    total = {"CPU": sum(node["cores"] for node in report["hardware"]), "GPU": sum(len(n["gpus"]) for n in report["hardware"])}
    wall_s, room = report["throughput"]["wall_s"], room_beside(run.job, total)
    report["bottleneck"] = bottleneck(report["stages"], report["timeline"], wall_s, room)
    report |= {"attempt": run.attempt, "faults": [asdict(fault) for fault in run.faults]}
    samples = [[asdict(token) for token in sample] for sample in measured.samples]
    with run.stage("report", fingerprint("report", report["fingerprints"])):
        written: list[Path] = []
        try:
            written = write_pages(run.folder, report, run.points(), samples, run.shown_job())
        except Exception as error:  # the figures are worth more than their pictures
            run.warn(one_line(f"report: report.html and summary.md were not written: {type(error).__name__}: {error}"))
            report["faults"] = [asdict(fault) for fault in run.faults]
        for path in (*written, write_figures(run.folder, report)):
            run.tracker.artifact(path)
    run.conclude(report, verdict(report))
    return report
