"""The steps of a run: each takes what the ones before it left, asks one stage for its work, and keeps the books.

Labelling has a module of its own (labelling.py), and so has what comes after training (outcome.py).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.checks.check import check_models as look_at_models
from orchestrator.checks.check import refuse_first
from orchestrator.data.prepare import identify_corpus, prepare_tokens, prepared_tokens
from orchestrator.errors import SpecError, find_user_error
from orchestrator.models.tokenizer import tokenizer_identity
from orchestrator.plan.checkpoint import local_checkpoint
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.plan.length import with_steps
from orchestrator.plan.make import UNKNOWN_VOCABULARY, vocabulary
from orchestrator.plan.resources import evaluation_takes, replica_takes, training_takes
from orchestrator.run import Run
from orchestrator.run.side_by_side import side_by_side
from orchestrator.runtime.session import check_resources
from orchestrator.spec.job import Job
from orchestrator.spec.model import ConfigStudent, Model, PretrainTeacher, PrunedStudent, TransformersTeacher
from orchestrator.store.once import Waiting, make_once
from orchestrator.store.records import ModelFolder, Tokens
from orchestrator.student.job import Evaluation, Initial, TrainingJob


def check_models(job: Job) -> None:
    """Raise `SpecError` for models that cannot be or cannot be trained as asked, before anything costs time."""
    from orchestrator.student import preflight

    preflight.check_models(job, vocabulary(job) or UNKNOWN_VOCABULARY)


def check_cluster(run: Run) -> None:
    """Raise `EnvironmentFault` if the cluster could never hold what runs at the same time, or its nodes do not fit together."""
    spec = run.job.teacher
    replica, student = replica_takes(spec), training_takes(run.job.train)
    who = "teacher pool" if spec.shards == 1 else f"{spec.replicas.min} x teacher.shards {spec.shards}"
    check_resources({kind: spec.replicas.min * replica[kind] + student[kind] for kind in replica}, f"{who} and student")
    if isinstance(spec, PretrainTeacher):
        check_resources(training_takes(spec.train), "teacher.train")
    check_resources(evaluation_takes(run.job), "evaluate")
    from orchestrator.runtime.nodes import check_nodes

    check_nodes(run.store, run.job.storage)


def fetch_teacher(run: Run) -> ModelFolder | None:
    """A teacher that exists already; None if it is to be trained here."""
    spec = run.job.teacher
    if isinstance(spec, PretrainTeacher):
        return None
    from orchestrator.teacher.fetch import fetch_teacher

    with run.stage("teacher", fingerprint("teacher", spec)) as stage:
        teacher = fetch_teacher(run.store, spec)
        if isinstance(spec, TransformersTeacher):
            _tell_ignored_weights(run, "teacher.path", teacher.path)
        if not (isinstance(spec, TransformersTeacher) and local_checkpoint(spec.path)):
            _look_at_fetched(run, teacher)
        if spec.shards > 1:
            from orchestrator.models.build import outline
            from orchestrator.models.sharded import check_shards

            check_shards(outline(teacher.path), spec.shards)
        stage.figures["size_bytes"] = sum(f.bytes for f in teacher.manifest.files.values())
    return teacher


def _look_at_fetched(run: Run, teacher: ModelFolder) -> None:
    """Do what could not be done before the teacher was here; raises what a run would end with later."""
    local = TransformersTeacher(kind="transformers", path=str(teacher.path))
    findings = list(look_at_models(run.job.model_copy(update={"teacher": local})))
    refuse_first(findings)
    for finding in findings:
        run.warn(finding.text)


def tokenize(run: Run, teacher: ModelFolder | None) -> Tokens:
    """Token shards of the corpus, in the teacher's tokenizer if there is a teacher."""
    identity = "" if teacher is None else tokenizer_identity(teacher.manifest.files)
    corpus = identify_corpus(run.job.data, None if teacher is None else teacher.address, identity)
    source = run.job.data.source
    lineage = {"name": source.kind, "digest": corpus.key, "source": source.model_dump_json()}
    with run.stage("data", corpus.key, lineage) as stage:
        made = make_once(
            run.store,
            f"{corpus.folder}/lock",
            lambda: prepared_tokens(run.store, corpus),
            lambda _: prepare_tokens(run.store, corpus),
            Waiting(run.display.say),
        )
        manifest = made.result
        if not made.here:
            stage.reuse()
        stage.figures |= {"documents": manifest.documents, "rows": sum(manifest.shard_rows)}
    if manifest.special_documents and run.job.data.special_tokens_in_text == "encode_as_text":
        run.warn(
            f"{manifest.special_documents} documents contain the text of a special token; it was encoded as text "
            "(data.special_tokens_in_text: allow makes it that token)"
        )
    tokens = Tokens(corpus.folder, manifest)
    for section, train in run.job.trainings.items():
        with_steps(train, tokens.rows, section)
    return tokens


