"""The labelling of a run: find the labels that the student demands, and have the teacher pool make those that are missing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.errors import EnvironmentFault
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.plan.length import with_steps
from orchestrator.plan.resources import replica_takes, training_takes
from orchestrator.run import Run
from orchestrator.runtime.session import replicas_that_fit
from orchestrator.spec.base import result_fields
from orchestrator.spec.job import Job
from orchestrator.spec.labels import HiddenLabels, TopkLabels, kept_features
from orchestrator.spec.model import Model, Replicas, TeacherBase, TransformersTeacher, VllmServer, labelled_by, vllm_of
from orchestrator.store.claims import Claims
from orchestrator.store.heldout import ANSWERS, CONTINUATIONS, AnswerLog, HeldoutLog, choose_measured
from orchestrator.store.label_log import LabelLog, Ledger, Seal
from orchestrator.store.records import ModelFolder, Tokens, finished_model
from orchestrator.student.job import Ahead, Evaluation, Initial, Soft, TrainingJob
from orchestrator.tracking import names

if TYPE_CHECKING:
    from orchestrator.teacher.backend import Replica
    from orchestrator.teacher.task import Answering, LabelTask
    from orchestrator.teacher.usage import Usage

HELDOUT_IDS = 128
"""The k of the top-k labels of held-out rows."""


@dataclass(frozen=True)
class Demand:
    """The labels that the student's training needs."""

    log: LabelLog
    student: TrainingJob
    shards: list[int]
    """The numbers of the shards, in the order in which training wants them."""
    heldout: HeldoutLog | None
    """The label log of the held-out rows that training is evaluated on."""
    answers: AnswerLog
    """The log of the teacher's answers on the held-out rows that models are measured on."""
    server: VllmServer | None
    """The server that labels in place of the teacher, with the name of its model."""


@dataclass(frozen=True)
class Labelled:
    """A demand that is met."""

    seal: Seal
    ledger: Ledger
    reused_shards: int
    tokens_per_s: float | None
    """The speed of all teacher actors together; None if nothing was left to label."""
    blocked_fraction: float | None
    """The share of the teacher's time that was spent waiting for the student."""


def open_labels(run: Run, tokens: Tokens, teacher: ModelFolder, start: Model | Initial) -> Demand:
    """Open the log of this teacher's labels of these tokens, and work out which of them the student needs."""
    job, vocab, server = run.job, teacher.manifest.vocab_size, _named_server(run)
    arithmetic = f"vllm {server.model}" if server else job.teacher.dtype
    teacher_identity = {"content": teacher.manifest.content, "dtype": arithmetic}
    shape = {"seq_len": tokens.manifest.seq_len, "vocab_size": vocab}
    identity = {
        "teacher": teacher_identity,
        "tokens": tokens.manifest.content,
        "labels": result_fields(job.labels),
        "shape": shape,
    }
    log, heldout = LabelLog.open(run.store, identity), _open_heldout(run, identity, vocab)
    student = TrainingJob(
        "student",
        start,
        vocab,
        with_steps(job.train, tokens.rows, "train"),
        job.seed,
        tokens.folder,
        tokens.manifest,
        Soft(log.key, job.labels, job.objective, teacher.address, job.teacher.dtype),
        Ahead(job.student.mtp_depth, job.student.mtp_weight) if job.student.mtp_depth else Ahead(),
        Evaluation(job.evaluate.every, job.evaluate.every_rows, heldout) if job.evaluate.every else None,
    )
    return Demand(log, student, student.demanded_shards(), heldout, _open_answers(run, tokens, identity), server)


def _named_server(run: Run) -> VllmServer | None:
    """Return the server that labels in place of the teacher, with the name of its model; None if there is no such server.

    A server that does not answer stands for the model that it served when it last did: the labels made then can be used.
    """
    spec, server = run.job.teacher, vllm_of(run.job.teacher)
    if server is None or server.model is not None:
        return server
    from orchestrator.teacher.vllm import find_served

    assert isinstance(spec, TransformersTeacher)
    key = f"names/{fingerprint('vllm', server.url)}.json"
    try:
        served = find_served(server)
    except EnvironmentFault:
        remembered = run.store.read_json(key)
        if remembered is None:
            raise
        return server.model_copy(update={"model": remembered["name"]})
    if not served.is_called(spec.path):
        run.warn(f"teacher.vllm: {server.url} serves {served.name}, which is called otherwise than teacher.path {spec.path}")
    run.store.replace(key, json.dumps({"name": served.name}).encode())
    return server.model_copy(update={"model": served.name})


