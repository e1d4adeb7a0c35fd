"""The steps of a run: each takes what the ones before it left, asks one stage for its work, and keeps the books."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from threading import Thread
from typing import TYPE_CHECKING, Any

from orchestrator.data.prepare import identify_corpus, prepare_tokens, prepared_tokens
from orchestrator.errors import SpecError
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.plan.make import UNKNOWN_VOCABULARY, vocabulary
from orchestrator.run import Run
from orchestrator.runtime.session import check_resources, replicas_that_fit
from orchestrator.spec.job import Job
from orchestrator.spec.model import ConfigStudent, Model, PretrainTeacher, Replicas, TeacherBase, vllm_of
from orchestrator.spec.train import Train
from orchestrator.store.label_log import LabelLog, Ledger, Seal
from orchestrator.store.records import ModelFolder, TokenManifest, finished_model
from orchestrator.student.job import Ahead, Initial, Soft, TrainingJob
from orchestrator.tracking import names

if TYPE_CHECKING:
    from orchestrator.teacher.labeller import Labelling as Work

ABORT_GRACE_S = 30.0


@dataclass(frozen=True)
class Tokens:
    """Token shards, and where they lie."""

    folder: str
    manifest: TokenManifest

    @property
    def tokenizer(self) -> str:
        return f"{self.folder}/tokenizer"


@dataclass(frozen=True)
class Labelling:
    """The label log and what training demands of it."""

    log: LabelLog
    student: TrainingJob
    demand: list[int]


@dataclass(frozen=True)
class Labelled:
    """A demand that is met."""

    seal: Seal
    ledger: Ledger
    reused_shards: int
    tokens_per_s: float | None
    """Of all teacher actors together; None if nothing was left to label."""
    blocked_fraction: float | None
    """Share of the teacher's time spent waiting for the student."""


def check_models(job: Job) -> None:
    """Raise `SpecError` for models that cannot be or cannot be trained as asked, before anything costs time."""
    from orchestrator.student import preflight

    preflight.check_models(job, vocabulary(job) or UNKNOWN_VOCABULARY)


def check_cluster(run: Run) -> None:
    """Raise `EnvironmentFault` if the cluster could never hold what runs at the same time, or its nodes do not fit together."""
    spec = run.job.teacher
    replica, student = _replica_takes(spec), _training_takes(run.job.train)
    who = "teacher pool" if spec.shards == 1 else f"{spec.replicas.min} x teacher.shards {spec.shards}"
    check_resources({kind: spec.replicas.min * replica[kind] + student[kind] for kind in replica}, f"{who} and student")
    if isinstance(spec, PretrainTeacher):
        check_resources(_training_takes(spec.train), "teacher.train")
    from orchestrator.runtime.nodes import check_nodes

    check_nodes(run.store, run.job.storage)
    check_nodes(run.store, run.job.storage)


def _replica_takes(teacher: TeacherBase) -> dict[str, float]:
    return {"CPU": teacher.cpus_per_replica, "GPU": teacher.gpus_per_replica}


def _training_takes(train: Train) -> dict[str, float]:
    return {"CPU": train.workers * train.cpus_per_worker, "GPU": train.workers * train.gpus_per_worker}


def fetch_teacher(run: Run) -> ModelFolder | None:
    """A teacher that exists already; None if it is to be trained here."""
    spec = run.job.teacher
    if isinstance(spec, PretrainTeacher):
        return None
    from orchestrator.teacher.fetch import fetch_teacher

    with run.stage("teacher", fingerprint("teacher", spec)) as stage:
        teacher = fetch_teacher(run.store, spec)
        if spec.shards > 1:
            from orchestrator.models.build import outline
            from orchestrator.models.sharded import check_shards

            check_shards(outline(teacher.path), spec.shards)
        stage.figures["size_bytes"] = sum(f.bytes for f in teacher.manifest.files.values())
    return teacher


def tokenize(run: Run, teacher: ModelFolder | None) -> Tokens:
    """Token shards of the corpus, in the teacher's tokenizer if there is a teacher."""
    identity = "" if teacher is None else teacher.manifest.files["tokenizer.json"].sha256
    corpus = identify_corpus(run.job.data, None if teacher is None else teacher.address, identity)
    source = run.job.data.source
    lineage = {"name": source.kind, "digest": corpus.key, "source": source.model_dump_json()}
    with run.stage("data", corpus.key, {"data": run.job.data}, lineage) as stage:
        manifest = prepared_tokens(run.store, corpus)
        if manifest is None:
            manifest = prepare_tokens(run.store, corpus)
        else:
            stage.reuse()
        stage.figures |= {"documents": manifest.documents, "rows": sum(manifest.shard_rows)}
    return Tokens(corpus.folder, manifest)


