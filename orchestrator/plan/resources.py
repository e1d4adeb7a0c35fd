"""Resources that the parts of a run request from Ray at once, by Ray's own names of the kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.spec.job import Job
from orchestrator.spec.model import TeacherBase, labelled_by
from orchestrator.spec.train import Train

Resources = dict[str, float]


def replica_takes(teacher: TeacherBase) -> Resources:
    """Return the resources of one replica that labels, all its shards together."""
    replica = labelled_by(teacher)
    return {"CPU": replica.cpus_per_replica, "GPU": replica.gpus_per_replica}


def training_takes(train: Train) -> Resources:
    """Return the resources of all workers together."""
    return {"CPU": train.workers * train.cpus_per_worker, "GPU": train.workers * train.gpus_per_worker}


def evaluation_takes(job: Job) -> Resources:
    """Return the resources of the one process that measures models: a GPU if any part of the job computes on one."""
    on_gpu = replica_takes(job.teacher)["GPU"] or any(training_takes(train)["GPU"] for train in job.trainings.values())
    return {"CPU": 1.0, "GPU": 1.0 if on_gpu else 0.0}


@dataclass(frozen=True)
class Room:
    """The free capacity of a run's devices while teacher and student were at work."""

    replica: bool
    """Another teacher replica."""
    worker: bool
    """Another training worker."""


def room_beside(job: Job, total: Mapping[str, float]) -> Room:
    """Return what fits into `total` (CPU cores, GPUs) beside the training and as many teacher replicas as the job allows."""
    replica, training = replica_takes(job.teacher), training_takes(job.train)
    asked = job.teacher.replicas
    fitting = min([(total[kind] - training[kind]) // each for kind, each in replica.items() if each], default=asked.max + 1)
    used = max(asked.min, min(asked.max, int(fitting)))
    free = {kind: total[kind] - training[kind] - used * replica[kind] for kind in total}
    worker = {"CPU": job.train.cpus_per_worker, "GPU": job.train.gpus_per_worker}
    return Room(replica=fitting > used, worker=all(free[kind] >= each for kind, each in worker.items()))
