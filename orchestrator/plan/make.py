"""The plan: what a job will do, computed before anything heavy is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.plan.batch import Batch
from orchestrator.plan.checkpoint import model_in, vocab_size
from orchestrator.plan.deepspeed_config import deepspeed_config
from orchestrator.plan.footprint import Footprint, Rows, footprint
from orchestrator.plan.layout import layout_of
from orchestrator.plan.length import shown_length
from orchestrator.plan.memory import label_bytes_per_token
from orchestrator.plan.resources import evaluation_takes, replica_takes, training_takes
from orchestrator.plan.sizes import Decoder, decoder, with_mtp
from orchestrator.spec.data import TrainTokenizer
from orchestrator.spec.job import Job
from orchestrator.spec.model import CheckpointStudent, ConfigStudent, Model, PretrainTeacher, TransformersTeacher, labelled_by
from orchestrator.spec.train import Train

UNKNOWN_VOCABULARY = 1 << 17
UNKNOWN_WIDTH = 4096
"""Stand in for figures of a teacher that is not fetched yet, where an upper bound is wanted."""


@dataclass(frozen=True)
class Training:
    """A model that will be trained."""

    params: int | None
    """None if it depends on what is not known before the run."""
    batch: Batch
    active_params: int | None
    """Number of these parameters that one token passes through."""
    memory: Footprint | None
    """Memory of the worker that needs most."""
    on_gpu: bool
    deepspeed: dict[str, Any]
    length: str
    """As asked for."""
    rows_seen: int | None
    """Repeats included; None if it depends on how many rows there will be."""
    tokens_seen: int | None


@dataclass(frozen=True)
class Stage:
    """A step of the run and the resources it asks Ray for."""

    name: str
    what: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Plan:
    job: Job
    stages: tuple[Stage, ...]
    student: Training
    teacher: Training | None
    """None for one that exists already."""
    teacher_params: int | None
    """The parameters of a teacher of either kind; None if they are not known before the run."""
    label_rows: int | None
    """Rows the student reads, repeats included; each distinct one is labelled once. None: known once there are token shards."""
    label_bytes_at_most: int | None
    cpu_slots: int
    """CPU slots of a local Ray."""

    @property
    def storage(self) -> str:
        """A directory or an `s3://` address."""
        return self.job.storage.rstrip("/") if "://" in self.job.storage else str(Path(self.job.storage).expanduser())

    @property
    def run_directory(self) -> str:
        """Return the directory of the first run of that name; a job changed since then gets its own directory, NAME-2."""
        return f"{self.storage}/runs/{self.job.name}"


def make_plan(job: Job) -> Plan:
    """The plan of `job`, from the job file and local configurations alone: no cluster, no storage and no model library.

    Raises `SpecError` for a config.json that cannot be read.
    """
    vocab, teaching = vocabulary(job), teacher_model(job)
    taught = decoder_of(teaching, vocab)
    student = _training(student_model(job), job.train, job.data.seq_len, vocab, job.student.mtp_depth)
    per_token = label_bytes_per_token(job.labels, vocab or UNKNOWN_VOCABULARY, _width(teaching))
    stages = _stages(job)
    slots = job.cluster.num_cpus or max(os.cpu_count() or 1, _concurrent_cpus(job))
    return Plan(
        job=job,
        stages=stages,
        student=student,
        teacher=_training(job.teacher.model, job.teacher.train, job.data.seq_len, vocab)
        if isinstance(job.teacher, PretrainTeacher)
        else None,
        teacher_params=taught.total if taught else None,
        label_rows=student.rows_seen,
        label_bytes_at_most=None if student.tokens_seen is None else int(per_token * student.tokens_seen),
        cpu_slots=slots,
    )


def vocabulary(job: Job) -> int | None:
    """Ids in the vocabulary; None if only the folder of a teacher that is not here knows."""
    if isinstance(job.data.tokenizer, TrainTokenizer):
        return job.data.tokenizer.vocab_size
    teacher, student = teacher_model(job), job.student.model if isinstance(job.student, ConfigStudent) else None
    said = [vocab_size(model) for model in (teacher, student) if model]
    return next((size for size in said if size is not None), None)


def teacher_model(job: Job) -> Model | None:
    """The teacher's configuration; None if it is not here."""
    if isinstance(job.teacher, PretrainTeacher):
        return job.teacher.model
    return model_in(job.teacher.path, "teacher.path") if isinstance(job.teacher, TransformersTeacher) else None


