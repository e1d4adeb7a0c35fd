"""What a job would take on a cluster that need not exist: `distill plan JOB --cluster 128xH100`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.plan.cluster import Calibration, Cluster, assumed_calibration, parse_cluster
from orchestrator.plan.estimate import Split, Workload, advice, balanced
from orchestrator.plan.layout import layout_of
from orchestrator.plan.make import Plan, decoder_of, vocabulary
from orchestrator.plan.memory import label_bytes_per_token
from orchestrator.plan.sizes import Decoder, decoder
from orchestrator.spec.job import Job
from orchestrator.spec.model import CheckpointStudent, ConfigStudent, PretrainTeacher, TransformersTeacher


def capacity(plan: Plan, cluster: str, price_per_hour: float | None, tflops: tuple[float, float] | None) -> list[str]:
    """Lines for a person: the best split of `cluster` between teacher and student, and what to change where it does not fit.

    `tflops` are rates that were measured, sustained by one device that trains the student and by one that labels; without
    them a share of the peak is assumed. Raises `SpecError` for a job whose models' sizes are not in the job file.
    """
    if tflops and min(tflops) <= 0:
        raise SpecError(f"--tflops: {tflops[0]:g} {tflops[1]:g}, but both must be above 0")
    found, work = parse_cluster(cluster), workload(plan)
    layout = layout_of(plan.job.train)
    precisions = plan.job.train.precision, plan.job.teacher.dtype
    rates = Calibration(*(rate * 1e12 for rate in tflops)) if tflops else assumed_calibration(found.device, *precisions)
    if warnings := advice(work, layout, found):
        return warnings
    split = balanced(work, layout, found, rates, price_per_hour)
    return _lines(split, found, measured=tflops is not None)


def workload(plan: Plan) -> Workload:
    """The job as far as its cost goes."""
    job, teacher_shape = plan.job, _teacher(plan.job)
    student = _student(plan.job, teacher_shape)
    return Workload(
        student=student,
        teacher=teacher_shape,
        seq_len=job.data.seq_len,
        micro_rows=plan.student.batch.micro_rows,
        global_rows=job.train.global_batch,
        steps=job.train.steps,
        label_bytes_per_token=label_bytes_per_token(job.labels, student.vocab, teacher_shape.width),
        teacher_precision=job.teacher.dtype,
        teacher_rows=job.teacher.micro_batch,
    )


def _teacher(job: Job) -> Decoder:
    if isinstance(job.teacher, PretrainTeacher):
        return _known(decoder_of(job.teacher.model, vocabulary(job)), "teacher")
    return _in_folder(job.teacher.path if isinstance(job.teacher, TransformersTeacher) else None, "teacher")


def _student(job: Job, teacher: Decoder) -> Decoder:
    student = job.student
    if isinstance(student, ConfigStudent):
        return _known(decoder_of(student.model, vocabulary(job) or teacher.vocab), "student")
    return _in_folder(student.path if isinstance(student, CheckpointStudent) else None, "student")


def _in_folder(path: str | None, name: str) -> Decoder:
    """What config.json of a local checkpoint describes."""
    file = Path(path or "").expanduser() / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if path and file.is_file() else {}
    return _known(decoder(str(config.get("model_type")), config, config.get("vocab_size")), name)


def _known(shape: Decoder | None, name: str) -> Decoder:
    if shape is None:
        raise SpecError(f"{name}: neither the job file nor a local config.json says its size; a plan for a cluster needs it")
    return shape


def _lines(split: Split, cluster: Cluster, measured: bool) -> list[str]:
    student, speed = split.student, split.student.speed
    rates = "as measured" if measured else "at 40 % of the peak, which is assumed"
    labels = split.label_bytes / 2**30
    lines = [
        f"on {cluster} ({cluster.nodes} nodes), {rates}",
        f"  student   {student.layout.workers} devices: {student.layout}",
        f"            {student.memory.total / 1e9:.1f} GB a device, {speed.tokens_per_s:,.0f} tokens/s",
        f"            step {speed.step_s:.3g} s: passes {speed.compute_s:.3g}, communication not hidden "
        f"{speed.communication_s:.3g} ({speed.traffic.total / 1e9:.3g} GB), bubble {speed.bubble:.1%}",
        f"  teacher   {split.teacher_replicas} replicas of {split.devices_a_replica} devices: "
        f"{split.teacher_bytes / 1e9:.1f} GB a device, {split.teacher_tokens_per_s:,.0f} tokens/s",
        f"  idle      {split.idle_devices} devices",
        f"  in all    {split.hours:,.2f} hours, {split.device_hours:,.0f} device-hours, {labels:,.2f} GiB of labels",
    ]
    return lines if split.cost is None else [*lines, f"  cost      {split.cost:,.2f}"]
