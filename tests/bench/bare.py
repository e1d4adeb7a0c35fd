"""The floor: the same work in a plain loop, one process, no Ray, no DeepSpeed, everything preloaded. Prints one JSON line.

python tests/bench/bare.py train|label STORAGE JOB.yaml [key=value ...]
"""

from __future__ import annotations

import json
import sys
import time

import torch
from plain import PlainLoop

from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Frame, join
from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.spec.job import Job
from orchestrator.spec.load import load_job
from orchestrator.store.local import LocalStore
from orchestrator.store.records import MODEL, TokenManifest
from orchestrator.store.shards import read_tokens
from orchestrator.student.engine import build_distiller
from orchestrator.student.feed import Feed
from orchestrator.student.job import Soft, TrainingJob
from orchestrator.teacher.backend import Replica, TransformersBackend


def main() -> None:
    what, storage, job_file, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    store = LocalStore(storage)
    job = load_job(job_file, overrides)
    (data_key,) = store.keys("data")
    (log_key,) = store.keys("labels")
    manifest = TokenManifest.load(store, f"data/{data_key}/manifest.json")
    assert manifest is not None
    (teacher,) = store.keys("teacher")
    soft = Soft(log_key, job.labels, job.objective, store.address(f"teacher/{teacher}/{MODEL}"), job.teacher.dtype)
    training = TrainingJob(
        "student", job.student.model, manifest.vocab_size, job.train, job.seed, f"data/{data_key}", manifest, soft
    )
    print(json.dumps({"train": train, "label": label}[what](store, job, training)))


def train(store: LocalStore, job: Job, training: TrainingJob) -> dict[str, float]:
    """Tokens per second of a hand-written mixed-precision AdamW loop over the student's own batches."""
    loop = PlainLoop(build_distiller(training), job.train)
    schedule = ObjectiveSchedule(training.objective, job.train.steps, torch.device("cpu"))
    steps = list(Feed(store, training, 0, lambda: None).steps(0))
    for index, (step, micro_batches) in enumerate(steps):
        if index == 1:
            started, cpu = time.perf_counter(), time.process_time()
        loop.step(step, micro_batches, schedule.at(step))
    tokens = (len(steps) - 1) * job.train.global_batch * job.data.seq_len
    return {"tokens_per_s": tokens / (time.perf_counter() - started), "tokens_per_cpu_s": tokens / (time.process_time() - cpu)}


def label(store: LocalStore, job: Job, training: TrainingJob) -> dict[str, float]:
    """Tokens per second of forward pass and label extraction over the demanded shards, nothing written."""
    (teacher_key,) = store.keys("teacher")
    teacher = TransformersBackend(Replica(store.address(f"teacher/{teacher_key}/{MODEL}"), job.teacher.dtype))
    kind = Codec(job.labels, Frame(training.vocab_size, training.manifest.seq_len))
    pages = training.manifest.train
    shards = [read_tokens(store, pages.folder, pages.record(store, s)) for s in training.demanded_shards()]
    rows = 0
    for index, shard in enumerate(shards):
        if index == 1:
            rows, started, cpu = 0, time.perf_counter(), time.process_time()
        ids, parts = torch.from_numpy(shard.ids[:, :-1]).long(), []
        for start in range(0, len(ids), job.teacher.micro_batch):
            part = ids[start : start + job.teacher.micro_batch]
            parts.append(kind.extract(teacher.answer(part), shard.row_ids[start : start + len(part)]))
        kind.pack_groups(join(parts), training.manifest.group_rows)
        rows += len(ids)
    tokens = rows * job.data.seq_len
    return {"tokens_per_s": tokens / (time.perf_counter() - started), "tokens_per_cpu_s": tokens / (time.process_time() - cpu)}


if __name__ == "__main__":
    main()