def _open_heldout(run: Run, identity: dict[str, Any], vocab: int) -> HeldoutLog | None:
    """Open the log of the same teacher's labels of the held-out rows that training is evaluated on.

    As exact as top-k labels are worth; where a server answers, as exact as it was asked to be for training.
    """
    job = run.job
    if job.evaluate.every is None:
        return None
    k = job.labels.k if isinstance(job.labels, TopkLabels) and vllm_of(job.teacher) else min(vocab, HELDOUT_IDS)
    labels, rows = TopkLabels(kind="topk", k=k), job.evaluate.every_rows
    own = {"labels": result_fields(labels), "heldout_rows": rows}
    return HeldoutLog(LabelLog.open(run.store, identity | own).key, labels, rows)


def _open_answers(run: Run, tokens: Tokens, identity: dict[str, Any]) -> AnswerLog:
    """The log of what the same teacher says on the held-out rows that models are measured on.

    It keeps the last hidden states in fp32, the smallest labels that are exact for any student: its divergence from the teacher
    follows from them and the teacher's head. Where a server answers, it keeps as many ids as are asked for in training.
    """
    job, spec = run.job, run.job.evaluate
    labels: HiddenLabels | TopkLabels = HiddenLabels(kind="hidden", codec="fp32")
    if isinstance(job.labels, TopkLabels) and vllm_of(job.teacher):
        labels = TopkLabels(kind="topk", k=job.labels.k)
    chosen = choose_measured(tokens.manifest.heldout_rows, spec.rows, spec.watched)
    own = {"labels": result_fields(labels), "measured_rows": {shard: len(rows) for shard, rows in chosen.items()}}
    return AnswerLog(LabelLog.open(run.store, identity | own, ANSWERS).key, labels, spec.rows, spec.watched)


def label(run: Run, tokens: Tokens, teacher: ModelFolder, demand: Demand) -> Labelled:
    """Have the teacher pool label the shards that are demanded and missing in the log, and seal the demand.

    The demand is that of all steps, also where the student's training may stop before them.
    """
    log, shards = demand.log, demand.shards
    lineage = {"name": "tokens", "digest": tokens.manifest.content, "source": tokens.folder}
    with run.stage("labels", log.key, lineage) as stage:
        missing = log.missing(shards)
        run.display.expect("labels", len(shards))
        made = _Made(0, None, None)
        if missing or _unlabelled(run, demand) or _unanswered(run, tokens, demand):
            made = _label_missing(run, tokens, teacher, demand, missing, stage.figures)
        else:
            stage.reuse()
        seal, ledger = log.seal(shards, tokens.manifest)
        reused = len(shards) - made.shards
        stage.figures |= {"rows": seal.rows, "bytes": seal.bytes, "reused_shards": reused}
    return Labelled(seal, ledger, reused, made.tokens_per_s, made.blocked_fraction)


class _Made(NamedTuple):
    """The work of this run's own teacher pool."""

    shards: int
    tokens_per_s: float | None
    blocked_fraction: float | None


def _label_missing(
    run: Run, tokens: Tokens, teacher: ModelFolder, demand: Demand, missing: list[int], figures: dict[str, float]
) -> _Made:
    """Have the `missing` shards labelled, here or by another run that shares the log.

    `figures` get the seconds of each replica.
    """
    from orchestrator.teacher.calibrate import calibrate
    from orchestrator.teacher.placement import Placement
    from orchestrator.teacher.pool import label_shards
    from orchestrator.teacher.usage import Usage

    task = _task(run, tokens, teacher, demand)
    placement = Placement(demand.log.key, labelled_by(run.job.teacher), run.display.say)
    done = len(demand.shards) - len(missing)
    if done:
        run.display.say(f"labels: resuming, {done}/{len(demand.shards)} shards done")
    calibrate(task, demand.shards[0], placement)
    made = rows = size = 0
    usage, began = Usage(), None
    seq_len = tokens.manifest.seq_len
    position = {shard: i for i, shard in enumerate(demand.shards)}
    for receipt in label_shards(task, [(shard, position[shard]) for shard in missing], _pool_size(run.job), placement):
        lost = "replica" in receipt and usage.add(receipt)
        if lost:
            run.warn("labels: a teacher replica was lost and replaced; its shard was labelled again")
        if receipt["heldout"] or receipt["outcome"] == "deferred":
            continue
        done += 1
        metrics = {names.SHARDS_COMMITTED: done, names.RESTARTS: float(lost)}
        if receipt["outcome"] == "labelled":
            began = began or time.time() - receipt["took_s"]
            made, rows, size = made + 1, rows + receipt["rows"], size + receipt["bytes"]
            metrics |= {
                names.LABEL_TOKENS: receipt["rows"] * seq_len,
                names.LABEL_TOKENS_PER_S: rows * seq_len / (time.time() - began),
                names.BYTES_PER_TOKEN: size / (rows * seq_len),
            }
        run.record("labels", demand.log.key, done, metrics | _of_pool(receipt, usage))
    for number, seconds in enumerate(usage.replicas.values()):
        figures |= {f"replica_{number}/{kind}_s": value for kind, value in asdict(seconds).items()}
    speed = rows * seq_len / (time.time() - began) if began else None
    return _Made(made, speed, usage.blocked_fraction if began else None)