def pretrain_teacher(run: Run, tokens: Tokens) -> ModelFolder:
    """Train the teacher here: a distillation run without a teacher."""
    spec = run.job.teacher
    assert isinstance(spec, PretrainTeacher)
    job = TrainingJob(
        "teacher", spec.model, tokens.manifest.vocab_size, spec.train, spec.seed, tokens.folder, tokens.manifest, soft=None
    )
    return _train(run, tokens, job)


def prepare_student(run: Run, tokens: Tokens, teacher: ModelFolder) -> Model | Initial:
    """What the student starts from: a configuration, or weights that are brought or made from the teacher's here."""
    student, vocab = run.job.student, teacher.manifest.vocab_size
    if isinstance(student, ConfigStudent):
        asked = student.model.config.get("vocab_size", vocab)
        if asked != vocab:
            raise SpecError(f"student.model.config.vocab_size: {asked}, but the teacher's vocabulary has {vocab} ids")
        return student.model
    from orchestrator.student.initial import Origin, finished_initial, make_initial

    origin = Origin(run.store, student, teacher, run.job.seed, f"{tokens.folder}/train", tokens.manifest)
    with run.stage("initial", origin.key, {"student": student}) as stage:
        initial = finished_initial(origin)
        if initial is None:
            initial = make_initial(origin)
        else:
            stage.reuse()
    return initial


def open_labels(run: Run, tokens: Tokens, teacher: ModelFolder, start: Model | Initial) -> Labelling:
    """The log that holds exactly this teacher's labels of these tokens, and the demand of this student on it."""
    job, vocab = run.job, teacher.manifest.vocab_size
    labels = job.labels.model_dump(mode="json", exclude={"run_ahead"})
    arithmetic = "vllm" if vllm_of(job.teacher) else job.teacher.dtype
    teacher_identity = {"content": teacher.manifest.content, "dtype": arithmetic}
    shape = {"seq_len": tokens.manifest.seq_len, "vocab_size": vocab}
    identity = {"teacher": teacher_identity, "tokens": tokens.manifest.content, "labels": labels, "shape": shape}
    log = LabelLog.open(run.store, identity)
    student = TrainingJob(
        "student",
        start,
        vocab,
        job.train,
        job.seed,
        tokens.folder,
        tokens.manifest,
        Soft(log.key, job.labels, job.objective, teacher.address, job.teacher.dtype),
        Ahead(job.student.mtp_depth, job.student.mtp_weight) if job.student.mtp_depth else Ahead(),
    )
    return Labelling(log, student, student.demanded_shards())


def label(run: Run, tokens: Tokens, teacher: ModelFolder, labelling: Labelling) -> Labelled:
    """Have the teacher pool label what is demanded and not yet in the log; seal the demand."""
    log, demand = labelling.log, labelling.demand
    lineage = {"name": "tokens", "digest": tokens.manifest.content, "source": tokens.folder}
    with run.stage("labels", log.key, {"labels": run.job.labels}, lineage) as stage:
        missing = log.missing(demand)
        run.display.expect("labels", len(demand))
        speed = blocked = None
        if missing:
            speed, blocked = _label_missing(run, tokens, teacher, labelling, missing, stage.figures)
        else:
            stage.reuse()
        seal, ledger = log.seal(demand, tokens.manifest)
        stage.figures |= {"rows": seal.rows, "bytes": seal.bytes, "reused_shards": len(demand) - len(missing)}
    return Labelled(seal, ledger, len(demand) - len(missing), speed, blocked)


