"""Estimate of what a job requires on a cluster that need not exist: `distill plan JOB --cluster 128xH100`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import SpecError
from orchestrator.plan.cluster import Calibration, Cluster, assumed_calibration, parse_cluster
from orchestrator.plan.estimate import Split, Workload, advice, balanced, rebatched
from orchestrator.plan.layout import layout_of
from orchestrator.plan.make import Plan, decoder_of, student_model, teacher_model, vocabulary
from orchestrator.plan.memory import label_bytes_per_token
from orchestrator.plan.sizes import Decoder, with_mtp
from orchestrator.spec.job import Job
from orchestrator.spec.model import Model

WORTH_SAYING = 1.05
"""Minimum speed-up by another batch for it to be suggested."""


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
    lines = _lines(split, found, measured=rates is not None)
    more = rebatched(work, layout, found, rates or assumed, price_per_hour)
    if split.idle_devices and more.tokens_per_s > WORTH_SAYING * split.tokens_per_s:
        faster = more.tokens_per_s / split.tokens_per_s
        lines.append(f"  or use {more.used_devices}, {faster:.2g} times as fast, with {_sizes(more)}")
    return lines


def check_measured_here(job: Job, cluster: str, gpus: Sequence[str]) -> None:
    """Raise `SpecError` if rates measured on this machine, which has `gpus` (by name), are not those of `cluster`'s devices."""
    device = parse_cluster(cluster).device
    uses_gpu = job.train.gpus_per_worker > 0
    here = (gpus[0] if gpus else "a GPU") if uses_gpu else "CPU cores (train.gpus_per_worker 0)"
    family = device.name.partition("-")[0]
    if device.on_gpu != uses_gpu or (uses_gpu and family not in re.split(r"\W+", here)):
        raise SpecError(
            f"--calibrate: measures {here} of this machine, which says nothing of {device.name}; leave it out, "
            "give rates measured there with --tflops, or calibrate there"
        )


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
    teacher, student, vocab = teacher_model(job), student_model(job), vocabulary(job)
    if teacher is None or vocab is None:
        raise SpecError(_UNKNOWN.format("teacher"))
    if student is None:
        raise SpecError(_UNKNOWN.format("student"))
    return Models(student, teacher, vocab)


_UNKNOWN = "{}: neither the job file nor a local config.json says its size; a plan for a cluster needs it"


def _known(shape: Decoder | None, name: str) -> Decoder:
    if shape is None:
        raise SpecError(_UNKNOWN.format(name))
    return shape


def _keys(split: Split, cluster: Cluster) -> str:
    """Return the job file keys that give `split`."""
    gpu = ", train.gpus_per_worker 1, teacher.gpus_per_shard 1" if cluster.device.on_gpu else ""
    return f"{_sizes(split)}, teacher.shards {split.devices_a_replica}{gpu}"


def _sizes(split: Split) -> str:
    replicas = f"teacher.replicas {{min: {split.teacher_replicas}, max: {split.teacher_replicas}}}"
    return f"train.workers {split.student.layout.workers}, train.global_batch {split.global_rows}, {replicas}"


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
        f"  idle      {split.idle_devices} devices, not counted below",
        f"  set       {_keys(split, cluster)}",
        f"  in all    {split.hours:,.2f} hours, {split.device_hours:,.0f} device-hours, {labels:,.2f} GiB of labels",
    ]
    return lines if split.cost is None else [*lines, f"  cost      {split.cost:,.2f}"]