def _unlabelled(run: Run, demand: Demand) -> HeldoutLog | None:
    """Return the held-out log if there is nothing in it yet, else None."""
    return demand.heldout if demand.heldout and LabelLog(run.store, demand.heldout.key).missing([0]) else None


def _unanswered(run: Run, tokens: Tokens, demand: Demand) -> tuple[int, ...]:
    """Shards that the log of answers lacks."""
    wanted = range(len(demand.answers.shards(tokens.manifest)))
    return tuple(demand.answers.open(run.store).missing(wanted))


def _answering(run: Run, tokens: Tokens, demand: Demand) -> Answering:
    """Return the answers that the pool must still give on the held-out rows that models are measured on."""
    from orchestrator.teacher.task import Answering

    job, log = run.job, demand.answers
    whole = job.teacher.shards == 1 and vllm_of(job.teacher) is None
    continues = whole and CONTINUATIONS not in log.open(run.store).kept_names()
    speed_rows = min(job.evaluate.micro_batch, job.teacher.micro_batch)
    return Answering(log, _unanswered(run, tokens, demand), speed_rows, continues)


def _of_pool(receipt: Mapping[str, Any], usage: Usage) -> dict[str, float]:
    """Return metrics of the pool after `receipt`, and of the replica that it came from, if it names one."""
    if "replica" not in receipt:
        return {}
    number = list(usage.replicas).index(receipt["replica"])
    return {
        names.TEACHER_REPLICAS: receipt["replicas"],
        names.BLOCKED_FRACTION: usage.blocked_fraction,
        names.BUSY_S: usage.total.busy,
        names.IDLE_S: usage.total.idle,
        names.BLOCKED_S: usage.total.blocked,
        names.of_replica(names.REPLICA_BUSY_S, number): receipt["seconds"],
        names.of_replica(names.REPLICA_IDLE_S, number): receipt["idle_s"],
        names.of_replica(names.REPLICA_BLOCKED_S, number): receipt["blocked_s"],
    }


def _pool_size(job: Job) -> Replicas:
    """Return as many replicas as were asked for, but no more than the cluster has room for beside the student."""
    least, most = job.teacher.replicas.min, job.teacher.replicas.max
    room = replicas_that_fit(replica_takes(job.teacher), beside=training_takes(job.train))
    return Replicas(min=least, max=max(least, min(most, room)))


def _task(run: Run, tokens: Tokens, teacher: ModelFolder, demand: Demand) -> LabelTask:
    """Return the task of the teacher's actors."""
    from orchestrator.teacher.task import LabelTask

    spec = run.job.teacher
    behind = finished_model(run.store, demand.student.folder) is None  # a finished student does not hold its teacher back
    return LabelTask(
        store=run.store,
        data_folder=tokens.folder,
        replica=replica_of(labelled_by(spec), teacher, kept_features(run.job.labels)),
        vocab_size=teacher.manifest.vocab_size,
        labels=run.job.labels if behind else run.job.labels.model_copy(update={"run_ahead": None}),
        log_key=demand.log.key,
        micro_batch=spec.micro_batch,
        board=run.board,
        claims=Claims(run.store, demand.log.folder, fingerprint("writer", run.directory.key)),
        vllm=demand.server,
        heldout=_unlabelled(run, demand),
        answering=_answering(run, tokens, demand),
    )


def replica_of(spec: TeacherBase, teacher: ModelFolder, features: tuple[str, ...] = ()) -> Replica:
    """Return the make-up of every replica of `teacher`, with the inner `features` that it is to tell."""
    from orchestrator.teacher.backend import Replica

    return Replica(teacher.address, spec.dtype, features, spec.shards, spec.cpus_per_shard, spec.gpus_per_shard)