def _label_missing(
    run: Run, tokens: Tokens, teacher: ModelFolder, labelling: Labelling, missing: list[int], figures: dict[str, float]
) -> tuple[float, float]:
    """Tokens per second of the pool, and the share of its time in which it waited for the student.

    `figures` get the seconds of each replica.
    """
    from orchestrator.teacher.calibrate import calibrate
    from orchestrator.teacher.placement import Placement
    from orchestrator.teacher.pool import label_shards
    from orchestrator.teacher.usage import Usage

    spec, demand = run.job.teacher, labelling.demand
    work, placement = _work(run, tokens, teacher, labelling), Placement(labelling.log.key, spec, run.display.say)
    done = len(demand) - len(missing)
    if done:
        run.display.say(f"labels: resuming, {done}/{len(demand)} shards done")
    calibrate(work, demand[0], placement)
    rows = size = 0
    usage, began = Usage(), None
    seq_len = tokens.manifest.seq_len
    position = {shard: i for i, shard in enumerate(demand)}
    shards = [(shard, position[shard]) for shard in missing]
    for receipt in label_shards(work, shards, _pool_size(run.job), placement):
        began = began or time.time() - receipt["seconds"]
        done, rows, size = done + 1, rows + receipt["rows"], size + receipt["bytes"]
        lost = usage.add(receipt)
        if lost:
            run.warn("labels: a teacher replica was lost and replaced; its shard was labelled again")
        number = list(usage.replicas).index(receipt["replica"])
        metrics = {
            names.SHARDS_COMMITTED: done,
            names.LABEL_TOKENS_PER_S: rows * seq_len / (time.time() - began),
            names.BYTES_PER_TOKEN: size / (rows * seq_len),
            names.BLOCKED_FRACTION: usage.blocked_fraction,
            names.TEACHER_REPLICAS: receipt["replicas"],
            names.BUSY_S: usage.total.busy,
            names.IDLE_S: usage.total.idle,
            names.BLOCKED_S: usage.total.blocked,
            names.LABEL_TOKENS: receipt["rows"] * seq_len,
            names.of_replica(names.REPLICA_BUSY_S, number): receipt["seconds"],
            names.of_replica(names.REPLICA_IDLE_S, number): receipt["idle_s"],
            names.of_replica(names.REPLICA_BLOCKED_S, number): receipt["blocked_s"],
            names.RESTARTS: float(lost),
        }
        run.record("labels", labelling.log.key, done, metrics)
    assert began is not None
    for number, seconds in enumerate(usage.replicas.values()):
        figures |= {f"replica_{number}/{kind}_s": value for kind, value in asdict(seconds).items()}
    return rows * seq_len / (time.time() - began), usage.blocked_fraction


def _pool_size(job: Job) -> Replicas:
    """As many replicas as were asked for, but no more than the cluster has room for beside the student."""
    least, most = job.teacher.replicas.min, job.teacher.replicas.max
    room = replicas_that_fit(_replica_takes(job.teacher), beside=_training_takes(job.train))
    return Replicas(min=least, max=max(least, min(most, room)))


def _work(run: Run, tokens: Tokens, teacher: ModelFolder, labelling: Labelling) -> Work:
    """What the teacher's actors are told."""
    from orchestrator.teacher.labeller import Labelling as Work

    spec = run.job.teacher
    behind = finished_model(run.store, labelling.student.folder) is None  # a finished student does not hold its teacher back
    return Work(
        store=run.store,
        data_folder=tokens.folder,
        model=teacher.address,
        vocab_size=teacher.manifest.vocab_size,
        dtype=spec.dtype,
        labels=run.job.labels if behind else run.job.labels.model_copy(update={"run_ahead": None}),
        log_key=labelling.log.key,
        micro_batch=spec.micro_batch,
        threads=max(1, int(spec.cpus_per_shard)),
        board=run.board,
        shards=spec.shards,
        cpus=spec.cpus_per_shard,
        gpus=spec.gpus_per_shard,
        vllm=vllm_of(spec),
    )


def train_student(run: Run, tokens: Tokens, labelling: Labelling) -> ModelFolder:
    """Train the student on the label log while it is being written."""
    return _train(run, tokens, labelling.student)


def train_baseline(run: Run, tokens: Tokens, labelling: Labelling) -> ModelFolder | None:
    """Train the same student, from the same weights on the same rows, on hard labels alone."""
    if not run.job.evaluate.baseline:
        return None
    return _train(run, tokens, replace(labelling.student, stage="baseline", soft=None))


def _train(run: Run, tokens: Tokens, job: TrainingJob) -> ModelFolder:
    with run.stage(job.stage, job.key, {"model": job.model, "train": job.train, "seed": job.seed}) as stage:
        model = finished_model(run.store, job.folder)
        if model is not None:
            stage.reuse()
        else:
            from orchestrator.student.launch import train_model

            model = train_model(run.store, job, run.board, tokens.tokenizer, run.warn)
        stage.figures |= model.manifest.training
    return model


class SideBySide:
    """Steps that run at the same time, each in a thread of the driver that only waits for Ray."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def start(self, step: Callable[..., Any], *args: Any, after: Future[Any] | None = None) -> Future[Any]:
        """Start `step(*args)`, once `after` has ended well; a step after a failed one is not started."""
        future: Future[Any] = Future()

        def work() -> None:
            try:
                if after is not None:
                    after.result()
                future.set_result(step(*args))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=work, name=step.__name__, daemon=True).start()
        self.futures.append(future)
        return future


@contextmanager
def side_by_side(run: Run) -> Iterator[SideBySide]:
    """Wait for all steps started inside; if one fails, tell the others that they wait in vain and raise its error."""
    work = SideBySide()
    yield work
    ended, _ = wait(work.futures, return_when=FIRST_EXCEPTION)
    failures = [f for f in ended if f.exception() is not None]
    if failures:
        cause = failures[0].exception()
        assert cause is not None
        run.board.abort.remote(str(cause))
        wait(work.futures, timeout=ABORT_GRACE_S)
        raise cause
