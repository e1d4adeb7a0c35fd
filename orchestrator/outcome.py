"""The last steps of a run: what was achieved, measured, exported and written down."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator.labelling import Labelled, replica_of
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.plan.resources import room_beside
from orchestrator.report.timeline import TRAININGS, bottleneck, lanes
from orchestrator.run import Run
from orchestrator.runtime.versions import git_commit, versions
from orchestrator.store.heldout import disjoint
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
        heldout = Heldout(run.store, tokens.folder, tokens.manifest, spec.rows, spec.watched)
        with _led(run, teacher) as spread:
            measured = measure(heldout, subjects, spec.micro_batch, cpus, spread)
        for name in subjects:
            figures = measured.figures[name]
            stage.figures |= {f"{name}/{figure}": value for figure, value in figures.items() if math.isfinite(value)}
            if math.isinf(figures["heldout_ppl"]):
                ce = figures["heldout_ce_nats"]
                run.warn(f"evaluate: the perplexity of the {name} is infinite: its cross entropy is {ce:.3g} nats a token")
        for name, why in measured.generated.failures.items():
            run.warn(f"evaluate: the {name} was measured, but could not continue the report's prompts: {why}")
        if not disjoint(tokens.manifest.heldout_rows, spec.rows, spec.watched):
            there = sum(tokens.manifest.heldout_rows)
            run.warn(
                f"evaluate: there are only {there} held-out rows, so models are also measured on those that training was "
                "watched on (evaluate.every_rows); figures may flatter a model that was stopped or chosen by them"
            )
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
    from orchestrator.runtime.nodes import hardware

    return {
        "name": run.job.name,
        "run": run.directory.run,
        **_models(measured),
        "gap_recovered": gap_recovered(measured.figures),
        "gap_recovered_interval": measured.intervals and measured.intervals.gap_recovered,
        "heldout": measured.by_token,
        "generated": measured.generated.texts,
        "data": _data(run, tokens),
        "labels": _labels(run, tokens, labels),
        "training": {n: run.stages[n].figures for n in TRAININGS if n in run.stages and "steps" in run.stages[n].figures},
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
    """Where the export goes, and how it names the run."""
    directory = run.directory
    origin = {"run": directory.run, "identity": directory.identity}
    return run.job.export.directory or run.store.address(f"{directory.key}/export"), origin


def write_report(run: Run, report: dict[str, Any], measured: Measured) -> dict[str, Any]:
    """report.json, report.html and summary.md in the run directory, and in MLflow."""
    from orchestrator.report.build import verdict
    from orchestrator.report.build import write_report as write

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
        for path in write(run.folder, report, run.points(), samples, run.shown_job()):
            run.tracker.artifact(path)
    run.conclude(report, verdict(report))
    return report
