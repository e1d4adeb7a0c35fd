"""Measurement of the rates one worker sustains on stand-ins for a job's models: `distill plan JOB --cluster C --calibrate`.

A stand-in is the model itself with a few of its blocks, freshly drawn; labels, micro-batches, precision and trainer are the
job's. A step is taken to cost so many seconds per FLOP and so many per byte of activations, in the planner's own count of both;
two depths of one model, whose head weighs differently in them, tell the two apart.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Columns, Frame, join
from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.models.build import DTYPES, build_model, device
from orchestrator.models.head import load_head
from orchestrator.plan.batch import Batch
from orchestrator.plan.capacity import models_of
from orchestrator.plan.cluster import Calibration
from orchestrator.plan.footprint import Rows, activation_bytes_per_token
from orchestrator.plan.layout import layout_of
from orchestrator.plan.make import decoder_of
from orchestrator.plan.sizes import Decoder
from orchestrator.plan.speed import forward_flops, training_flops
from orchestrator.runtime.environment import lone_process, prepare_deepspeed
from orchestrator.spec.job import Job
from orchestrator.spec.labels import HiddenLabels, Labels
from orchestrator.spec.model import Model
from orchestrator.spec.train import Train, Zero
from orchestrator.store.records import TokenManifest
from orchestrator.student.feed import MicroBatch
from orchestrator.student.job import Soft, TrainingJob
from orchestrator.student.trainer import start_trainer
from orchestrator.student.worker import train_step
from orchestrator.teacher.backend import Replica, TransformersBackend

DEPTHS = (1, 3)
"""Blocks of the stand-ins, beyond those that the architecture begins with in another form."""
WARM, MEASURED = 2, 5
"""Steps before the clock counts, and those whose median counts."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    whole: float
    update: float
    """The optimizer's part of it."""


def calibrated(job: Job, clock: Clock = time.perf_counter) -> Calibration:
    """Rates of one worker on each side of `job`, measured in this process alone.

    Raises `SpecError` where neither the job file nor a local folder describes a model.
    """
    models = models_of(job)
    student, teacher, vocab = models.student, models.teacher, models.vocab_size
    prepare_deepspeed(on_gpu=job.train.gpus_per_worker > 0)
    lone_process()
    torch.set_num_threads(max(1, int(job.train.cpus_per_worker)))
    with tempfile.TemporaryDirectory() as scratch:
        backend = "nccl" if job.train.gpus_per_worker > 0 else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
        try:
            taught, teacher_flops_per_s = _lesson(job, shallow(teacher, DEPTHS[-1]), vocab, Path(scratch) / "teacher", clock)
            found: list[tuple[Decoder, StepTime]] = []
            for depth in DEPTHS:
                model = shallow(student, depth)
                shape = decoder_of(model, vocab)
                assert shape is not None
                found.append((shape, step_time(_training(job, model, vocab, Path(scratch) / "teacher"), [taught], clock)))
        finally:
            dist.destroy_process_group()
    return solved_rates(job, found, teacher_flops_per_s)


def shallow(model: Model, depth: int) -> Model:
    """`model` with `depth` blocks behind those that it begins with in another form: one dense block of DeepSeek-V3."""
    config = {name: value for name, value in model.config.items() if name != "layer_types"}
    if config.get("first_k_dense_replace"):
        config["first_k_dense_replace"], depth = 1, depth + 1
    return model.model_copy(update={"config": config | {"num_hidden_layers": depth}})


def step_time(job: TrainingJob, micro_batches: list[MicroBatch], clock: Clock = time.perf_counter) -> StepTime:
    """Median seconds of an optimizer step of `job`, every step on the same rows; the process group is there."""
    trainer = start_trainer(job)
    schedule = ObjectiveSchedule(job.objective, job.steps, trainer.engine.device)
    updates = _timed_updates(trainer.engine, clock)
    whole: list[float] = []
    update: list[float] = []
    for step in range(job.steps):
        before, started = len(updates), _settled(clock)
        train_step(trainer, job, schedule, step, micro_batches)
        whole.append(_settled(clock) - started)
        update.append(sum(updates[before:]))
    return StepTime(statistics.median(whole[WARM:]), statistics.median(update[WARM:]))