def pretrain_teacher(run: Run, tokens: Tokens) -> ModelFolder:
    """Train the teacher here: a distillation run without a teacher."""
    spec = run.job.teacher
    assert isinstance(spec, PretrainTeacher)
    every = run.job.evaluate.every
    job = TrainingJob(
        "teacher",
        spec.model,
        tokens.manifest.vocab_size,
        with_steps(spec.train, tokens.rows, "teacher.train"),
        spec.seed,
        tokens.folder,
        tokens.manifest,
        soft=None,
        evaluation=Evaluation(every, run.job.evaluate.every_rows, log=None) if every else None,
    )
    with side_by_side(run) as work:  # in a thread: on the main one Ray Train would take SIGINT for itself, and keep it
        teacher = work.train(_train, run, tokens, job)
    return teacher.result()


def prepare_student(run: Run, tokens: Tokens, teacher: ModelFolder) -> Model | Initial:
    """Return what the student starts from: a configuration, or weights that are supplied or made from the teacher's here."""
    student, vocab = run.job.student, teacher.manifest.vocab_size
    if isinstance(student, ConfigStudent):
        asked = student.model.config.get("vocab_size", vocab)
        if asked != vocab:
            raise SpecError(f"student.model.config.vocab_size: {asked}, but the teacher's vocabulary has {vocab} ids")
        return student.model
    from orchestrator.student.initial import Origin, finished_initial, make_initial

    origin = Origin(run.store, student, teacher, run.job.seed, f"{tokens.folder}/train", tokens.manifest)
    if not isinstance(student, PrunedStudent):
        _tell_ignored_weights(run, "student.path", origin.folder)
    with run.stage("initial", origin.key) as stage:
        made = make_once(
            run.store,
            f"{origin.stage}/lock",
            lambda: finished_initial(origin),
            lambda lock: make_initial(origin, lock),
            Waiting(run.display.say),
        )
        if not made.here:
            stage.reuse()
    return made.result


def _tell_ignored_weights(run: Run, key: str, folder: Path) -> None:
    """Warn of files beside the weights in `folder` that look like weights, but are none of its model's."""
    from orchestrator.models.hub import ignored_weights

    ignored = ignored_weights(folder)
    if ignored:
        run.warn(f"{key}: {', '.join(ignored)} in {folder} is not among the weights of its model and was ignored")


def train_student(run: Run, tokens: Tokens, student: TrainingJob) -> ModelFolder:
    """Train the student on the label log while it is being written."""
    return _train(run, tokens, student)


def train_baseline(run: Run, tokens: Tokens, student: TrainingJob, training: Future[Any]) -> ModelFolder | None:
    """Train the same student, from the same weights on the same rows, on hard labels alone.

    It waits for room as long as the student's `training` goes on. The run does without it if it fails, and the report says so.
    """
    if not run.job.evaluate.baseline:
        return None
    try:
        return _train(run, tokens, replace(student, stage="baseline", soft=None), lambda: not training.done())
    except Exception as error:
        if run.aborted() is not None:
            raise
        cause = find_user_error(error) or f"{type(error).__name__}: {error}"
        run.warn(f"baseline: {cause}; the run goes on without it, and cannot say how much distillation gained")
        return None


def _train(run: Run, tokens: Tokens, job: TrainingJob, awaits_room: Callable[[], bool] = lambda: False) -> ModelFolder:
    with run.stage(job.stage, job.key) as stage:
        run.display.expect(job.stage, job.steps)
        from orchestrator.student.launch import Host, train_model

        host = Host(run.store, run.board, tokens.tokenizer, run.display.say, run.warn)
        made = train_model(host, job, awaits_room)
        model = made.result
        if made.here:
            run.collect()  # so that the stage's last line has its last step
            done = int(model.manifest.training["steps"])
            if done < job.steps:
                run.display.say(
                    f"{job.stage}: stopped at step {done} of {job.steps}: the held-out cross entropy was not lower in "
                    f"{job.train.patience} evaluations"
                )
        else:
            stage.reuse()
        stage.figures |= model.manifest.training
    return model
