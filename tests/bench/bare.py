"""The floor: the same work in a plain loop, one process, no Ray, no DeepSpeed, everything preloaded. Prints one JSON line.

python tests/bench/bare.py train|label STORAGE JOB.yaml [key=value ...]
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from orchestrator.labels.kinds import label_kind
from orchestrator.labels.layout import Frame, join
from orchestrator.losses.objective import Mixture
from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.models.build import DTYPES
from orchestrator.plan.schedule import learning_rate
from orchestrator.spec.job import Job
from orchestrator.spec.load import load_job
from orchestrator.store.files import Store
from orchestrator.store.records import MODEL, TokenManifest
from orchestrator.store.shards import read_tokens
from orchestrator.student.engine import build_distiller, parameter_groups
from orchestrator.student.feed import Feed
from orchestrator.student.job import Soft, TrainingJob
from orchestrator.teacher.backend import TransformersBackend


def main() -> None:
    what, storage, job_file, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    store = Store(storage)
    job = load_job(job_file, overrides)
    (data_key,) = store.keys("data")
    (log_key,) = store.keys("labels")
    manifest = TokenManifest.load(store, f"data/{data_key}/manifest.json")
    assert manifest is not None
    (teacher,) = store.keys("teacher")
    soft = Soft(log_key, job.labels, job.objective, store.path(f"teacher/{teacher}/{MODEL}"))
    training = TrainingJob(
        "student", job.student.model, manifest.vocab_size, job.train, job.seed, f"data/{data_key}", manifest, soft
    )
    print(json.dumps({"train": train, "label": label}[what](store, job, training)))


def train(store: Store, job: Job, training: TrainingJob) -> dict[str, float]:
    """Tokens per second of a hand-written mixed-precision AdamW loop over the student's own batches."""
    module = build_distiller(training).to(DTYPES[job.train.precision])
    weights = list(module.parameters())
    groups = parameter_groups(module, job.train.weight_decay)
    master = {id(p): p.detach().float().clone() for p in weights}
    for group in groups:
        group["params"] = [master[id(p)] for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=job.train.learning_rate, betas=job.train.betas)
    schedule = ObjectiveSchedule(training.objective, job.train.steps, torch.device("cpu"))
    steps = list(Feed(store, training, 0, 1, lambda: None).steps(0))
    for index, (step, micro_batches) in enumerate(steps):
        if index == 1:
            started, cpu = time.perf_counter(), time.process_time()
        train_step(module, weights, master, optimizer, micro_batches, job, step, schedule.at(step))
    tokens = (len(steps) - 1) * job.train.global_batch * job.data.seq_len
    return {"tokens_per_s": tokens / (time.perf_counter() - started), "tokens_per_cpu_s": tokens / (time.process_time() - cpu)}


def train_step(
    module: Any,
    weights: list[Any],
    master: dict[int, Any],
    optimizer: Any,
    micro_batches: list[Any],
    job: Job,
    step: int,
    mixture: Mixture,
) -> None:
    gradients = [torch.zeros_like(m) for m in master.values()]
    for micro in micro_batches:
        means = module(micro.ids, mixture, micro.soft)
        (means[0] / len(micro_batches)).backward()
        for gradient, weight in zip(gradients, weights, strict=True):
            gradient += weight.grad.float()
            weight.grad = None
    for gradient, copy in zip(gradients, master.values(), strict=True):
        copy.grad = gradient
    torch.nn.utils.clip_grad_norm_(list(master.values()), job.train.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(job.train, step)
    optimizer.step()
    with torch.no_grad():
        for copy, weight in zip(master.values(), weights, strict=True):
            weight.copy_(copy)


def label(store: Store, job: Job, training: TrainingJob) -> dict[str, float]:
    """Tokens per second of forward pass and label extraction over the demanded shards, nothing written."""
    (teacher_key,) = store.keys("teacher")
    teacher = TransformersBackend(store.path(f"teacher/{teacher_key}/{MODEL}"), job.teacher.dtype)
    kind = label_kind(job.labels, Frame(training.vocab_size, training.manifest.seq_len))
    shards = [
        read_tokens(store, f"{training.data_folder}/train", training.manifest.train[s]) for s in training.demanded_shards()
    ]
    rows = 0
    for index, shard in enumerate(shards):
        if index == 1:
            rows, started, cpu = 0, time.perf_counter(), time.process_time()
        ids, parts = torch.from_numpy(shard.ids[:, :-1]).long(), []
        for start in range(0, len(ids), job.teacher.micro_batch):
            part = ids[start : start + job.teacher.micro_batch]
            parts.append(kind.extract(teacher.answer(part), shard.row_ids[start : start + len(part)]))
        kind.pack(join(parts))
        rows += len(ids)
    tokens = rows * job.data.seq_len
    return {"tokens_per_s": tokens / (time.perf_counter() - started), "tokens_per_cpu_s": tokens / (time.process_time() - cpu)}


if __name__ == "__main__":
    main()