def _lesson(job: Job, model: Model, vocab: int, folder: Path, clock: Clock) -> tuple[MicroBatch, float]:
    """Rows of random ids with the labels of a teacher built from `model`, and the FLOP/s at which it made them."""
    spec, rows = job.teacher, Batch.of(job.train).micro_rows
    drawn = build_model(model, vocab, 0, "teacher.model")
    torch.nn.Module.to(drawn, DTYPES[spec.dtype])
    drawn.save_pretrained(folder)
    teacher = TransformersBackend(Replica(str(folder), spec.dtype, gpus=spec.gpus_per_shard))
    labels = _plain(job.labels)
    head = load_head(folder, DTYPES[spec.dtype], device(job.train.gpus_per_worker))
    codec = Codec(labels, Frame(vocab, job.data.seq_len, head))
    ids = torch.randint(vocab, (max(rows, spec.micro_batch), job.data.seq_len + 1), generator=torch.Generator().manual_seed(0))

    def labelled() -> Columns:
        parts = [codec.extract(teacher.answer(part[:, :-1]), [b""] * len(part)) for part in ids.split(spec.micro_batch)]
        return codec.pack(join(parts))

    columns = labelled()
    seconds: list[float] = []
    for _ in range(MEASURED):
        started = _settled(clock)
        labelled()
        seconds.append(_settled(clock) - started)
    arrays = {name: values[:rows] for name, values in codec.unpack(columns).items()}
    shape = decoder_of(model, vocab)
    assert shape is not None
    flops = forward_flops(shape, job.data.seq_len) * ids[:, :-1].numel()
    temperature = getattr(labels, "temperatures", (1.0,))[0]
    return MicroBatch(ids[:rows], codec.targets(arrays, temperature), {}), flops / statistics.median(seconds)


def _plain(labels: Labels) -> Labels:
    """`labels` without what names a block of the whole model, and without a basis, which would have to be fitted first."""
    simpler: dict[str, Any] = {"codec": "fp16", "rank": None} if isinstance(labels, HiddenLabels) else {}
    return labels.model_copy(update={"features": None, **simpler})


def _training(job: Job, model: Model, vocab: int, teacher: Path) -> TrainingJob:
    """The student's training on one worker, in steps of one micro-batch."""
    rows = Batch.of(job.train).micro_rows
    parallel = job.train.parallel if isinstance(job.train.parallel, Zero) else Zero()
    alone: dict[str, Any] = {"parallel": parallel, "workers": 1, "global_batch": rows, "micro_batch": rows}
    train: Train = job.train.model_copy(update=alone | {"steps": WARM + MEASURED, "epochs": None, "warmup_steps": 1})
    objective = job.objective.model_copy(update={"features": ()})
    manifest = TokenManifest.without_corpus(job.data.seq_len, vocab)
    soft = Soft("", _plain(job.labels), objective, str(teacher), job.teacher.dtype)
    return TrainingJob("student", model, vocab, train, job.seed, "", manifest, soft)


def solved_rates(job: Job, found: list[tuple[Decoder, StepTime]], teacher_flops_per_s: float) -> Calibration:
    """Rates under which both depths take as long as they did: x FLOPs + y bytes = seconds, per token."""
    batch, seq_len = Batch.of(job.train), job.data.seq_len
    layout, tokens = layout_of(job.train), Rows(batch.micro_rows, 1, seq_len).tokens
    (f1, b1, s1), (f2, b2, s2) = (
        (
            training_flops(shape, seq_len, layout.checkpointing),
            activation_bytes_per_token(shape, layout, seq_len, on_gpu=job.train.gpus_per_worker > 0),
            (seconds.whole - seconds.update) / tokens,
        )
        for shape, seconds in found
    )
    determinant = f1 * b2 - f2 * b1
    x, y = ((s1 * b2 - s2 * b1) / determinant, (f1 * s2 - f2 * s1) / determinant) if determinant else (s2 / f2, 0.0)
    if min(x, y) < 0:  # beside the noise, one of them does not count
        x, y = (s2 / f2, 0.0) if y < 0 else (0.0, s2 / b2)
    deepest, seconds = found[-1]
    rates = [1 / x if x else float("inf"), 1 / y if y else float("inf")]
    return Calibration(rates[0], teacher_flops_per_s, rates[1], 12 * deepest.total / seconds.update)


def _timed_updates(engine: Any, clock: Clock) -> list[float]:
    """Seconds of each call of the engine's step, as they are made."""
    seconds: list[float] = []
    step = engine.step

    def measured() -> None:
        started = _settled(clock)
        step()
        seconds.append(_settled(clock) - started)

    engine.step = measured
    return seconds


def _settled(clock: Clock) -> float:
    """The time at which all work that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()
