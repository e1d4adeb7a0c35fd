"""What a job would take on a cluster that need not exist: `distill plan JOB --cluster 128xH100`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.plan.cluster import Calibration, Cluster, assumed_calibration, parse_cluster
from orchestrator.plan.estimate import Split, Workload, advice, balanced
from orchestrator.plan.layout import layout_of
from orchestrator.plan.make import Plan, decoder_of, vocabulary
from orchestrator.plan.memory import label_bytes_per_token
from orchestrator.plan.sizes import Decoder, with_mtp
from orchestrator.spec.job import Job
from orchestrator.spec.model import CheckpointStudent, ConfigStudent, Model, PretrainTeacher, TransformersTeacher


def capacity(plan: Plan, cluster: str, price_per_hour: float | None, rates: Calibration | None) -> list[str]:
    """Lines for a person: the best split of `cluster` between teacher and student, and what to change where it does not fit.

    `rates` are what was measured of one worker on each side; without them a share of the peak is assumed. Raises `SpecError`
    for a job whose models' sizes are not in the job file.
    """
    found, work = parse_cluster(cluster), workload(plan)
    layout = layout_of(plan.job.train)
    if warnings := advice(work, layout, found):
        return warnings
    assumed = assumed_calibration(found.device, plan.job.train.precision, plan.job.teacher.dtype)
    split = balanced(work, layout, found, rates or assumed, price_per_hour)
    return _lines(split, found, measured=rates is not None)


def given_rates(tflops: tuple[float, float]) -> Calibration:
    """Rates that a user has measured: TFLOP/s of one device that trains the student, and of one that labels."""
    if min(tflops) <= 0:
        raise SpecError(f"--tflops: {tflops[0]:g} {tflops[1]:g}, but both must be above 0")
    return Calibration(*(rate * 1e12 for rate in tflops))


def workload(plan: Plan) -> Workload:
    """The job as far as its cost goes."""
    job = plan.job
    if job.train.steps is None:
        raise SpecError("train.epochs: how many steps they are is known once there are token shards; give train.steps here")
    models = models_of(job)
    student = _known(decoder_of(models.student, models.vocab_size), "student")
    teacher = _known(decoder_of(models.teacher, models.vocab_size), "teacher")
    return Workload(
        student=with_mtp(student, job.student.mtp_depth),
        teacher=teacher,
        seq_len=job.data.seq_len,
        micro_rows=plan.student.batch.micro_rows,
        global_rows=job.train.global_batch,
        steps=job.train.steps,
        label_bytes_per_token=label_bytes_per_token(job.labels, student.vocab, teacher.width),
        teacher_precision=job.teacher.dtype,
        teacher_rows=job.teacher.micro_batch,
    )


@dataclass(frozen=True)
class Models:
    """Both sides of a job as configurations."""

    student: Model
    teacher: Model
    vocab_size: int


def models_of(job: Job) -> Models:
    """From the job file and local folders alone; raises `SpecError` where they do not say it."""
    path = job.teacher.path if isinstance(job.teacher, TransformersTeacher) else None
    teacher = job.teacher.model if isinstance(job.teacher, PretrainTeacher) else _in_folder(path, "teacher")
    path = job.student.path if isinstance(job.student, CheckpointStudent) else None
    student = job.student.model if isinstance(job.student, ConfigStudent) else _in_folder(path, "student")
    vocab = vocabulary(job) or teacher.config.get("vocab_size")
    if not isinstance(vocab, int):
        raise SpecError(_UNKNOWN.format("teacher"))
    return Models(student, teacher, vocab)


_UNKNOWN = "{}: neither the job file nor a local config.json says its size; a plan for a cluster needs it"


def _in_folder(path: str | None, name: str) -> Model:
    """What config.json of a local checkpoint describes."""
    file = Path(path or "").expanduser() / "config.json"
    if not path or not file.is_file():
        raise SpecError(_UNKNOWN.format(name))
    config: dict[str, Any] = json.loads(file.read_text())
    return Model(type=str(config.pop("model_type", None)), config=config)


def _known(shape: Decoder | None, name: str) -> Decoder:
    if shape is None:
        raise SpecError(_UNKNOWN.format(name))
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