def student_model(job: Job) -> Model | None:
    """The student's configuration; None if it is not here, or has yet to be made of another model."""
    if isinstance(job.student, ConfigStudent):
        return job.student.model
    return model_in(job.student.path, "student.path") if isinstance(job.student, CheckpointStudent) else None


def _width(teacher: Model | None) -> int:
    """Width of the teacher's hidden states."""
    asked = teacher.config.get("hidden_size") if teacher else None
    return asked if isinstance(asked, int) else UNKNOWN_WIDTH


def decoder_of(model: Model | None, vocab: int | None) -> Decoder | None:
    """The shape of `model`; None where the job file does not hold all of it, or its type is not known to the planner."""
    return decoder(model.type, model.config, vocab) if model and vocab else None


def _training(model: Model | None, train: Train, seq_len: int, vocab: int | None, mtp_depth: int = 0) -> Training:
    shape = decoder_of(model, vocab)
    batch, on_gpu = Batch.of(train), train.gpus_per_worker > 0
    params = active = memory = None
    if shape is not None:
        rows = Rows(batch.micro_rows, batch.accumulation, seq_len)
        memory = footprint(with_mtp(shape, mtp_depth), layout_of(train), rows, on_gpu)
        params, active = shape.total, shape.active
    seen = None if train.steps is None else train.steps * train.global_batch
    tokens = None if seen is None else seen * seq_len
    return Training(params, batch, active, memory, on_gpu, deepspeed_config(train), shown_length(train), seen, tokens)


def _stages(job: Job) -> tuple[Stage, ...]:
    teacher, train = job.teacher, job.train
    stages = [Stage("data", f"{job.data.source.kind} source to windows of {job.data.seq_len} tokens", 1, 0)]
    if isinstance(teacher, PretrainTeacher):
        stages.append(_training_stage("teacher", f"train from scratch, {shown_length(teacher.train)}", teacher.train))
    else:
        stages.insert(0, Stage("teacher", f"fetch and hash ({teacher.kind})", 0, 0))
    if not isinstance(job.student, ConfigStudent):
        stages.append(Stage("initial", f"first weights of the student ({job.student.kind})", 1, 0))
    least, most = teacher.replicas.min, teacher.replicas.max
    replica, each = labelled_by(teacher), replica_takes(teacher)
    spread = f" of {replica.shards} shards" if replica.shards > 1 else ""
    actors = f"{least} teacher actor{'s' if least > 1 else ''}" if least == most else f"{least} to {most} teacher actors"
    pool = f"{job.labels.kind}, by {actors}{spread}"
    stages.append(Stage("labels", pool, least * each["CPU"], least * each["GPU"]))
    stages.append(_training_stage("student", f"{shown_length(train)}, following the labels as they are written", train))
    if job.evaluate.baseline:
        stages.append(_training_stage("baseline", "the same student on hard labels alone", train))
    measuring = evaluation_takes(job)
    stages.append(Stage("evaluate", f"up to {job.evaluate.rows} held-out windows", measuring["CPU"], measuring["GPU"]))
    stages.append(Stage("export", "Hugging Face folder", 0, 0))
    stages.append(Stage("report", "report.html, report.json, summary.md", 0, 0))
    return tuple(stages)


def _training_stage(name: str, what: str, train: Train) -> Stage:
    takes = training_takes(train)
    return Stage(name, what, takes["CPU"], takes["GPU"])


def _concurrent_cpus(job: Job) -> int:
    """CPU slots that labelling and training need side by side."""
    side_by_side = job.teacher.replicas.min * replica_takes(job.teacher)["CPU"] + training_takes(job.train)["CPU"]
    alone = training_takes(job.teacher.train)["CPU"] if isinstance(job.teacher, PretrainTeacher) else 0.0
    return int(-(-max(side_by_side, alone) // 1))
